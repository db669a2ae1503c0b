# What Python calls. Each call takes *ordinary* arguments and answers None to any others, before
# anything is written; functional.py then checks and rearranges them, and calls again. So small
# arrays pay for one compiled look at their arguments, and every odd case is handled in Python.
#
# Ordinary: NumPy arrays of native float32 or float64, dense (C order or a transposition of it), at
# most MAX_DIMS dimensions and not empty; arrays of x's shape have x's dtype and strides; a result
# shares memory with another array either exactly or not at all; arrays per feature have shape
# (features,) and no gaps; axis is an int in range, eps a float >= 0.

include "operands.pxi"

cdef enum:
    VECTORS = 4         # per-feature arguments of a call: gamma, beta, mean, var
    TABLE = 4           # rows of a Moments' table: count, mean, m2, and the mean's low-order part

cdef struct Call:
    Job job
    Arrays a
    Operand x
    int axis                        # of the features in x
    int extreme
    char *memory                    # scratch
    double *vectors                 # room for a mean and a variance of float32
    Operand given[VECTORS]          # those that are read where they are


cdef bint begin(Call *call, Operation operation, x, axis, eps, activation, int threads) except -1:
    """Set up a call for x. The first thing that every call does, so that `release` has its due."""
    cdef Py_ssize_t feature_axis
    cdef int order[MAX_DIMS]
    cdef int k
    cdef bint before = True
    cdef Job *job = &call.job
    memset(call, 0, sizeof(Call))
    if not read(x, &call.x) or type(axis) is not int or type(eps) is not float:
        return False
    if activation is not None and not (type(activation) is str and activation == "relu"):
        return False
    # One dimension is N samples of one feature, for any axis that two dimensions could have.
    if not 0 <= eps <= DBL_MAX or not -call.x.ndim <= axis < max(call.x.ndim, 2):
        return False
    if not dense(&call.x, order):
        return False
    job.operation = operation
    job.eps = eps
    call.a.x = call.x.data
    call.a.relu = activation is not None
    feature_axis = axis
    if feature_axis < 0:
        feature_axis += call.x.ndim
    call.axis = <int> feature_axis
    job.outer = job.features = job.inner = 1
    if call.x.ndim == 1 or call.x.shape[feature_axis] == 1:
        job.inner = call.x.size
    else:
        # In the order of memory: samples may be taken in any.
        for k in range(call.x.ndim):
            if order[k] == feature_axis:
                job.features = call.x.shape[feature_axis]
                before = False
            elif before:
                job.outer *= call.x.shape[order[k]]
            else:
                job.inner *= call.x.shape[order[k]]
    job.n = job.outer * job.inner
    job.threads = threads
    return True


cdef void *allocate(size_t size) except NULL:
    """Memory that is not cleared: what is not used is not touched."""
    cdef void *memory = malloc(size)
    if memory == NULL:
        raise MemoryError(f"no memory for {size} bytes of sums and parameters")
    return memory


cdef bint reserve(Call *call) except -1:
    """Cut the job and give it its scratch memory."""
    cdef Job *job = &call.job
    cut(job, call.x.itemsize, team_limit(job.threads, usual_threads), call.a.y, chosen(call.a))
    cdef Py_ssize_t n = job.features, parameters = (n * call.x.itemsize + 63) // 64 * 64
    cdef Py_ssize_t chunks = 0
    if job.operation != NORMALIZE:
        chunks = (4 if chosen(call.a) else 2) * job.chunks
    call.memory = <char *> allocate(chunks * n * sizeof(double) + 7 * parameters)
    job.center = call.memory
    job.scale = call.memory + parameters
    job.shift = call.memory + 2 * parameters
    job.slope_g = call.memory + 3 * parameters
    job.slope_x = call.memory + 4 * parameters
    job.level = call.memory + 5 * parameters
    job.unit = call.memory + 6 * parameters
    job.extreme = &call.extreme
    job.part_a = <double *> (call.memory + 7 * parameters)
    job.part_b = job.part_a + job.chunks * n
    job.part_n = job.part_b + job.chunks * n
    job.part_pivot = job.part_n + job.chunks * n
    return True


