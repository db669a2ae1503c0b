# The kernels, one source for every instruction set: _generic.pyx, _avx2.pyx and _avx512.pyx
# include this file and are compiled with their own flags (see setup.py).
#
# Every operation is the same three steps over a grid of feature groups and sample chunks:
#
#     reduce   a chunk of x (and dy) to two numbers per feature       rows.pxi, planes.pxi
#     finish   merge a feature's chunks in order, derive parameters   features.pxi
#     apply    one multiply-add per element, with those parameters    rows.pxi, planes.pxi
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

include "job.pxi"
include "features.pxi"
include "elements.pxi"
include "rows.pxi"
include "planes.pxi"

simd = (<bytes> FASTBN_SIMD).decode()
openmp = FASTBN_OPENMP


# --- One step on one piece ------------------------------------------------------------------------

cdef inline void reduce(const Job *job, const Arrays *a, const pack *x, Py_ssize_t c,
                        Py_ssize_t g) noexcept nogil:
    if job.operation == MOMENTS or job.operation == FORWARD:
        if job.rows:
            moments_rows(job, x, c, g)
        else:
            moments_planes(job, x, c, g)
    else:
        if job.rows:
            gradients_rows(job, a[0], x, c, g)
        else:
            gradients_planes(job, a[0], x, c, g)


cdef inline void finish(const Job *job, const pack *x, Py_ssize_t f0, Py_ssize_t f1) noexcept nogil:
    if job.operation == MOMENTS or job.operation == FORWARD:
        merge_chunks(job, x, f0, f1)
        if job.operation == FORWARD:
            forward_parameters(job, x, f0, f1)
    else:
        merge_gradients(job, f0, f1)
        backward_parameters(job, x, f0, f1)


cdef inline void apply(const Job *job, const Arrays *a, const pack *x, Py_ssize_t c,
                       Py_ssize_t g) noexcept nogil:
    if job.operation == FORWARD or job.operation == NORMALIZE:
        if job.rows:
            forward_rows(job, a[0], x, c, g)
        else:
            forward_planes(job, a[0], x, c, g)
    else:
        if job.rows:
            backward_rows(job, a[0], x, c, g)
        else:
            backward_planes(job, a[0], x, c, g)


# --- The schedule ---------------------------------------------------------------------------------

cdef inline void piece_of(const Job *job, Py_ssize_t i, Py_ssize_t *c,
                          Py_ssize_t *g) noexcept nogil:
    """Chunk and group of the i-th piece of work: as memory lies, but for planes feature by feature.

    A plane's chunks are read again when its statistics are known, and may be in cache then.
    """
    if job.rows or job.operation == NORMALIZE:
        c[0], g[0] = i // job.groups, i % job.groups
    else:
        c[0], g[0] = i % job.chunks, i // job.chunks


cdef inline void prepare(const Job *job, const pack *x, Py_ssize_t f0,
                         Py_ssize_t f1) noexcept nogil:
    """Parameters that need nothing reduced; the backward's, for the mask of its activation."""
    if job.operation != MOMENTS and job.operation != FORWARD:
        forward_parameters(job, x, f0, f1)
        if job.operation == FROZEN:
            backward_parameters(job, x, f0, f1)


cdef void work(const Job *job, const Arrays *a, const pack *x, int rank, int size) noexcept nogil:
    """One thread's part of a job. Which thread does what changes no result."""
    cdef Py_ssize_t c, g, i, f0, f1, first, last
    cdef bint reduces = job.operation != NORMALIZE
    cdef bint applies = job.operation != MOMENTS
    # Frozen gradients need no sums, so that dx is made while dy is still in cache.
    cdef bint at_once = job.operation == FROZEN
    if job.own:
        # Group by group: its data are still in cache when they are read again, backwards
        # because the end is what was read last.
        for g in range(share(job.groups, rank, size), share(job.groups, rank + 1, size)):
            f0, f1 = first_of(job, g), first_of(job, g + 1)
            prepare(job, x, f0, f1)
            for c in range(job.chunks):
                reduce(job, a, x, c, g)
                if at_once:
                    apply(job, a, x, c, g)
            finish(job, x, f0, f1)
            if applies and not at_once:
                for c in range(job.chunks - 1, -1, -1):
                    apply(job, a, x, c, g)
        return
    f0, f1 = share(job.features, rank, size), share(job.features, rank + 1, size)
    first = share(job.chunks * job.groups, rank, size)
    last = share(job.chunks * job.groups, rank + 1, size)
    prepare(job, x, f0, f1)
    if size > 1 and job.operation != MOMENTS and job.operation != FORWARD:
        team_barrier()
    if reduces:
        for i in range(first, last):
            piece_of(job, i, &c, &g)
            reduce(job, a, x, c, g)
            if at_once:
                apply(job, a, x, c, g)
        if size > 1:
            team_barrier()
        finish(job, x, f0, f1)
        if size > 1 and applies:
            team_barrier()
    if applies and not at_once:
        for i in range(last - 1, first - 1, -1):
            piece_of(job, i, &c, &g)
            apply(job, a, x, c, g)


cdef void run(Job *job, const Arrays *a, const pack *x) noexcept nogil:
    if job.threads <= 1:
        work(job, a, x, 0, 1)
        fastbn_fence()
    else:
        with parallel(num_threads=job.threads):
            work(job, a, x, team_rank(), team_size())
            fastbn_fence()


include "calls.pxi"
