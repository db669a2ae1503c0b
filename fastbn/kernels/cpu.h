/* What the CPU and the operating system can run, asked by CPUID and XGETBV before any module
 * with wider instructions is imported. Compiled for the baseline of the platform. */
#ifndef FASTBN_CPU_H
#define FASTBN_CPU_H

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
static int cpu_has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static int cpu_has_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           cpu_has_avx2();
}
#elif defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
static int cpu_has(unsigned long long xcr0, int ecx1, int ebx7) {
    int r[4];
    __cpuidex(r, 1, 0);
    if (!(r[2] & (1 << 27)) || (r[2] & ecx1) != ecx1) return 0; /* bit 27: OSXSAVE */
    if ((_xgetbv(0) & xcr0) != xcr0) return 0;
    __cpuidex(r, 7, 0);
    return (r[1] & ebx7) == ebx7;
}
static int cpu_has_avx2(void) { return cpu_has(0x6, (1 << 28) | (1 << 12), 1 << 5); }
static int cpu_has_avx512(void) {
    return cpu_has(0xe6, (1 << 28) | (1 << 12),
                   (1 << 5) | (1 << 16) | (1 << 17) | (1 << 30) | (int)(1u << 31));
}
#else
static int cpu_has_avx2(void) { return 0; }
static int cpu_has_avx512(void) { return 0; }
#endif

#endif
