# What is done per feature: chunk sums become moments, moments become parameters.

cdef extern from "math.h" nogil:
    double sqrt(double)
    double fabs(double)
    int isfinite(double)


cdef inline double finite_or_zero(double value) noexcept nogil:
    return value if isfinite(value) else 0.0


cdef inline double origin(const Job *job, const pack *x, Py_ssize_t f) noexcept nogil:
    """The value that the means of feature f's chunks are kept relative to: its first element.

    A mean of 1e7 has no digits left for the differences between chunk means that Chan's
    formula needs; the same mean as an offset from a value in the data has all of them.
    """
    return finite_or_zero(element(x, f * job.inner))


cdef inline bint close_chunk(double sum1, double sum2, double n, double *offset,
                             double *m2) noexcept nogil:
    """Moments of a chunk from its sums of (x - pivot) and (x - pivot)^2.

    True if they should be summed again about `pivot + offset`: m2 = sum2 - sum1^2 / n cancels
    when the pivot is far from the mean (here: more than 6 bits lost), which happens where the
    first element of a chunk is an outlier.
    """
    offset[0] = sum1 / n
    m2[0] = sum2 - sum1 * offset[0]
    cdef bint cancelled = m2[0] * 64 < sum2
    if m2[0] < 0:
        m2[0] = 0
    return cancelled


cdef void merge_chunks(const Job *job, const pack *x, Py_ssize_t f0, Py_ssize_t f1) noexcept nogil:
    """mean and m2 of features [f0, f1) from their chunks, in order (Chan, Golub & LeVeque 1983)."""
    cdef Py_ssize_t c, f
    cdef const double *mean
    cdef const double *m2
    cdef double n, count = chunk_count(job, 0), delta, weight
    for f in range(f0, f1):
        job.mean[f] = job.part_a[f]
        job.m2[f] = job.part_b[f]
    for c in range(1, job.chunks):
        n = chunk_count(job, c)
        mean = job.part_a + c * job.features
        m2 = job.part_b + c * job.features
        weight = n / (count + n)
        for f in range(f0, f1):
            delta = mean[f] - job.mean[f]
            job.mean[f] = job.mean[f] + delta * weight
            job.m2[f] = job.m2[f] + (m2[f] + delta * delta * (weight * count))
        count += n
    for f in range(f0, f1):
        job.mean[f] = origin(job, x, f) + job.mean[f]
        if not (isfinite(job.mean[f]) and isfinite(job.m2[f])):
            moments_of_extremes(job, x, f)


cdef void moments_of_extremes(const Job *job, const pack *x, Py_ssize_t f) noexcept nogil:
    """Moments of a feature whose sums overflowed, or that holds NaN or infinities.

    Finite values: Welford's updates of a quarter of the data, so that no difference overflows;
    slow, and never met in ordinary data. Otherwise the mean is what a sum would give (NaN, or
    the infinity) and m2 is NaN.
    """
    cdef Py_ssize_t o, i
    cdef double value, n = 0, mean = 0, m2 = 0, delta, odd = 0
    for o in range(job.outer):
        for i in range(job.inner):
            value = element(x, (o * job.features + f) * job.inner + i) * 0.25
            if not isfinite(value):
                odd += value
            elif odd == 0:
                n += 1
                delta = value - mean
                mean += delta / n
                m2 += delta * (value - mean)
    if odd == 0:
        job.mean[f] = mean * 4
        job.m2[f] = m2 * 16
    else:
        job.mean[f] = odd
        job.m2[f] = odd - odd


cdef void affine(const Job *job, const pack *tag, Py_ssize_t f, double mean, double scale,
                 double shift) noexcept nogil:
    """Parameters of y = (x - mean) * scale + shift in the dtype of x.

    The mean is split: what the dtype holds is subtracted from x first, exactly where x is near
    it, and the remainder goes into the shift. Folding all of the mean into the shift instead
    would cancel when |mean| is much larger than the standard deviation.
    """
    put(<pack *> job.center, f, mean)
    put(<pack *> job.scale, f, scale)
    put(<pack *> job.shift, f, shift - (mean - element(<pack *> job.center, f)) * scale)


cdef inline double over_std(double value, double var, double eps) noexcept nogil:
    """value / sqrt(var + eps), and 0 for a constant feature without eps."""
    cdef double std = sqrt(var + eps)
    return 0.0 if std == 0 else value / std


cdef void forward_parameters(const Job *job, const pack *tag, Py_ssize_t f0, Py_ssize_t f1,
                             bint from_m2) noexcept nogil:
    """Parameters of y = (x - mean) / sqrt(var + eps) * gamma + beta (Ioffe & Szegedy 2015)."""
    cdef Py_ssize_t f
    cdef double n = job.outer * job.inner, var
    for f in range(f0, f1):
        var = job.m2[f] / n if from_m2 else job.var[f]
        affine(job, tag, f, job.mean[f],
               over_std(job.gamma[f] if job.gamma else 1.0, var, job.eps),
               job.beta[f] if job.beta else 0.0)


cdef void merge_gradients(const Job *job, Py_ssize_t f0, Py_ssize_t f1) noexcept nogil:
    """sum(g) and sum(g (x - mean)) of features [f0, f1) from their chunks, in order."""
    cdef Py_ssize_t c, f
    for f in range(f0, f1):
        job.sum_g[f] = job.part_a[f]
        job.sum_gx[f] = job.part_b[f]
    for c in range(1, job.chunks):
        for f in range(f0, f1):
            job.sum_g[f] = job.sum_g[f] + job.part_a[c * job.features + f]
            job.sum_gx[f] = job.sum_gx[f] + job.part_b[c * job.features + f]


cdef void backward_parameters(const Job *job, const pack *tag, Py_ssize_t f0,
                              Py_ssize_t f1) noexcept nogil:
    """Parameters of dx = gamma / std * (g - mean(g) - xhat * mean(g xhat)), xhat = (x - mean)/std.

    As x sees it: dx = g * slope_g + ((x - center) * slope_x + level). With frozen statistics the
    two means are not there, and dx = g * slope_g.
    """
    cdef Py_ssize_t f
    cdef double n = job.outer * job.inner, slope, slope_x, residue
    for f in range(f0, f1):
        slope = over_std(job.gamma[f] if job.gamma else 1.0, job.var[f], job.eps)
        put(<pack *> job.slope_g, f, slope)
        if job.operation == BACKWARD:
            slope_x = -slope * over_std(over_std(job.sum_gx[f] / n, job.var[f], job.eps),
                                        job.var[f], job.eps)
            residue = job.mean[f] - element(<pack *> job.center, f)
            put(<pack *> job.slope_x, f, slope_x)
            put(<pack *> job.level, f, -slope * (job.sum_g[f] / n) - slope_x * residue)
