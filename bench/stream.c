/* The fastest plain passes over memory that a C compiler gives: what `limit.py` measures against.
 *
 * read_pass         a sum of 64-bit integers: one load and one add, many in flight
 * copy_pass         ordinary stores: each line of y is read from memory before it is overwritten
 * copy_pass_bypass  stores that bypass the cache: y is written only
 *
 * Each takes a distance: how many lines ahead to prefetch into the second-level cache, 0 for what the
 * hardware does by itself. Which is faster depends on the machine, so limit.py tries both.
 *
 * Work is cut into one contiguous range per thread. n counts 64-byte lines; x and y are aligned to
 * 64 bytes. Built by limit.py with -O3 -march=native -fopenmp.
 */
#include <omp.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef uint64_t line __attribute__((vector_size(64)));

static void range(int64_t n, int64_t *first, int64_t *last)
{
    int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
    *first = n * id / count;
    *last = n * (id + 1) / count;
}

uint64_t read_pass(const line *x, int64_t n, int threads, int64_t ahead)
{
    uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        int64_t i, last;
        line s[4] = {{0}};
        range(n, &i, &last);
        for (; i + 4 <= last; i += 4) {
            for (int k = 0; ahead && k < 4; k++)
                __builtin_prefetch(&x[i + k + ahead], 0, 2);
            s[0] += x[i];
            s[1] += x[i + 1];
            s[2] += x[i + 2];
            s[3] += x[i + 3];
        }
        for (; i < last; i++)
            s[0] += x[i];
        s[0] += s[1] + s[2] + s[3];
        for (int j = 0; j < 8; j++)
            total += s[0][j];
    }
    return total;
}

void copy_pass(line *restrict y, const line *restrict x, int64_t n, int threads, int64_t ahead)
{
#pragma omp parallel num_threads(threads)
    {
        int64_t i, last;
        range(n, &i, &last);
        if (ahead) {
            for (; i < last; i++) {
                __builtin_prefetch(&x[i + ahead], 0, 2);
                y[i] = x[i];
            }
        }
        for (; i < last; i++)
            y[i] = x[i];
    }
}

static void store_bypassing(line *y, line value)
{
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)y, (__m512i)value);
#elif defined(__AVX__)
    const __m256i *half = (const __m256i *)&value;
    _mm256_stream_si256((__m256i *)y, half[0]);
    _mm256_stream_si256((__m256i *)y + 1, half[1]);
#elif defined(__SSE2__)
    const __m128i *quarter = (const __m128i *)&value;
    for (int k = 0; k < 4; k++)
        _mm_stream_si128((__m128i *)y + k, quarter[k]);
#else
    *y = value; /* no such store: the same as copy_pass */
#endif
}

void copy_pass_bypass(line *restrict y, const line *restrict x, int64_t n, int threads,
                      int64_t ahead)
{
#pragma omp parallel num_threads(threads)
    {
        int64_t i, last;
        range(n, &i, &last);
        for (; i < last; i++) {
            if (ahead)
                __builtin_prefetch(&x[i + ahead], 0, 2);
            store_bypassing(&y[i], x[i]);
        }
#if defined(__SSE2__)
        _mm_sfence();
#endif
    }
}
