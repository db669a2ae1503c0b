/* What the arithmetic of a float32 reduction in float64 can do by itself: GB/s of one core, per loop.
 *
 *     cc -O2 -mavx2 -mfma -ffp-contract=off bench/sums.c -o sums && ./sums
 *
 * The loops hold all sums in registers and read one stream. fastbn's kernels do what `fused` does;
 * `plain` subtracts with a subtraction. `converted` and `read` are bounds: nothing but conversions
 * and one addition, and nothing but float32 additions.
 */
#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static volatile double sink; /* so that no loop is left out */

#define WIDEN(k) _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4 * (k)))
#define EACH(f) f(0) f(1) f(2) f(3)

#define LOOP(name, body)                                                          \
    __attribute__((noinline)) static void name(const float *x, long n) {          \
        __m256d s[4] = {{0}}, q[4] = {{0}}, one = _mm256_set1_pd(1);              \
        const __m256d pivot = _mm256_set1_pd(0.25);                               \
        __asm__("" : "+x"(one));                                                  \
        for (long i = 0; i < n; i += 16) { EACH(body) }                           \
        s[0] += s[1] + s[2] + s[3] + q[0] + q[1] + q[2] + q[3] + pivot + one;     \
        sink = s[0][0] + s[0][1] + s[0][2] + s[0][3];                             \
    }

#define PLAIN(k) { const __m256d d = _mm256_sub_pd(WIDEN(k), pivot); \
    s[k] = _mm256_add_pd(s[k], d); q[k] = _mm256_fmadd_pd(d, d, q[k]); }
#define FUSED(k) { const __m256d d = _mm256_fmsub_pd(WIDEN(k), one, pivot); \
    s[k] = _mm256_add_pd(s[k], d); q[k] = _mm256_fmadd_pd(d, d, q[k]); }
#define CONVERTED(k) s[k] = _mm256_add_pd(s[k], WIDEN(k));
#define READ(k) f[k] = _mm256_add_ps(f[k], _mm256_loadu_ps(x + i + 8 * (k)));

LOOP(plain, PLAIN)
LOOP(fused, FUSED)
LOOP(converted, CONVERTED)

__attribute__((noinline)) static void just_read(const float *x, long n) {
    __m256 f[4] = {{0}};
    for (long i = 0; i < n; i += 32) { EACH(READ) }
    f[0] += f[1] + f[2] + f[3];
    sink = f[0][0] + f[0][7];
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(void) {
    const struct { const char *name; void (*run)(const float *, long); } loops[] = {
        {"plain", plain}, {"fused", fused}, {"converted", converted}, {"read", just_read}};
    const long sizes[] = {2048, 131072, 2097152, 33554432}; /* L1, L2, L3, memory */
    float *x = aligned_alloc(4096, 4 * sizes[3]);
    if (!x) return 1;
    for (long i = 0; i < sizes[3]; i++) x[i] = (float)(i * 7919 % 1000) / 1000;
    for (int k = 0; k < 4; k++) {
        double best[4] = {1e9, 1e9, 1e9, 1e9};
        for (int round = 0; round < 20; round++)
            for (int j = 0; j < 4; j++) {
                const long calls = 1 + 4000000 / sizes[k];
                const double start = now();
                for (long c = 0; c < calls; c++) loops[j].run(x, sizes[k]);
                const double t = (now() - start) / calls;
                if (t < best[j]) best[j] = t;
            }
        printf("%8ld KB:", sizes[k] * 4 / 1024);
        for (int j = 0; j < 4; j++) printf("  %s %.1f", loops[j].name, 4e-9 * sizes[k] / best[j]);
        printf(" GB/s\n");
    }
    return 0;
}
