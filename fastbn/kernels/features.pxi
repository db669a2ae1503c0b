# What is done per feature: chunk sums become moments, moments become parameters.

from libc.float cimport DBL_MAX
from libc.math cimport NAN, ilogb, isfinite, isnan, ldexp

cdef enum:
    MERGED = 512        # features that are merged at a time: what is kept for them stays in L1

# Of eight features: a number of more digits than float64 has, as its float64 and the remainder.
cdef struct Sum:
    d8 high
    d8 low


cdef inline d8 firsts(const Job *job, const pack *x, Py_ssize_t i, int k) noexcept nogil:
    """The first value of each of k features, the first one's being element i; 0 if not finite.

    What sums and means are taken relative to: of a chunk, the pivot of its sums; of all data, the
    origin of its chunks' means. A mean of 1e7 has no digits left for the differences between chunk
    means that Chan's formula needs; the same mean as an offset from a value in the data has all.
    """
    cdef double values[8]
    cdef int n
    if job.inner == 1:
        return d8_finite_or_zero(widen(x, i, k))
    for n in range(8):
        values[n] = element(x, i + min(n, k - 1) * job.inner)
    return d8_finite_or_zero(load(<d8 *> values, 0, 8))


cdef inline bint cancelled(double m2, double sum2) noexcept nogil:
    """Whether m2 = sum2 - sum1^2 / n lost more than 6 bits: its pivot was far from the mean."""
    return m2 * 64 < sum2


cdef bint close_chunk(const double *sum1, const double *sum2, Py_ssize_t features,
                      const double *counts, double n, double *offset, double *m2) noexcept nogil:
    """Moments of a chunk from its sums of (x - pivot) and (x - pivot)^2, of n samples each.

    With weights `counts` has their sums; where one is 0 there is nothing to see in the results.

    True if a feature should be summed again about `pivot + offset`, because of cancellation. It
    happens where the first element of a chunk is an outlier.
    """
    cdef Py_ssize_t f
    cdef int k, again = 0
    cdef d8 count = d8_splat(n), total, mean, square
    for f in range(0, features, 8):
        k = <int> min(8, features - f)
        total = load(<d8 *> sum1, f, k)
        if counts != NULL:
            count = load(<d8 *> counts, f, k)
        mean = d8_div(total, count)
        square = load(<d8 *> sum2, f, k)
        total = d8_relu(sub(square, mul(total, mean)))
        again |= d8_any_less(mul(total, d8_splat(64)), square)      # as `cancelled`
        store(<d8 *> offset, f, k, mean)
        store(<d8 *> m2, f, k, total)
    return again


cdef inline void place_offsets(const Job *job, const pack *x, double *offset, const double *pivot,
                               Py_ssize_t f0, Py_ssize_t features) noexcept nogil:
    """Offsets from a chunk's pivots, of features from f0 on, become offsets from the origin."""
    cdef Py_ssize_t f
    cdef int k
    cdef d8 move
    for f in range(0, features, 8):
        k = <int> min(8, features - f)
        move = sub(load(<d8 *> pivot, f, k), firsts(job, x, (f0 + f) * job.inner, k))
        store(<d8 *> offset, f, k, add(load(<d8 *> offset, f, k), move))


cdef inline void two_sum(double a, double b, double *total, double *rest) noexcept nogil:
    """total + rest = a + b exactly, total being a + b rounded (Knuth); no rest to an infinity."""
    cdef double t = a + b, part = t - a
    total[0] = t
    rest[0] = (a - (t - part)) + (b - part) if isfinite(part) else 0


cdef inline Sum exact_sum(d8 a, d8 b) noexcept nogil:
    """`two_sum` of eight features; the remainder of infinities is NaN."""
    cdef Sum s
    cdef d8 part
    s.high = add(a, b)
    part = sub(s.high, a)
    s.low = add(sub(a, sub(s.high, part)), sub(b, part))
    return s


cdef inline void add_to(double *total, double *rest, int k, d8 value) noexcept nogil:
    """total + rest grow by value, rest taking what total's rounding cuts off.

    A sum over chunks, of which there may be 10^5, is then off by what chunks are off by, and not
    by a rounding for each of them (Ogita, Rump & Oishi 2005).
    """
    cdef Sum s = exact_sum(load(<d8 *> total, 0, k), value)
    store(<d8 *> total, 0, k, s.high)
    store(<d8 *> rest, 0, k, add(load(<d8 *> rest, 0, k), s.low))


