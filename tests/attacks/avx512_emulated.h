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
#define SIMDE_NO_INLINE /* calls: inlined, some thousand of them take the compiler minutes */
#include <simde/x86/avx512.h>

#if defined(__AVX512F__)
#error "to be compiled without AVX-512"
#endif

#define EMULATED static __attribute__((noinline, unused))
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
EMULATED simde__m512d emulated_cvtps_pd(__m256 a) {
    float v[8];
    double w[8];
    simde__m512d r;
    memcpy(v, &a, sizeof v);
    for (int i = 0; i < 8; i++) w[i] = v[i];
    memcpy(&r, w, sizeof r);
    return r;
}
EMULATED __m256 emulated_cvtpd_ps(simde__m512d a) {
    double v[8];
    float w[8];
    __m256 r;
    memcpy(v, &a, sizeof v);
    for (int i = 0; i < 8; i++) w[i] = (float)v[i];
    memcpy(&r, w, sizeof r);
    return r;
}
EMULATED __m256 emulated_extractf32x8_ps(simde__m512 a, int which) {
    __m256 r;
    memcpy(&r, (const char *)&a + 32 * which, sizeof r);
    return r;
}
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
