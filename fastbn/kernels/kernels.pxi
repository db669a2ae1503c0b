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
# of this file shares the grid out to threads and takes the arrays apart.

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cython.parallel cimport parallel
from libc.stdlib cimport calloc, free
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
            forward_parameters(job, x, f0, f1, True)
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
            f0 = g * job.group
            f1 = min(job.features, f0 + job.group)
            for c in range(job.chunks if reduces else 0):
                reduce(job, a, x, c, g)
                if at_once:
                    apply(job, a, x, c, g)
            if reduces:
                finish(job, x, f0, f1)
            if applies and not at_once:
                for c in range(job.chunks - 1, -1, -1):
                    apply(job, a, x, c, g)
        return
    f0 = share(job.features, rank, size)
    f1 = share(job.features, rank + 1, size)
    first = share(job.chunks * job.groups, rank, size)
    last = share(job.chunks * job.groups, rank + 1, size)
    if reduces:
        for i in range(first, last):
            # Rows: chunk by chunk, as memory lies. Planes: feature by feature, for the same reason.
            c = i // job.groups if job.rows else i % job.chunks
            g = i % job.groups if job.rows else i // job.chunks
            reduce(job, a, x, c, g)
            if at_once:
                apply(job, a, x, c, g)
        if size > 1:
            team_barrier()
        finish(job, x, f0, f1)
        if size > 1:
            team_barrier()
    if applies and not at_once:
        for i in range(last - 1, first - 1, -1):
            c = i // job.groups if job.rows else i % job.chunks
            g = i % job.groups if job.rows else i // job.chunks
            apply(job, a, x, c, g)


cdef void run(Job *job, const Arrays *a, const pack *x) noexcept nogil:
    if job.operation == NORMALIZE or job.operation == BACKWARD or job.operation == FROZEN:
        # What is known beforehand. (The backward needs it for the mask of its activation.)
        if job.var != NULL:
            forward_parameters(job, x, 0, job.features, False)
        if job.operation == FROZEN:
            backward_parameters(job, x, 0, job.features)
    if job.threads <= 1:
        work(job, a, x, 0, 1)
        fastbn_fence()
    else:
        with parallel(num_threads=job.threads):
            work(job, a, x, team_rank(), team_size())
            fastbn_fence()


# --- From Python ----------------------------------------------------------------------------------
# Arguments arrive checked (functional.py): arrays of one native dtype, shape (outer, features,
# inner), C-contiguous and none empty; per-feature arrays float64, contiguous, of length features.

cdef void *data(object array, bint writeable=False) except? NULL:
    """Address of an array's data, or NULL for None. The caller keeps the array alive."""
    cdef Py_buffer view
    if array is None:
        return NULL
    PyObject_GetBuffer(array, &view, PyBUF_WRITABLE if writeable else PyBUF_SIMPLE)
    cdef void *address = view.buf
    PyBuffer_Release(&view)
    return address


cdef int execute(Job *job, Arrays *a, object x, int threads) except -1:
    """Cut the job, give it its scratch memory, and run it without the GIL."""
    cdef int itemsize = x.itemsize
    cdef double *scratch
    job.outer, job.features, job.inner = x.shape
    cdef Py_ssize_t n = job.features
    cut(job, itemsize, threads)
    # In place, the lines to write are in cache already.
    a.stream = (a.y != NULL and a.y != a.x and a.y != a.dy
                and job.outer * n * job.inner * itemsize > STREAM_BYTES)
    scratch = <double *> calloc((2 * job.chunks + 6) * n, sizeof(double))
    if scratch == NULL:
        raise MemoryError(f"no memory for the chunk sums of {n} features")
    job.part_a = scratch
    job.part_b = scratch + job.chunks * n
    scratch += 2 * job.chunks * n
    job.center, job.scale, job.shift = scratch, scratch + n, scratch + 2 * n
    job.slope_g, job.slope_x, job.level = scratch + 3 * n, scratch + 4 * n, scratch + 5 * n
    with nogil:
        if itemsize == 4:
            run(job, a, <const f16 *> a.x)
        else:
            run(job, a, <const d8 *> a.x)
    free(job.part_a)
    return 0


def moments(mean, m2, x, int threads):
    """mean, m2 <- the moments of x."""
    cdef Job job
    cdef Arrays a
    memset(&job, 0, sizeof(job))
    memset(&a, 0, sizeof(a))
    job.operation = MOMENTS
    job.mean = <double *> data(mean, True)
    job.m2 = <double *> data(m2, True)
    a.x = data(x)
    execute(&job, &a, x, threads)


def forward(y, mean, m2, x, residual, gamma, beta, double eps, bint relu, int threads):
    """mean, m2 <- the moments of x; y <- x normalised with them."""
    cdef Job job
    cdef Arrays a
    memset(&job, 0, sizeof(job))
    memset(&a, 0, sizeof(a))
    job.operation = FORWARD
    job.mean = <double *> data(mean, True)
    job.m2 = <double *> data(m2, True)
    job.gamma = <const double *> data(gamma)
    job.beta = <const double *> data(beta)
    job.eps = eps
    a.y = data(y, True)
    a.x = data(x)
    a.residual = data(residual)
    a.relu = relu
    execute(&job, &a, x, threads)


def normalize(y, x, residual, mean, var, gamma, beta, double eps, bint relu, int threads):
    """y <- x normalised with the statistics given."""
    cdef Job job
    cdef Arrays a
    memset(&job, 0, sizeof(job))
    memset(&a, 0, sizeof(a))
    job.operation = NORMALIZE
    job.mean = <double *> data(mean)
    job.var = <const double *> data(var)
    job.gamma = <const double *> data(gamma)
    job.beta = <const double *> data(beta)
    job.eps = eps
    a.y = data(y, True)
    a.x = data(x)
    a.residual = data(residual)
    a.relu = relu
    execute(&job, &a, x, threads)


def backward(dx, dresidual, sum_g, sum_gx, dy, x, residual, mean, var, gamma, beta, double eps,
             bint relu, bint training, int threads):
    """sum_g, sum_gx <- sum(g), sum(g (x - mean)), g = dy masked by relu; dx, and dresidual <- g."""
    cdef Job job
    cdef Arrays a
    memset(&job, 0, sizeof(job))
    memset(&a, 0, sizeof(a))
    job.operation = BACKWARD if training else FROZEN
    a.frozen = not training
    job.mean = <double *> data(mean)
    job.var = <const double *> data(var)
    job.gamma = <const double *> data(gamma)
    job.beta = <const double *> data(beta)
    job.eps = eps
    job.sum_g = <double *> data(sum_g, True)
    job.sum_gx = <double *> data(sum_gx, True)
    a.y = data(dx, True)
    a.dresidual = data(dresidual, True)
    a.dy = data(dy)
    a.x = data(x)
    a.residual = data(residual)
    a.relu = relu
    execute(&job, &a, x, threads)