cdef inline d8 settled(const double *total, const double *rest, int k) noexcept nogil:
    """total + rest, and an infinite total alone."""
    return add(load(<d8 *> total, 0, k), d8_finite_or_zero(load(<d8 *> rest, 0, k)))


cdef void merge_chunks(const Job *job, Arrays a, const pack *x, Py_ssize_t f0,
                       Py_ssize_t f1) noexcept nogil:
    """mean and m2 of features [f0, f1) from their chunks, in order (Chan, Golub & LeVeque 1983).

    At most MERGED features.
    """
    cdef Py_ssize_t c, f
    cdef int k
    cdef d8 delta, square, odd = d8_splat(0)
    cdef Sum s
    cdef double mean_rest[MERGED]
    cdef double m2_rest[MERGED]
    cdef double *mean = job.mean + f0
    cdef double *m2 = job.m2 + f0
    cdef const double *mean_c = job.part_a + f0
    cdef const double *m2_c = job.part_b + f0
    cdef double n, count = chunk_count(job, 0), weight
    cdef size_t bytes_ = (f1 - f0) * sizeof(double)
    memcpy(mean, mean_c, bytes_)
    memcpy(m2, m2_c, bytes_)
    memset(mean_rest, 0, bytes_)
    memset(m2_rest, 0, bytes_)
    for c in range(1, job.chunks):
        n = chunk_count(job, c)
        mean_c += job.features
        m2_c += job.features
        weight = n / (count + n)
        for f in range(0, f1 - f0, 8):
            k = <int> min(8, f1 - f0 - f)
            delta = sub(sub(load(<d8 *> mean_c, f, k), load(<d8 *> mean, f, k)),
                        load(<d8 *> mean_rest, f, k))
            square = mul(mul(delta, delta), d8_splat(weight * count))
            add_to(mean + f, mean_rest + f, k, mul(delta, d8_splat(weight)))
            add_to(m2 + f, m2_rest + f, k, add(load(<d8 *> m2_c, f, k), square))
        count += n
    for f in range(0, f1 - f0, 8):
        k = <int> min(8, f1 - f0 - f)
        s = exact_sum(firsts(job, x, (f0 + f) * job.inner, k), load(<d8 *> mean, f, k))
        s = exact_sum(s.high, add(s.low, load(<d8 *> mean_rest, f, k)))
        square = settled(m2 + f, m2_rest + f, k)
        store(<d8 *> mean, f, k, s.high)
        store(<d8 *> m2, f, k, square)
        store(<d8 *> job.low, f0 + f, k, s.low)
        odd = add(odd, add(sub(s.high, s.high), sub(square, square)))
    if d8_sum(odd) != 0:                    # NaN, where a mean or an m2 is not finite
        for f in range(f0, f1):
            if not (isfinite(job.mean[f]) and isfinite(job.m2[f])):
                moments_of_extremes(job, a, x, f)


cdef void moments_of_extremes(const Job *job, Arrays a, const pack *x, Py_ssize_t f) noexcept nogil:
    """Moments of a feature whose sums overflowed, or that holds NaN or infinities.

    Finite values: Welford's updates of a quarter of the data, so that no difference overflows;
    slow, and never met in ordinary data. Otherwise the mean is what a sum would give (NaN, or
    the infinity) and m2 is NaN.
    """
    cdef Py_ssize_t o, i
    cdef double value, weight, n = 0, mean = 0, m2 = 0, delta, odd = 0
    for o in range(job.outer):
        for i in range(job.inner):
            value = element(x, (o * job.features + f) * job.inner + i) * 0.25
            weight = one_weight(a, o * job.inner + i)
            if weight == 0 or (a.omit and isnan(value)):
                continue
            if not isfinite(value):
                odd += value
            elif odd == 0:
                n += weight
                delta = value - mean
                mean += delta * (weight / n)
                m2 += weight * delta * (value - mean)
    job.low[f] = 0
    if odd == 0:
        job.mean[f] = mean * 4
        job.m2[f] = m2 * 16
    else:
        job.mean[f] = odd
        job.m2[f] = odd - odd


# --- Parameters, eight features at a time ---------------------------------------------------------

cdef inline d8 std_of(const Job *job, Py_ssize_t f, int k) noexcept nogil:
    """sqrt(var + eps)"""
    cdef d8 var = load(<d8 *> job.m2, f, k)
    if job.count != NULL:
        var = d8_div(var, load(<d8 *> job.count, f, k))
    elif job.n != 1:
        var = d8_div(var, d8_splat(job.n))
    return d8_sqrt(add(var, d8_splat(job.eps)))


