/* AVX-512 on a machine without it, for emulate_avx512.py: included before everything else, so
 * that simd.h takes its first branch, and every intrinsic there becomes code for AVX2.
 *
 * Arithmetic and comparisons come from SIMDe (Debian: libsimde-dev), which others wrote and test:
 * a misreading of ours in simd.h is not repeated here. What it lacks follows, written lane by
 * lane after the operations of Intel's manual: loads and stores under a mask, which touch no lane
 * that the mask leaves out, and streaming stores, which fault at an address that is not a
 * multiple of 64. Any other intrinsic is a compiler's error: the machine's own are not enabled. */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#if defined(__AVX512F__)
#error "to be compiled without AVX-512"
#endif

/* Masks are made lane by lane: in line, thousands of them would take the compiler minutes. */
#define EMULATED static __attribute__((noinline, unused))
#define INLINED static inline __attribute__((always_inline))
#define MASKED_LOAD(name, vector, element, lanes, mask)                                           \
    EMULATED vector name(mask k, const void *p) {                                                 \
        element v[lanes];                                                                         \
        vector r;                                                                                 \
        for (int i = 0; i < lanes; i++) {                                                         \
            v[i] = 0;                                                                             \
            if (k >> i & 1) memcpy(v + i, (const char *)p + i * sizeof(element), sizeof(element));\
        }                                                                                         \
        memcpy(&r, v, sizeof r);                                                                  \
        return r;                                                                                 \
    }
#define MASKED_STORE(name, vector, element, lanes, mask)                                          \
    EMULATED void name(void *p, mask k, vector a) {                                               \
        element v[lanes];                                                                         \
        memcpy(v, &a, sizeof a);                                                                  \
        for (int i = 0; i < lanes; i++)                                                           \
            if (k >> i & 1) memcpy((char *)p + i * sizeof(element), v + i, sizeof(element));      \
    }
MASKED_LOAD(emulated_loadu_epi8, __m128i, unsigned char, 16, uint16_t)
MASKED_LOAD(emulated_loadu_ps256, __m256, float, 8, uint8_t)
MASKED_LOAD(emulated_loadu_ps, simde__m512, float, 16, uint16_t)
MASKED_LOAD(emulated_loadu_pd, simde__m512d, double, 8, uint8_t)
MASKED_STORE(emulated_storeu_ps256, __m256, float, 8, uint8_t)
MASKED_STORE(emulated_storeu_ps, simde__m512, float, 16, uint16_t)
MASKED_STORE(emulated_storeu_pd, simde__m512d, double, 8, uint8_t)

EMULATED void emulated_stream(void *p, const void *a) {
    if ((uintptr_t)p % 64) {
        fprintf(stderr, "emulated AVX-512: a streaming store to %p faults\n", p);
        abort();
    }
    memcpy(p, a, 64);
}
EMULATED void emulated_stream_ps(void *p, simde__m512 a) { emulated_stream(p, &a); }
EMULATED void emulated_stream_pd(void *p, simde__m512d a) { emulated_stream(p, &a); }
INLINED simde__m512d emulated_cvtps_pd(__m256 a) {
    simde__m512d_private r;
    r.m256d[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(a));
    r.m256d[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
    return simde__m512d_from_private(r);
}
INLINED __m256 emulated_cvtpd_ps(simde__m512d a) {
    simde__m512d_private v = simde__m512d_to_private(a);
    return _mm256_set_m128(_mm256_cvtpd_ps(v.m256d[1]), _mm256_cvtpd_ps(v.m256d[0]));
}
INLINED __m256 emulated_extractf32x8_ps(simde__m512 a, int which) {
    return simde__m512_to_private(a).m256[which];
}
EMULATED simde__m512 emulated_maskz_mov_ps(uint16_t k, simde__m512 a) {
    return simde_mm512_maskz_mov_ps(k, a);
}
EMULATED simde__m512d emulated_maskz_mov_pd(uint8_t k, simde__m512d a) {
    return simde_mm512_maskz_mov_pd(k, a);
}
#define COMPARED(type, op) case op: return simde_mm512_cmp_##type##_mask(a, b, op)
#define COMPARE(name, type, vector, mask)                                                         \
    EMULATED mask name(vector a, vector b, int op) {                                              \
        switch (op) {                                                                             \
            COMPARED(type, _CMP_EQ_OQ);                                                           \
            COMPARED(type, _CMP_LT_OQ);                                                           \
            COMPARED(type, _CMP_LE_OQ);                                                           \
            COMPARED(type, _CMP_NEQ_UQ);                                                          \
            COMPARED(type, _CMP_NEQ_OQ);                                                          \
            COMPARED(type, _CMP_NLT_UQ);                                                          \
            COMPARED(type, _CMP_NLE_UQ);                                                          \
            COMPARED(type, _CMP_GT_OQ);                                                           \
            COMPARED(type, _CMP_ORD_Q);                                                           \
            COMPARED(type, _CMP_UNORD_Q);                                                         \
        }                                                                                         \
        abort(); /* one that simd.h did not use so far: to be added */                            \
    }
COMPARE(emulated_cmp_ps_mask, ps, simde__m512, uint16_t)
COMPARE(emulated_cmp_pd_mask, pd, simde__m512d, uint8_t)
EMULATED uint16_t emulated_test_epi8_mask(__m128i a, __m128i b) {
    unsigned char v[16], w[16];
    unsigned mask = 0;
    memcpy(v, &a, sizeof v);
    memcpy(w, &b, sizeof w);
    for (int i = 0; i < 16; i++) mask |= (unsigned)((v[i] & w[i]) != 0) << i;
    return (uint16_t)mask;
}
#define _mm_maskz_loadu_epi8 emulated_loadu_epi8
#define _mm256_maskz_loadu_ps emulated_loadu_ps256
#define _mm512_maskz_loadu_ps emulated_loadu_ps
#define _mm512_maskz_loadu_pd emulated_loadu_pd
#define _mm256_mask_storeu_ps emulated_storeu_ps256
#define _mm512_mask_storeu_ps emulated_storeu_ps
#define _mm512_mask_storeu_pd emulated_storeu_pd
#define _mm512_stream_ps emulated_stream_ps
#define _mm512_stream_pd emulated_stream_pd
#undef _mm512_maskz_mov_ps
#define _mm512_maskz_mov_ps emulated_maskz_mov_ps
#undef _mm512_maskz_mov_pd
#define _mm512_maskz_mov_pd emulated_maskz_mov_pd
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated_cmp_ps_mask
#undef _mm512_cmp_pd_mask
#define _mm512_cmp_pd_mask emulated_cmp_pd_mask
#define _mm512_cvtps_pd emulated_cvtps_pd
#undef _mm512_cvtpd_ps
#define _mm512_cvtpd_ps emulated_cvtpd_ps
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#define _mm_test_epi8_mask emulated_test_epi8_mask

/* What simd.h asks of the compiler. */
#define __AVX512F__ 1
#define __AVX512VL__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
