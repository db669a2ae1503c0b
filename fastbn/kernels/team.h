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
static int team_default(void) { return omp_get_max_threads(); }
/* How many of so many threads OpenMP lets this thread have. `usual` is what a thread has whose
 * number nobody lowered, and less than that holds whatever was asked for. */
static int team_limit(int threads, int usual) {
    int now;
    if (threads <= 1) return 1; /* in a forked child nothing is asked of OpenMP */
    now = omp_get_max_threads();
#if _OPENMP >= 200805
    if (omp_get_active_level() >= omp_get_max_active_levels()) return 1;
    if (threads > omp_get_thread_limit()) threads = omp_get_thread_limit();
#endif
    return now < usual && now < threads ? now : threads;
}
#else
#define FASTBN_OPENMP 0
static int team_rank(void) { return 0; }
static int team_size(void) { return 1; }
static void team_barrier(void) {}
static int team_default(void) { return 1; }
static int team_limit(int threads, int usual) { return threads; }
#endif

#if defined(_OPENMP) && !defined(_WIN32)
#include <dlfcn.h>
/* Ends the threads that wait for this one's next team. Looked up by name: an OpenMP that is older
 * than this word of it may be in the process already, and could not be linked to. */
static void team_dismiss(void) {
    int (*pause)(int) = (int (*)(int))dlsym(RTLD_DEFAULT, "omp_pause_resource_all");
    if (pause) pause(1); /* omp_pause_soft */
}
#else
static void team_dismiss(void) {}
#endif

#endif