cdef void release(Call *call) noexcept:
    free(call.memory)
    free(call.vectors)


cdef bint like_x(Call *call, object array, const void **where) except -1:
    """Take an array of x's shape, dtype and strides, or None for none."""
    cdef Operand o
    cdef int k
    if array is None:
        return True
    if not read(array, &o) or o.itemsize != call.x.itemsize or o.ndim != call.x.ndim:
        return False
    for k in range(o.ndim):
        if o.shape[k] != call.x.shape[k] or width(&o, k) != width(&call.x, k):
            return False
    where[0] = o.data
    return True


cdef object result(Call *call, object x, object out, const void *in1, const void *in2):
    """`out`, or a new array, as where the result goes; None if `out` is not ordinary.

    Where `out` is given it may be x, `in1` or `in2` exactly; otherwise it must not touch them.
    """
    cdef Operand o
    cdef Operand other = call.x
    cdef const void *inputs[3]
    cdef int k
    if out is None:
        out = new_like(x)                       # in x's memory order
        # Another thread may have given x a new shape while the weights were looked at.
        return out if like_x(call, out, <const void **> &call.a.y) else None
    if not read(out, &o) or o.readonly or not like_x(call, out, <const void **> &call.a.y):
        return None
    inputs[0], inputs[1], inputs[2] = call.a.x, in1, in2
    for k in range(3):
        other.data = <char *> inputs[k]
        if other.data != NULL and not same_memory_or_none(&o, &other):
            return None
    for k in range(VECTORS):
        if call.given[k].data != NULL and not apart(&o, &call.given[k]):
            return None
    other.size, other.itemsize = <Py_ssize_t> call.job.n, sizeof(double)
    other.data = <char *> call.a.weights
    if other.data != NULL and not apart(&o, &other):
        return None
    other.itemsize, other.data = 1, <char *> call.a.where
    if other.data != NULL and not apart(&o, &other):
        return None
    return out


cdef bint per_feature(Call *call, object array, int slot, Vector *vector) except -1:
    """Take an argument of shape (features,), float32 or float64, or None for none."""
    cdef Operand *o = &call.given[slot]
    if array is None:
        return True
    if (not read(array, o) or o.ndim != 1 or o.size != call.job.features
            or not contiguous(o)):
        return False
    if o.itemsize == 4:
        vector.floats = <float *> o.data
    else:
        vector.doubles = <double *> o.data
    return True


cdef double *as_doubles(Call *call, Vector vector, int slot) noexcept:
    """A float64 vector itself, or one of float32 converted in its slot of call.vectors."""
    cdef Py_ssize_t f, n = call.job.features
    if vector.doubles != NULL:
        return <double *> vector.doubles
    cdef double *room = call.vectors + slot * n
    for f in range(n):
        room[f] = vector.floats[f]
    return room


cdef bint statistics(Call *call, object mean, object var) except -1:
    """Take (mean, var), or the table of a Moments and None."""
    cdef Operand o
    cdef Py_ssize_t f, negative = 0, n = call.job.features
    cdef Vector[2] given
    memset(given, 0, sizeof(given))
    if var is not None:
        if (mean is None or not per_feature(call, mean, 2, &given[0])
                or not per_feature(call, var, 3, &given[1])):
            return False
        if given[0].floats != NULL or given[1].floats != NULL:
            call.vectors = <double *> allocate(2 * n * sizeof(double))
        call.job.n = 1
        call.job.mean = as_doubles(call, given[0], 0)
        call.job.m2 = as_doubles(call, given[1], 1)
        for f in range(n):
            negative += call.job.m2[f] < 0
        return negative == 0
    if not read_table(mean, &o) or o.shape[1] != n:
        return False
    call.job.count = <double *> o.data
    call.job.mean = <double *> o.data + n
    call.job.m2 = <double *> o.data + 2 * n
    call.job.low = <double *> o.data + 3 * n
    return True


