/* Packs: the vectors that the kernels compute with.
 *
 * f16 is sixteen float32, d8 is eight float64: 64 bytes each on every machine, whatever
 * registers hold them (one AVX-512 register, two of AVX2, four of SSE2 or NEON). The width is
 * part of the arithmetic: with the same lanes, the same order of operations and fused
 * multiply-adds written out, AVX2 and AVX-512 give the same bits. The file is compiled with
 * -ffp-contract=off (MSVC: a pragma), so a multiply-add is fused where this header says so and
 * nowhere else; the generic build has no such instruction and rounds twice.
 *
 * Written with intrinsics because it was measured: left to the compiler, float32 to float64
 * accumulation ran at 5 to 19 GB/s (it splits the lanes badly) against 37 GB/s for these.
 *
 * d8_less(a, p) is a - p, computed as a * 1 - p: the same bits, on the units for multiply-adds. In
 * a sum of float32 data those for additions do all the conversions too, and are what it waits
 * for: 30 GB/s a core with a plain subtraction, up to 45 with this (Zen 4, AVX2; bench/sums.c).
 *
 * *_load and *_store take any alignment; *_part take the first k lanes, touch no memory
 * beyond them, and read the others as zero. */
#ifndef FASTBN_SIMD_H
#define FASTBN_SIMD_H

#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h> /* __popcnt */
#pragma fp_contract(off)
#define INLINE static __forceinline
#define fastbn_prefetch(p) ((void)(p))
#define BITS(mask) ((int)__popcnt(mask))
#define OPAQUE(v) ((void)0)
#define OPAQUE_INT(v) ((void)0)
#else
#define OPAQUE(v) __asm__("" : "+x"(v)) /* a value that the compiler does not know */
#define OPAQUE_INT(v) __asm__("" : "+r"(v))
#define INLINE static inline __attribute__((always_inline))
#define fastbn_prefetch(p) __builtin_prefetch((p), 0, 2)
#define BITS(mask) __builtin_popcount(mask) /* how many are set */
#endif

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define FASTBN_SIMD "avx512"
#define FASTBN_SPECIAL 1

typedef __m512 f16;
typedef __m512d d8;

