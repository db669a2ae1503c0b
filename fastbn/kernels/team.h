/* The few words of OpenMP that the kernels use; without OpenMP a team is one thread. */
#ifndef FASTBN_TEAM_H
#define FASTBN_TEAM_H

#ifdef _OPENMP
#include <omp.h>
#define FASTBN_OPENMP _OPENMP
static int team_rank(void) { return omp_get_thread_num(); }
static int team_size(void) { return omp_get_num_threads(); }
static void team_barrier(void) {
#pragma omp barrier
}
#else
#define FASTBN_OPENMP 0
static int team_rank(void) { return 0; }
static int team_size(void) { return 1; }
static void team_barrier(void) {}
#endif

#endif
