# The kernels, one source for every instruction set: _generic.pyx, _avx2.pyx and _avx512.pyx
# include this file and are compiled with their own flags (see setup.py).
#
# Every operation is the same three steps over a grid of feature groups and sample chunks:
#
#     reduce   a chunk of x (and dy) to two numbers per feature       rows.pxi, planes.pxi
#     finish   merge a feature's chunks in order, derive parameters   features.pxi
#     apply    one multiply-add per element, with those parameters    rows_elements.pxi, planes.pxi
#
# Samples may have weights, and samples or NaN may be left out: samples.pxi, and weighted*.pxi for
# what is then reduced and merged.
#
# Moments reduce and finish, inference finishes and applies, training does all three. The rest
# of this file shares the grid out to threads; calls.pxi is what Python calls.

from cython.parallel cimport parallel
from libc.string cimport memcpy, memset

from fastbn.kernels.simd cimport *

cdef extern from "team.h" nogil:
    const int FASTBN_OPENMP
    int team_rank()
    int team_size()
    void team_barrier()
    int team_default()
    int team_limit(int threads, int usual)
    void team_dismiss()

include "job.pxi"
include "rows.pxi"
include "samples.pxi"
include "features.pxi"
include "elements.pxi"
include "rows_elements.pxi"
include "planes.pxi"
include "weighted.pxi"
include "weighted_rows.pxi"
include "weighted_planes.pxi"

include "threads.pxi"

simd = (<bytes> FASTBN_SIMD).decode()
openmp = FASTBN_OPENMP


# --- One step on one piece ------------------------------------------------------------------------

cdef inline void reduce(const Job *job, const Arrays *a, const pack *x, Py_ssize_t c,
                        Py_ssize_t g) noexcept nogil:
    if job.operation == MOMENTS or job.operation == FORWARD:
        if chosen(a[0]):
            if job.rows:
                weighted_rows(job, a[0], x, c, g)
            else:
                weighted_planes(job, a[0], x, c, g)
        elif job.rows:
            moments_rows(job, x, c, g)
        else:
            moments_planes(job, x, c, g)
    else:
        if job.rows:
            gradients_rows(job, a[0], x, c, g)
        else:
            gradients_planes(job, a[0], x, c, g)


cdef inline void finish(const Job *job, const Arrays *a, const pack *x, Py_ssize_t f0,
                        Py_ssize_t f1) noexcept nogil:
    cdef Py_ssize_t f = f0, end
    while f < f1:
        end = min(f + MERGED, f1)
        if job.operation != MOMENTS and job.operation != FORWARD:
            merge_gradients(job, f, end)
        elif chosen(a[0]):
            merge_weighted(job, a[0], x, f, end)
        else:
            merge_chunks(job, a[0], x, f, end)
        f = end
    if job.operation == FORWARD:
        forward_parameters(job, x, f0, f1)
    elif job.operation != MOMENTS:
        backward_parameters(job, x, f0, f1)


cdef inline void apply_rows(const Job *job, const Arrays *a, const pack *x,
                            Tile t) noexcept nogil:
    if job.operation == FORWARD or job.operation == NORMALIZE:
        forward_rows(job, a[0], x, t)
    else:
        backward_rows(job, a[0], x, t)


cdef inline void apply(const Job *job, const Arrays *a, const pack *x, Py_ssize_t c,
                       Py_ssize_t g) noexcept nogil:
    if job.rows:
        apply_rows(job, a, x, tile_of(job, c, g))
    elif job.operation == FORWARD or job.operation == NORMALIZE:
        forward_planes(job, a[0], x, c, g)
    else:
        backward_planes(job, a[0], x, c, g)


# --- The schedule ---------------------------------------------------------------------------------

cdef inline void piece_of(const Job *job, Py_ssize_t i, Py_ssize_t *c,
                          Py_ssize_t *g) noexcept nogil:
    """Chunk and group of the i-th piece of work: as memory lies, but for planes feature by feature.

    A plane's chunks are read again when its statistics are known, and may be in cache then. If
    they are not, chunk by chunk makes all features use the same weights while these are in cache.
    """
    if job.rows or job.operation == NORMALIZE or (job.operation == MOMENTS and job.shared):
        c[0], g[0] = i // job.groups, i % job.groups
    else:
        c[0], g[0] = i % job.chunks, i // job.chunks


cdef inline void prepare(const Job *job, const Arrays *a, const pack *x, Py_ssize_t f0,
                         Py_ssize_t f1) noexcept nogil:
    """Parameters that need nothing reduced; the backward's, for the mask of its activation."""
    if job.operation != MOMENTS and job.operation != FORWARD:
        forward_parameters(job, x, f0, f1)
        if job.operation == FROZEN:
            backward_parameters(job, x, f0, f1)
            if chosen(a[0]):
                look_for_data(job, a[0], x, f0, f1)