cdef bint read_table(object array, Operand *o) noexcept:
    """Look at a table of Moments; whether it is one. It may have no features."""
    o.ndim = o.itemsize = 0
    read(array, o)
    return (o.ndim == 2 and o.itemsize == 8 and o.shape[0] == TABLE
            and (o.size == 0 or contiguous(o)))


cdef bint by_sample_array(Call *call, object array, int dtype, void **where) except -1:
    """Take an array of `dtype` with x's shape but for the feature axis, both in C order."""
    cdef np.ndarray a
    cdef int k, n = 0
    if array is None:
        return True
    if not np.PyArray_CheckExact(array) or not contiguous(&call.x):
        return False
    a = array
    if (np.PyArray_TYPE(a) != dtype or not np.PyArray_ISCARRAY_RO(a)
            or np.PyArray_NDIM(a) != max(1, call.x.ndim - 1)):
        return False
    for k in range(call.x.ndim):
        if k != call.axis or call.x.ndim == 1:
            if np.PyArray_DIM(a, n) != call.x.shape[k]:
                return False
            n += 1
    where[0] = np.PyArray_DATA(a)
    return True


cdef bint samples(Call *call, object weights, object where, bint omit) except -1:
    """Take weights, 0 wherever the mask is False, and the mask; or None for none."""
    call.a.omit = omit
    return (by_sample_array(call, weights, np.NPY_FLOAT64, <void **> &call.a.weights)
            and by_sample_array(call, where, np.NPY_BOOL, <void **> &call.a.where)
            and (weights is None or weights_fit(weights)))


cdef bint fit(const double *weights, Py_ssize_t n) noexcept nogil:
    """Whether all are >= 0, and their sum is finite."""
    cdef Py_ssize_t i
    cdef d8 value, total = d8_splat(0), zero = d8_splat(0)
    cdef int negative = 0, k
    for i in range(0, n, 8):
        k = <int> min(8, n - i)
        value = load(<d8 *> weights, i, k)
        negative |= d8_any_less(value, zero)
        total = add(total, value)
    return not negative and isfinite(d8_sum(total))


cdef bint compute(Call *call) except -1:
    """Run the call without the GIL."""
    cdef Arrays *a = &call.a
    reserve(call)
    # In place, the lines to write are in cache already.
    a.stream = (a.y != NULL and a.y != a.x and a.y != a.dy
                and call.x.size * call.x.itemsize > STREAM_BYTES)
    with nogil:
        if call.x.itemsize == 4:
            run(&call.job, a, <const f16 *> a.x)
        else:
            run(&call.job, a, <const d8 *> a.x)
    return True


cdef object new_table(Call *call):
    """A table for Moments, and the job's statistics in it."""
    cdef Operand o
    cdef Py_ssize_t f, n = call.job.features
    table = new_array(2, TABLE, n)
    read(table, &o)
    for f in range(n):
        (<double *> o.data)[f] = call.job.n
    call.job.mean = <double *> o.data + n
    call.job.m2 = <double *> o.data + 2 * n
    call.job.low = <double *> o.data + 3 * n
    if chosen(call.a):
        call.job.count = <double *> o.data
    return table


def moments(x, axis, int threads, weights=None, where=None, bint omit=False):
    """The table of x's Moments; None if an argument is not ordinary."""
    cdef Call call
    try:
        if not (begin(&call, MOMENTS, x, axis, 0.0, None, threads)
                and samples(&call, weights, where, omit)):
            return None
        table = new_table(&call)
        compute(&call)
        return table
    finally:
        release(&call)