INLINE f16 f16_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE d8 d8_load(const double *p) { return _mm512_loadu_pd(p); }
INLINE void f16_store(float *p, f16 a) { _mm512_storeu_ps(p, a); }
INLINE void d8_store(double *p, d8 a) { _mm512_storeu_pd(p, a); }
INLINE void f16_stream(float *p, f16 a) { _mm512_stream_ps(p, a); }
INLINE void d8_stream(double *p, d8 a) { _mm512_stream_pd(p, a); }
#define fastbn_fence() _mm_sfence()
#define F16_FIRST(k) ((__mmask16)((1u << (k)) - 1))
#define D8_FIRST(k) ((__mmask8)((1u << (k)) - 1))
INLINE f16 f16_load_part(const float *p, int k) { return _mm512_maskz_loadu_ps(F16_FIRST(k), p); }
INLINE d8 d8_load_part(const double *p, int k) { return _mm512_maskz_loadu_pd(D8_FIRST(k), p); }
INLINE void f16_store_part(float *p, f16 a, int k) { _mm512_mask_storeu_ps(p, F16_FIRST(k), a); }
INLINE void d8_store_part(double *p, d8 a, int k) { _mm512_mask_storeu_pd(p, D8_FIRST(k), a); }
INLINE d8 d8_widen(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
INLINE d8 d8_widen_part(const float *p, int k) {
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(D8_FIRST(k), p));
}
INLINE d8 f16_low(f16 a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
INLINE d8 f16_high(f16 a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }
INLINE f16 f16_splat(float a) { return _mm512_set1_ps(a); }
INLINE d8 d8_splat(double a) { return _mm512_set1_pd(a); }
INLINE f16 f16_add(f16 a, f16 b) { return _mm512_add_ps(a, b); }
INLINE d8 d8_add(d8 a, d8 b) { return _mm512_add_pd(a, b); }
INLINE f16 f16_sub(f16 a, f16 b) { return _mm512_sub_ps(a, b); }
INLINE d8 d8_sub(d8 a, d8 b) { return _mm512_sub_pd(a, b); }
INLINE f16 f16_mul(f16 a, f16 b) { return _mm512_mul_ps(a, b); }
INLINE d8 d8_mul(d8 a, d8 b) { return _mm512_mul_pd(a, b); }
INLINE f16 f16_fma(f16 a, f16 b, f16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE d8 d8_fma(d8 a, d8 b, d8 c) { return _mm512_fmadd_pd(a, b, c); }
INLINE d8 d8_less(d8 a, d8 p) {
    d8 one = _mm512_set1_pd(1);
    OPAQUE(one);
    return _mm512_fmsub_pd(a, one, p);
}
INLINE d8 d8_div(d8 a, d8 b) { return _mm512_div_pd(a, b); }
INLINE d8 d8_sqrt(d8 a) { return _mm512_sqrt_pd(a); }
INLINE void d8_narrow(float *p, d8 a, int k) {
    _mm256_mask_storeu_ps(p, D8_FIRST(k), _mm512_cvtpd_ps(a));
}
/* 0 > a ? 0 : a, so that NaN stays NaN */
INLINE f16 f16_relu(f16 a) { return _mm512_max_ps(_mm512_setzero_ps(), a); }
INLINE d8 d8_relu(d8 a) { return _mm512_max_pd(_mm512_setzero_pd(), a); }
/* t <= 0 ? 0 : g */
INLINE f16 f16_where_positive(f16 t, f16 g) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t, _mm512_setzero_ps(), _CMP_NLE_UQ), g);
}
INLINE d8 d8_where_positive(d8 t, d8 g) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(t, _mm512_setzero_pd(), _CMP_NLE_UQ), g);
}
INLINE d8 d8_keep(d8 a, int k) { return _mm512_maskz_mov_pd(D8_FIRST(k), a); }
INLINE d8 d8_finite_or_zero(d8 a) {
    return _mm512_maskz_mov_pd(
        _mm512_cmp_pd_mask(_mm512_sub_pd(a, a), _mm512_setzero_pd(), _CMP_EQ_OQ), a);
}
INLINE int d8_any_less(d8 a, d8 b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ) != 0; }
/* t != 0 ? g : 0 */
INLINE f16 f16_where(f16 t, f16 g) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t, _mm512_setzero_ps(), _CMP_NEQ_UQ), g);
}
INLINE d8 d8_where(d8 t, d8 g) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(t, _mm512_setzero_pd(), _CMP_NEQ_UQ), g);
}
/* t is NaN ? 0 : g */
INLINE f16 f16_where_number(f16 t, f16 g) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t, t, _CMP_ORD_Q), g);
}
INLINE d8 d8_where_number(d8 t, d8 g) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(t, t, _CMP_ORD_Q), g);
}
/* g where the byte is not 0 */
INLINE d8 d8_where_bytes(const unsigned char *p, d8 g) {
    __m128i v = _mm_loadl_epi64((const __m128i *)p);
    return _mm512_maskz_mov_pd((__mmask8)_mm_test_epi8_mask(v, v), g);
}
INLINE int d8_numbers(d8 t) { return BITS(_mm512_cmp_pd_mask(t, t, _CMP_ORD_Q)); }
/* 1 for bytes that are not 0, else 0 */
INLINE f16 f16_flags(const unsigned char *p, int k) {
    __m128i v = _mm_maskz_loadu_epi8(F16_FIRST(k), p);
    return _mm512_maskz_mov_ps(_mm_test_epi8_mask(v, v), _mm512_set1_ps(1));
}
INLINE d8 d8_flags(const unsigned char *p, int k) {
    __m128i v = _mm_maskz_loadu_epi8(F16_FIRST(k), p);
    return _mm512_maskz_mov_pd((__mmask8)_mm_test_epi8_mask(v, v), _mm512_set1_pd(1));
}