cdef inline d8 over(d8 value, d8 std) noexcept nogil:
    """value / std, and 0 for a constant feature without eps, or a variance beyond the range.

    The sum in `value` may have overflowed to NaN then, depending on the order of its terms.
    """
    value = where_positive(sub(d8_splat(DBL_MAX), std), d8_div(value, std))
    return where_positive(std, value)


cdef inline d8 or_else(Vector values, Py_ssize_t f, int k, double default) noexcept nogil:
    """gamma or beta."""
    if values.doubles != NULL:
        return load(<d8 *> values.doubles, f, k)
    if values.floats != NULL:
        return widen(<f16 *> values.floats, f, k)
    return d8_splat(default)


cdef inline d8 by_unit(const Job *job, d8 value, d8 unit) noexcept nogil:
    """value / unit. Divisions are most of what parameters cost, and this is nearly always by 1."""
    return d8_div(value, unit) if job.extreme[0] else value


cdef d8 units(const Job *job, const pack *tag, d8 std) noexcept nogil:
    """A power of two for each feature that brings x's deviations, and 1 / std^2, into range.

    1 where the dtype holds them anyway, which is nearly always. Not so: subnormal float32 without
    eps, whose 1 / std is no float32, or values near the largest one, whose differences are not.
    Where even the variance is infinite, differences of a quarter of x are finite.
    """
    cdef double widest = 2.0 ** 30 if pack is f16 else 2.0 ** 300
    cdef int most = 126 if pack is f16 else 1020, k
    cdef double s[8]
    cdef d8 one = d8_splat(1)
    cdef d8 inside = mul(sub(std, d8_splat(1 / widest)), sub(d8_splat(widest), std))
    if d8_sum(where_positive(inside, one)) == 8:        # NaN counts as inside
        return one
    store(<d8 *> s, 0, 8, std)
    for k in range(8):
        if s[k] > DBL_MAX:
            s[k] = 0.25
            job.extreme[0] = True
        elif s[k] > 0 and not 1 / widest < s[k] < widest:
            s[k] = ldexp(1, max(-most, min(most, -ilogb(s[k]))))
            job.extreme[0] = True
        else:
            s[k] = 1
    return load(<d8 *> s, 0, 8)


cdef inline d8 residue_of(const Job *job, const pack *tag, Py_ssize_t f, int k,
                          d8 unit) noexcept nogil:
    """What the center leaves of the mean, which x's dtype does not hold. In float64 that is the
    mean's low-order part: without it 1e8 +- 1 would come out normalised to 8 digits."""
    cdef d8 mean = mul(load(<d8 *> job.mean, f, k), unit)
    cdef d8 residue = sub(mean, widen(<pack *> job.center, f, k))
    if job.low != NULL:
        residue = add(residue, mul(load(<d8 *> job.low, f, k), unit))
    return residue


cdef void forward_parameters(const Job *job, const pack *tag, Py_ssize_t f0,
                             Py_ssize_t f1) noexcept nogil:
    """Parameters of y = (x - mean) / sqrt(var + eps) * gamma + beta (Ioffe & Szegedy 2015).

    In the dtype of x, and with the mean split: what the dtype holds of it is subtracted from x
    first, exactly where x is near it, and the remainder goes into the shift. Folding all of the
    mean into the shift would cancel when |mean| is much larger than the standard deviation.
    """
    cdef Py_ssize_t f
    cdef int k
    cdef d8 std, unit, scale, residue
    for f in range(f0, f1, 8):
        k = <int> min(8, f1 - f)
        std = std_of(job, f, k)
        unit = units(job, tag, std)
        scale = by_unit(job, over(or_else(job.gamma, f, k, 1), std), unit)
        narrow(<pack *> job.center, f, k, mul(load(<d8 *> job.mean, f, k), unit))
        residue = residue_of(job, tag, f, k, unit)
        narrow(<pack *> job.unit, f, k, unit)
        narrow(<pack *> job.scale, f, k, scale)
        narrow(<pack *> job.shift, f, k, sub(or_else(job.beta, f, k, 0), mul(residue, scale)))