cdef void work_by_features(const Job *job, const Arrays *a, const pack *x, int rank,
                           int size) noexcept nogil:
    """Group by group: nobody waits, and a group's data are in cache when they are read again,
    backwards because the end is what was read last."""
    cdef Py_ssize_t c, g, f0, f1
    for g in range(share(job.groups, rank, size), share(job.groups, rank + 1, size)):
        f0, f1 = first_of(job, g), first_of(job, g + 1)
        prepare(job, a, x, f0, f1)
        if job.operation != NORMALIZE:
            for c in range(job.chunks):
                reduce(job, a, x, c, g)
                # Frozen gradients need no sums, so that dx is made while dy is still in cache.
                if job.operation == FROZEN:
                    apply(job, a, x, c, g)
            finish(job, a, x, f0, f1)
        if job.operation != MOMENTS and job.operation != FROZEN:
            for c in range(job.chunks - 1, -1, -1):
                apply(job, a, x, c, g)


cdef void apply_whole_rows(const Job *job, const Arrays *a, const pack *x, Py_ssize_t r0,
                           Py_ssize_t r1) noexcept nogil:
    """Rows [r0, r1), as wide as parameters by column allow.

    Written in a tile's short pieces of rows, with a jump after each, (20000, 1000) took 1.4 times
    as long for all of the forward.
    """
    cdef Py_ssize_t f = 0
    cdef Py_ssize_t wide = WIDE if job.fold == 1 and job.inner == 1 else job.group
    while f < job.features:
        apply_rows(job, a, x, tile_of_rows(job, r0, r1, f, min(f + wide, job.features)))
        f += wide


cdef void write_rows(const Job *job, const Arrays *a, const pack *x, int rank,
                     int size) noexcept nogil:
    """One thread's rows, the last block first, as in `work_by_features`."""
    cdef Py_ssize_t first = share(job.length, rank, size), r0
    cdef Py_ssize_t r1 = share(job.length, rank + 1, size)
    while r1 > first:
        r0 = max(first, r1 - max(1, CHUNK // min(job.width, WIDE)))
        apply_whole_rows(job, a, x, r0, r1)
        r1 = r0


cdef void frozen_rows(const Job *job, const Arrays *a, const pack *x, int rank,
                      int size) noexcept nogil:
    """Chunk by chunk: sums, and dx while dy is still in cache, which needs no sums."""
    cdef Py_ssize_t c, g
    for c in range(share(job.chunks, rank, size), share(job.chunks, rank + 1, size)):
        for g in range(job.groups):
            reduce(job, a, x, c, g)
        apply_whole_rows(job, a, x, c * job.chunk, min((c + 1) * job.chunk, job.length))


cdef void work_together(const Job *job, const Arrays *a, const pack *x, int rank,
                        int size) noexcept nogil:
    """Step by step, each shared by all threads, with a barrier after each."""
    cdef Py_ssize_t c, g, i
    cdef Py_ssize_t f0 = share(job.features, rank, size), f1 = share(job.features, rank + 1, size)
    cdef Py_ssize_t first = share(job.chunks * job.groups, rank, size)
    cdef Py_ssize_t last = share(job.chunks * job.groups, rank + 1, size)
    prepare(job, a, x, f0, f1)
    if size > 1 and job.operation != MOMENTS and job.operation != FORWARD:
        team_barrier()
    if job.operation == FROZEN and job.rows:
        frozen_rows(job, a, x, rank, size)
    elif job.operation != NORMALIZE:
        for i in range(first, last):
            piece_of(job, i, &c, &g)
            reduce(job, a, x, c, g)
            if job.operation == FROZEN:
                apply(job, a, x, c, g)
    if job.operation != NORMALIZE:
        if size > 1:
            team_barrier()
        finish(job, a, x, f0, f1)
    if job.operation == MOMENTS or job.operation == FROZEN:
        return
    if size > 1 and job.operation != NORMALIZE:
        team_barrier()
    if job.rows:
        write_rows(job, a, x, rank, size)
    elif job.operation == NORMALIZE:                # as memory lies: nothing was read before
        for i in range(first, last):
            piece_of(job, i, &c, &g)
            apply(job, a, x, c, g)
    else:
        for i in range(last - 1, first - 1, -1):
            piece_of(job, i, &c, &g)
            apply(job, a, x, c, g)


cdef void work(const Job *job, const Arrays *a, const pack *x, int rank, int size) noexcept nogil:
    """One thread's part of a job. Which thread does what changes no result."""
    if job.own:
        work_by_features(job, a, x, rank, size)
    else:
        work_together(job, a, x, rank, size)
    fastbn_fence()


cdef void run(Job *job, const Arrays *a, const pack *x) noexcept nogil:
    if job.threads <= 1:
        work(job, a, x, 0, 1)
    else:
        with parallel(num_threads=job.threads):
            work(job, a, x, team_rank(), team_size())


include "calls.pxi"
include "tables.pxi"