#elif defined(__AVX2__) && (defined(__FMA__) || defined(_MSC_VER))
#include <immintrin.h>
#define FASTBN_SIMD "avx2"
#define FASTBN_SPECIAL 1

typedef struct { __m256 a, b; } f16;
typedef struct { __m256d a, b; } d8;

/* The k-th window of these is a mask of the first k lanes. */
static const int fastbn_ones32[32] = {
    -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
    0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0};
static const long long fastbn_ones64[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
#define MASK32(k, lane) _mm256_loadu_si256((const __m256i *)(fastbn_ones32 + 16 - (k) + (lane)))
#define MASK64(k, lane) _mm256_loadu_si256((const __m256i *)(fastbn_ones64 + 8 - (k) + (lane)))

INLINE f16 f16_of(__m256 a, __m256 b) { f16 r; r.a = a; r.b = b; return r; }
INLINE d8 d8_of(__m256d a, __m256d b) { d8 r; r.a = a; r.b = b; return r; }
INLINE f16 f16_load(const float *p) { return f16_of(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
INLINE d8 d8_load(const double *p) { return d8_of(_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)); }
INLINE void f16_store(float *p, f16 x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
INLINE void d8_store(double *p, d8 x) { _mm256_storeu_pd(p, x.a); _mm256_storeu_pd(p + 4, x.b); }
INLINE void f16_stream(float *p, f16 x) { _mm256_stream_ps(p, x.a); _mm256_stream_ps(p + 8, x.b); }
INLINE void d8_stream(double *p, d8 x) { _mm256_stream_pd(p, x.a); _mm256_stream_pd(p + 4, x.b); }
#define fastbn_fence() _mm_sfence()
INLINE f16 f16_load_part(const float *p, int k) {
    return f16_of(_mm256_maskload_ps(p, MASK32(k, 0)), _mm256_maskload_ps(p + 8, MASK32(k, 8)));
}
INLINE d8 d8_load_part(const double *p, int k) {
    return d8_of(_mm256_maskload_pd(p, MASK64(k, 0)), _mm256_maskload_pd(p + 4, MASK64(k, 4)));
}
/* By halves: a masked store of AVX2 is some 20 microinstructions on AMD, and the end of every run
 * of 14x14 values would pay as much for it as for all the rest of the run. */
INLINE void f16_store_part(float *p, f16 x, int k) {
    __m256 eight = x.a;
    if (k >= 8) { _mm256_storeu_ps(p, eight); p += 8; eight = x.b; }
    __m128 four = _mm256_castps256_ps128(eight);
    if (k & 4) { _mm_storeu_ps(p, four); p += 4; four = _mm256_extractf128_ps(eight, 1); }
    if (k & 2) { _mm_storel_pi((__m64 *)p, four); p += 2; four = _mm_movehl_ps(four, four); }
    if (k & 1) _mm_store_ss(p, four);
}
INLINE void d8_store_part(double *p, d8 x, int k) {
    __m256d four = x.a;
    if (k & 4) { _mm256_storeu_pd(p, four); p += 4; four = x.b; }
    __m128d two = _mm256_castpd256_pd128(four);
    if (k & 2) { _mm_storeu_pd(p, two); p += 2; two = _mm256_extractf128_pd(four, 1); }
    if (k & 1) _mm_store_sd(p, two);
}
INLINE d8 d8_from_floats(__m256 v) {
    return d8_of(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                 _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
}
INLINE d8 d8_widen(const float *p) {
    return d8_of(_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4)));
}
INLINE d8 d8_widen_part(const float *p, int k) {
    return d8_from_floats(_mm256_maskload_ps(p, MASK32(k, 0)));
}
INLINE d8 f16_low(f16 x) { return d8_from_floats(x.a); }
INLINE d8 f16_high(f16 x) { return d8_from_floats(x.b); }
INLINE f16 f16_splat(float v) { return f16_of(_mm256_set1_ps(v), _mm256_set1_ps(v)); }
INLINE d8 d8_splat(double v) { return d8_of(_mm256_set1_pd(v), _mm256_set1_pd(v)); }
#define BOTH(type, op) type##_of(op(x.a, y.a), op(x.b, y.b))
INLINE f16 f16_add(f16 x, f16 y) { return BOTH(f16, _mm256_add_ps); }
INLINE d8 d8_add(d8 x, d8 y) { return BOTH(d8, _mm256_add_pd); }
INLINE f16 f16_sub(f16 x, f16 y) { return BOTH(f16, _mm256_sub_ps); }
INLINE d8 d8_sub(d8 x, d8 y) { return BOTH(d8, _mm256_sub_pd); }
INLINE f16 f16_mul(f16 x, f16 y) { return BOTH(f16, _mm256_mul_ps); }
INLINE d8 d8_mul(d8 x, d8 y) { return BOTH(d8, _mm256_mul_pd); }
INLINE f16 f16_fma(f16 x, f16 y, f16 z) {
    return f16_of(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
INLINE d8 d8_fma(d8 x, d8 y, d8 z) {
    return d8_of(_mm256_fmadd_pd(x.a, y.a, z.a), _mm256_fmadd_pd(x.b, y.b, z.b));
}
INLINE d8 d8_less(d8 x, d8 p) {
    __m256d one = _mm256_set1_pd(1);
    OPAQUE(one);
    return d8_of(_mm256_fmsub_pd(x.a, one, p.a), _mm256_fmsub_pd(x.b, one, p.b));
}
INLINE d8 d8_div(d8 x, d8 y) { return BOTH(d8, _mm256_div_pd); }
INLINE d8 d8_sqrt(d8 x) { return d8_of(_mm256_sqrt_pd(x.a), _mm256_sqrt_pd(x.b)); }
INLINE void d8_narrow(float *p, d8 x, int k) {
    const __m256 v = _mm256_set_m128(_mm256_cvtpd_ps(x.b), _mm256_cvtpd_ps(x.a));
    f16_store_part(p, f16_of(v, v), k); /* k <= 8 */
}
INLINE f16 f16_relu(f16 y) { f16 x = f16_splat(0); return BOTH(f16, _mm256_max_ps); }
INLINE d8 d8_relu(d8 y) { d8 x = d8_splat(0); return BOTH(d8, _mm256_max_pd); }
INLINE f16 f16_where_positive(f16 t, f16 g) {
    const __m256 zero = _mm256_setzero_ps();
    return f16_of(_mm256_and_ps(_mm256_cmp_ps(t.a, zero, _CMP_NLE_UQ), g.a),
                  _mm256_and_ps(_mm256_cmp_ps(t.b, zero, _CMP_NLE_UQ), g.b));
}
INLINE d8 d8_where_positive(d8 t, d8 g) {
    const __m256d zero = _mm256_setzero_pd();
    return d8_of(_mm256_and_pd(_mm256_cmp_pd(t.a, zero, _CMP_NLE_UQ), g.a),
                 _mm256_and_pd(_mm256_cmp_pd(t.b, zero, _CMP_NLE_UQ), g.b));
}
INLINE d8 d8_keep(d8 x, int k) {
    return d8_of(_mm256_and_pd(_mm256_castsi256_pd(MASK64(k, 0)), x.a),
                 _mm256_and_pd(_mm256_castsi256_pd(MASK64(k, 4)), x.b));
}
INLINE d8 d8_finite_or_zero(d8 x) {
    const __m256d zero = _mm256_setzero_pd();
    const d8 none = d8_sub(x, x); /* not 0 for NaN and infinities */
    return d8_of(_mm256_and_pd(_mm256_cmp_pd(none.a, zero, _CMP_EQ_OQ), x.a),
                 _mm256_and_pd(_mm256_cmp_pd(none.b, zero, _CMP_EQ_OQ), x.b));
}
INLINE int d8_any_less(d8 x, d8 y) {
    return _mm256_movemask_pd(_mm256_or_pd(_mm256_cmp_pd(x.a, y.a, _CMP_LT_OQ),
                                           _mm256_cmp_pd(x.b, y.b, _CMP_LT_OQ))) != 0;
}
#define PS_IF(t, u, op, g) _mm256_and_ps(_mm256_cmp_ps(t, u, op), g)
#define PD_IF(t, u, op, g) _mm256_and_pd(_mm256_cmp_pd(t, u, op), g)
INLINE f16 f16_where(f16 t, f16 g) {
    const __m256 zero = _mm256_setzero_ps();
    return f16_of(PS_IF(t.a, zero, _CMP_NEQ_UQ, g.a), PS_IF(t.b, zero, _CMP_NEQ_UQ, g.b));
}
INLINE d8 d8_where(d8 t, d8 g) {
    const __m256d zero = _mm256_setzero_pd();
    return d8_of(PD_IF(t.a, zero, _CMP_NEQ_UQ, g.a), PD_IF(t.b, zero, _CMP_NEQ_UQ, g.b));
}
INLINE f16 f16_where_number(f16 t, f16 g) {
    return f16_of(PS_IF(t.a, t.a, _CMP_ORD_Q, g.a), PS_IF(t.b, t.b, _CMP_ORD_Q, g.b));
}
INLINE d8 d8_where_number(d8 t, d8 g) {
    return d8_of(PD_IF(t.a, t.a, _CMP_ORD_Q, g.a), PD_IF(t.b, t.b, _CMP_ORD_Q, g.b));
}
INLINE int d8_numbers(d8 t) {
    return BITS(_mm256_movemask_pd(_mm256_cmp_pd(t.a, t.a, _CMP_ORD_Q)) |
                _mm256_movemask_pd(_mm256_cmp_pd(t.b, t.b, _CMP_ORD_Q)) << 4);
}
/* k bytes: -1 where 0, else 0; no memory beyond them is touched. */
INLINE __m128i zero_bytes(const unsigned char *p, int k) {
    unsigned char v[16] = {0};
    if (k == 16) return _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)p), _mm_setzero_si128());
    if (k == 8) return _mm_cmpeq_epi8(_mm_loadl_epi64((const __m128i *)p), _mm_setzero_si128());
    memcpy(v, p, k);
    return _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)v), _mm_setzero_si128());
}
INLINE d8 d8_where_bytes(const unsigned char *p, d8 g) {
    __m128i no = zero_bytes(p, 8);
    __m256i a = _mm256_cvtepi8_epi64(no), b = _mm256_cvtepi8_epi64(_mm_srli_si128(no, 4));
    return d8_of(_mm256_andnot_pd(_mm256_castsi256_pd(a), g.a),
                 _mm256_andnot_pd(_mm256_castsi256_pd(b), g.b));
}
INLINE f16 f16_flags(const unsigned char *p, int k) {
    const __m256 one = _mm256_set1_ps(1);
    __m128i no = zero_bytes(p, k);
    __m256i a = _mm256_cvtepi8_epi32(no), b = _mm256_cvtepi8_epi32(_mm_srli_si128(no, 8));
    return f16_of(_mm256_andnot_ps(_mm256_castsi256_ps(a), one),
                  _mm256_andnot_ps(_mm256_castsi256_ps(b), one));
}
INLINE d8 d8_flags(const unsigned char *p, int k) {
    const __m256d one = _mm256_set1_pd(1);
    __m128i no = zero_bytes(p, k);
    __m256i a = _mm256_cvtepi8_epi64(no), b = _mm256_cvtepi8_epi64(_mm_srli_si128(no, 4));
    return d8_of(_mm256_andnot_pd(_mm256_castsi256_pd(a), one),
                 _mm256_andnot_pd(_mm256_castsi256_pd(b), one));
}