cdef void backward_parameters(const Job *job, const pack *tag, Py_ssize_t f0,
                              Py_ssize_t f1) noexcept nogil:
    """Parameters of dx = gamma / std * (g - mean(g) - xhat * mean(g xhat)), xhat = (x - mean)/std.

    As x sees it: dx = g * slope_g + ((x - center) * slope_x + level). With frozen statistics the
    two means are not there, and dx = g * slope_g.
    """
    cdef Py_ssize_t f
    cdef int k
    cdef d8 std, unit, slope, slope_x, residue
    cdef d8 n = d8_splat(job.outer * job.inner), zero = d8_splat(0)     # or the sum of weights
    for f in range(f0, f1, 8):
        k = <int> min(8, f1 - f)
        std = std_of(job, f, k)
        unit = widen(<pack *> job.unit, f, k)
        slope = by_unit(job, over(or_else(job.gamma, f, k, 1), std), unit)
        narrow(<pack *> job.slope_g, f, k, slope)
        if job.operation == BACKWARD:
            if job.total != NULL:
                n = load(<d8 *> job.total, f, k)
            slope = sub(zero, slope)
            slope_x = over(d8_div(load(<d8 *> job.dgamma, f, k), n), mul(std, unit))
            slope_x = mul(slope, slope_x)
            residue = residue_of(job, tag, f, k, unit)
            narrow(<pack *> job.slope_x, f, k, slope_x)
            narrow(<pack *> job.level, f, k,
                   sub(mul(slope, d8_div(load(<d8 *> job.dbeta, f, k), n)), mul(slope_x, residue)))


cdef double any_kept(const Job *job, Arrays a, const pack *x, Py_ssize_t f) noexcept nogil:
    """1 if any sample of feature f is kept, else 0."""
    cdef Py_ssize_t o, i
    for o in range(job.outer):
        for i in range(job.inner):
            if (one_flag(a, o * job.inner + i) != 0 and not
                    (a.omit and isnan(element(x, (o * job.features + f) * job.inner + i)))):
                return 1
    return 0


cdef void look_for_data(const Job *job, Arrays a, const pack *x, Py_ssize_t f0,
                        Py_ssize_t f1) noexcept nogil:
    """part_n <- 0 for features of which nothing is kept, where frozen statistics are NaN, else 1.

    Then 0 times NaN would be in sums of nothing, or not, depending on the layout. It is done
    before anything else because dx may be written over x.
    """
    cdef Py_ssize_t f
    cdef double var
    for f in range(f0, f1):
        var = job.m2[f] / job.count[f] if job.count != NULL else job.m2[f]
        job.part_n[f] = any_kept(job, a, x, f) if isnan(job.mean[f] + var) else 1


cdef void merge_gradients(const Job *job, Py_ssize_t f0, Py_ssize_t f1) noexcept nogil:
    """dbeta = sum(g), dgamma = sum(g xhat) from the chunks, in order; at most MERGED features."""
    cdef Py_ssize_t c, f
    cdef int k
    cdef d8 value, sum_of_g, low
    cdef double dbeta_rest[MERGED]
    cdef double dgamma_rest[MERGED]
    cdef double *dbeta = job.dbeta + f0
    cdef double *dgamma = job.dgamma + f0
    cdef const double *sum_g = job.part_a + f0
    cdef const double *sum_gx = job.part_b + f0
    cdef size_t bytes_ = (f1 - f0) * sizeof(double)
    memcpy(dbeta, sum_g, bytes_)
    memcpy(dgamma, sum_gx, bytes_)
    memset(dbeta_rest, 0, bytes_)
    memset(dgamma_rest, 0, bytes_)
    for c in range(1, job.chunks):
        sum_g += job.features
        sum_gx += job.features
        for f in range(0, f1 - f0, 8):
            k = <int> min(8, f1 - f0 - f)
            add_to(dbeta + f, dbeta_rest + f, k, load(<d8 *> sum_g, f, k))
            add_to(dgamma + f, dgamma_rest + f, k, load(<d8 *> sum_gx, f, k))
    # What was summed is g (x - mean): its terms have the 1 / std in common. The mean's low-order
    # part is the same for all terms, and so is taken off their sum.
    for f in range(f0, f1, 8):
        k = <int> min(8, f1 - f)
        sum_of_g = settled(dbeta + f - f0, dbeta_rest + f - f0, k)
        store(<d8 *> job.dbeta, f, k, sum_of_g)
        value = settled(dgamma + f - f0, dgamma_rest + f - f0, k)
        if job.low != NULL:
            low = mul(load(<d8 *> job.low, f, k), sum_of_g)
            value = sub(value, d8_finite_or_zero(low))
        value = over(value, std_of(job, f, k))
        if job.total != NULL:               # a feature without data has no std
            value = where(load(<d8 *> job.total, f, k), value)
        elif job.shared:
            value = where(load(<d8 *> job.part_n, f, k), value)
        store(<d8 *> job.dgamma, f, k, value)