def forward(x, gamma, beta, axis, eps, out, activation, residual, int threads, weights=None,
            where=None, bint omit=False):
    """(y, table) of the training forward; None if an argument is not ordinary."""
    cdef Call call
    try:
        if not (begin(&call, FORWARD, x, axis, eps, activation, threads)
                and per_feature(&call, gamma, 0, &call.job.gamma)
                and per_feature(&call, beta, 1, &call.job.beta)
                and like_x(&call, residual, &call.a.residual)
                and samples(&call, weights, where, omit)):
            return None
        y = result(&call, x, out, call.a.residual, NULL)
        if y is None:
            return None
        table = new_table(&call)
        compute(&call)
        return y, table
    finally:
        release(&call)


def normalize(x, mean, var, gamma, beta, axis, eps, out, activation, residual, int threads,
              where=None, bint omit=False):
    """y, normalised with given statistics; None if an argument is not ordinary."""
    cdef Call call
    try:
        if not (begin(&call, NORMALIZE, x, axis, eps, activation, threads)
                and statistics(&call, mean, var)
                and per_feature(&call, gamma, 0, &call.job.gamma)
                and per_feature(&call, beta, 1, &call.job.beta)
                and like_x(&call, residual, &call.a.residual)
                and samples(&call, None, where, omit)):
            return None
        y = result(&call, x, out, call.a.residual, NULL)
        if y is not None:
            compute(&call)
        return y
    finally:
        release(&call)


def backward(dy, x, mean, var, gamma, beta, axis, eps, bint training, out, activation, residual,
             int threads, weights=None, where=None, bint omit=False, total=None):
    """(dx, dgamma, dbeta, dresidual or None); None if an argument is not ordinary."""
    cdef Call call
    cdef Operand o
    try:
        if not (begin(&call, BACKWARD if training else FROZEN, x, axis, eps, activation, threads)
                and dy is not None
                and statistics(&call, mean, var)
                and per_feature(&call, gamma, 0, &call.job.gamma)
                and per_feature(&call, beta, 1, &call.job.beta)
                and like_x(&call, dy, &call.a.dy)
                and like_x(&call, residual, &call.a.residual)
                and samples(&call, weights, where, omit)):
            return None
        if not training:                        # when weights have no part in anything
            call.a.weights = NULL
        if training and chosen(call.a):
            if total is not None:               # Moments.count, or one like it
                if (not read(total, &o) or o.itemsize != 8 or o.ndim != 1
                        or o.size != call.job.features or not contiguous(&o)):
                    return None
                call.job.total = <double *> o.data
            elif var is None:
                call.job.total = call.job.count
            else:
                return None
        dx = result(&call, x, out, call.a.dy, call.a.residual)
        if dx is None:
            return None
        dresidual = None
        if residual is not None:
            dresidual = new_like(x)
            if not like_x(&call, dresidual, <const void **> &call.a.dresidual):
                return None
        call.a.frozen = not training
        dgamma, dbeta = new_array(1, 1, call.job.features), new_array(1, 1, call.job.features)
        read(dgamma, &o)
        call.job.dgamma = <double *> o.data
        read(dbeta, &o)
        call.job.dbeta = <double *> o.data
        compute(&call)
        return dx, dgamma, dbeta, dresidual
    finally:
        release(&call)


def weights_fit(np.ndarray weights):
    """`fit`, of a dense float64 array."""
    cdef const double *w = <double *> np.PyArray_DATA(weights)
    cdef Py_ssize_t n = np.PyArray_SIZE(weights)
    cdef bint all_fit
    with nogil:
        all_fit = fit(w, n)
    return all_fit


def plan(Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int itemsize, int threads):
    """How a job of this shape is cut, for tests and for the curious."""
    cdef Job job
    if min(outer, features, inner, threads) < 1 or itemsize not in (4, 8):
        raise ValueError("expected sizes and threads >= 1, and an itemsize of 4 or 8")
    memset(&job, 0, sizeof(Job))
    job.outer, job.features, job.inner = outer, features, inner
    cut(&job, itemsize, threads, NULL, False)
    names = "rows", "fold", "rest", "chunks", "group", "groups", "threads", "own"
    return dict(zip(names, (bool(job.rows), job.fold, job.rest, job.chunks, job.group, job.groups,
                            job.threads, bool(job.own))))