#else
#define FASTBN_SIMD "generic"
/* Loops of their own for masks and NaN: here they would double the time of compiling. */
#define FASTBN_SPECIAL 0

/* Plain C over parts that a compiler keeps in 128-bit registers where it has them. */
#if defined(__GNUC__) || defined(__clang__)
typedef float f_part __attribute__((vector_size(16)));
typedef double d_part __attribute__((vector_size(16)));
#else
typedef float f_part;
typedef double d_part;
#endif
typedef union { f_part q[64 / sizeof(f_part)]; float v[16]; } f16;
typedef union { d_part q[64 / sizeof(d_part)]; double v[8]; } d8;
#define F16_PARTS ((int)(64 / sizeof(f_part)))
#define D8_PARTS ((int)(64 / sizeof(d_part)))

#define EACH(type, parts, value) \
    type r; for (int i = 0; i < parts; i++) r.q[i] = (value); return r
#define LANE(type, n, value) type r; for (int i = 0; i < n; i++) r.v[i] = (value); return r

INLINE f16 f16_load(const float *p) { f16 r; memcpy(&r, p, 64); return r; }
INLINE d8 d8_load(const double *p) { d8 r; memcpy(&r, p, 64); return r; }
INLINE void f16_store(float *p, f16 a) { memcpy(p, &a, 64); }
INLINE void d8_store(double *p, d8 a) { memcpy(p, &a, 64); }
#define fastbn_fence() ((void)0)
#define f16_stream f16_store
#define d8_stream d8_store
INLINE f16 f16_load_part(const float *p, int k) { LANE(f16, 16, i < k ? p[i] : 0); }
INLINE d8 d8_load_part(const double *p, int k) { LANE(d8, 8, i < k ? p[i] : 0); }
INLINE void f16_store_part(float *p, f16 a, int k) { for (int i = 0; i < k; i++) p[i] = a.v[i]; }
INLINE void d8_store_part(double *p, d8 a, int k) { for (int i = 0; i < k; i++) p[i] = a.v[i]; }
INLINE d8 d8_widen(const float *p) { LANE(d8, 8, p[i]); }
INLINE d8 d8_widen_part(const float *p, int k) { LANE(d8, 8, i < k ? p[i] : 0); }
INLINE d8 f16_low(f16 a) { LANE(d8, 8, a.v[i]); }
INLINE d8 f16_high(f16 a) { LANE(d8, 8, a.v[i + 8]); }
INLINE f16 f16_splat(float a) { LANE(f16, 16, a); }
INLINE d8 d8_splat(double a) { LANE(d8, 8, a); }
INLINE f16 f16_add(f16 a, f16 b) { EACH(f16, F16_PARTS, a.q[i] + b.q[i]); }
INLINE d8 d8_add(d8 a, d8 b) { EACH(d8, D8_PARTS, a.q[i] + b.q[i]); }
INLINE f16 f16_sub(f16 a, f16 b) { EACH(f16, F16_PARTS, a.q[i] - b.q[i]); }
INLINE d8 d8_sub(d8 a, d8 b) { EACH(d8, D8_PARTS, a.q[i] - b.q[i]); }
INLINE f16 f16_mul(f16 a, f16 b) { EACH(f16, F16_PARTS, a.q[i] * b.q[i]); }
INLINE d8 d8_mul(d8 a, d8 b) { EACH(d8, D8_PARTS, a.q[i] * b.q[i]); }
INLINE f16 f16_fma(f16 a, f16 b, f16 c) { EACH(f16, F16_PARTS, a.q[i] * b.q[i] + c.q[i]); }
INLINE d8 d8_fma(d8 a, d8 b, d8 c) { EACH(d8, D8_PARTS, a.q[i] * b.q[i] + c.q[i]); }
#define d8_less d8_sub
INLINE d8 d8_div(d8 a, d8 b) { EACH(d8, D8_PARTS, a.q[i] / b.q[i]); }
INLINE d8 d8_sqrt(d8 a) { LANE(d8, 8, sqrt(a.v[i])); }
INLINE void d8_narrow(float *p, d8 a, int k) { for (int i = 0; i < k; i++) p[i] = (float)a.v[i]; }
INLINE f16 f16_relu(f16 a) { LANE(f16, 16, 0 > a.v[i] ? 0 : a.v[i]); }
INLINE d8 d8_relu(d8 a) { LANE(d8, 8, 0 > a.v[i] ? 0 : a.v[i]); }
INLINE f16 f16_where_positive(f16 t, f16 g) { LANE(f16, 16, t.v[i] <= 0 ? 0 : g.v[i]); }
INLINE d8 d8_where_positive(d8 t, d8 g) { LANE(d8, 8, t.v[i] <= 0 ? 0 : g.v[i]); }
INLINE d8 d8_keep(d8 a, int k) { LANE(d8, 8, i < k ? a.v[i] : 0); }
INLINE d8 d8_finite_or_zero(d8 a) { LANE(d8, 8, a.v[i] - a.v[i] == 0 ? a.v[i] : 0); }
INLINE int d8_any_less(d8 a, d8 b) {
    int any = 0;
    for (int i = 0; i < 8; i++) any |= a.v[i] < b.v[i];
    return any;
}
INLINE f16 f16_where(f16 t, f16 g) { LANE(f16, 16, t.v[i] != 0 ? g.v[i] : 0); }
INLINE d8 d8_where(d8 t, d8 g) { LANE(d8, 8, t.v[i] != 0 ? g.v[i] : 0); }
INLINE f16 f16_where_number(f16 t, f16 g) { LANE(f16, 16, t.v[i] == t.v[i] ? g.v[i] : 0); }
INLINE d8 d8_where_number(d8 t, d8 g) { LANE(d8, 8, t.v[i] == t.v[i] ? g.v[i] : 0); }
INLINE d8 d8_where_bytes(const unsigned char *p, d8 g) { LANE(d8, 8, p[i] ? g.v[i] : 0); }
INLINE int d8_numbers(d8 t) {
    int n = 0;
    for (int i = 0; i < 8; i++) n += t.v[i] == t.v[i];
    return n;
}
INLINE f16 f16_flags(const unsigned char *p, int k) { LANE(f16, 16, i < k && p[i] ? 1 : 0); }
INLINE d8 d8_flags(const unsigned char *p, int k) { LANE(d8, 8, i < k && p[i] ? 1 : 0); }
#endif

/* 1 for a byte that is not 0, else 0; compilers like to make a branch of it, which a random mask
 * mispredicts. */
INLINE double fastbn_flag(const unsigned char *p) {
    int v = *p != 0;
    OPAQUE_INT(v);
    return v;
}

/* 16 where none of 16 bytes is 0, 0 where all are, else 1. */
INLINE int fastbn_kept16(const unsigned char *p) {
    unsigned long long a, b;
    memcpy(&a, p, 8);
    memcpy(&b, p + 8, 8);
    if ((a | b) == 0) return 0;
    return (a & b) == 0x0101010101010101ULL ? 16 : 1;
}

/* Bytes of 8 that are not 0; a bool may be any such byte. */
INLINE int fastbn_count8(const unsigned char *p) {
    unsigned long long a, high = 0x8080808080808080ULL;
    memcpy(&a, p, 8);
    a = (((a & ~high) + ~high) | a) & high; /* the high bit of those */
    return (int)((a >> 7) * 0x0101010101010101ULL >> 56);
}

INLINE int fastbn_kept8(const unsigned char *p) {
    unsigned long long a;
    memcpy(&a, p, 8);
    return a == 0x0101010101010101ULL;
}

/* The sum of the lanes, in one order on every machine. */
INLINE double d8_sum(d8 a) {
    double v[8];
    d8_store(v, a);
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

#endif
