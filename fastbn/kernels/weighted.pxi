# Moments of samples with weights: sum(w), and the mean and sum(w (x - mean)^2) from sums of
# w (x - pivot) and w (x - pivot)^2 (West 1979 has the formulas; here they are taken by chunks and
# merged, as without weights). A mask and omitted NaN are weights of 0.
#
# Most masks are padding, and most weights hide nothing: stretches that are all kept are summed as
# without a mask, those left out are skipped, and products with weights are tried without a look
# at what weight 0 hides, and taken again with one where they came out NaN.
#
# A chunk keeps its pivot and sum of weights for each feature. No value of the data can be counted
# on to be there, so that chunks have no origin in common before they are merged.

cdef enum:
    LOOKS = 32          # samples of a chunk that are looked at for a pivot


cdef enum Kind:
    BY_MASK             # a mask alone
    BY_WEIGHT           # weights alone (a mask may be in them), hopefully nothing hidden by 0
    BY_NUMBER           # NaN left out, and nothing else
    BY_ANYTHING

cdef inline Kind kind_of(Arrays a) noexcept nogil:
    if not FASTBN_SPECIAL:
        return BY_ANYTHING
    if a.omit:
        return BY_NUMBER if a.weights == NULL and a.where == NULL else BY_ANYTHING
    return BY_MASK if a.weights == NULL else BY_WEIGHT


cdef struct Sums:
    # Of a feature, or of neighbouring ones, a lane each: of w, w d and w d^2, d = x - pivot.
    d8 n
    d8 a
    d8 b


cdef inline Sums add_weighted(Sums s, Arrays a, Kind kind, d8 x, d8 pivot,
                              d8 weight) noexcept nogil:
    cdef d8 d = d8_less(x, pivot)
    if kind == BY_NUMBER or (kind == BY_ANYTHING and a.omit):
        weight = where_number(x, weight)
        d = where_number(x, d)
    if kind == BY_MASK or kind == BY_ANYTHING:
        d = where(weight, d)
    s.n = add(s.n, weight)
    if kind == BY_WEIGHT or kind == BY_ANYTHING:
        weight = mul(weight, d)
    else:
        weight = d                          # weights are 0 or 1, and d is 0 with them
    s.a = add(s.a, weight)
    s.b = fma(weight, d, s.b)
    return s


cdef inline bint hides_nan(const double *sums, const double *counts,
                           Py_ssize_t features) noexcept nogil:
    cdef Py_ssize_t f
    for f in range(features):
        if isnan(sums[f]) and counts[f] > 0:
            return True
    return False


cdef double pivot_of(const Job *job, Arrays a, const pack *x, Py_ssize_t f, Py_ssize_t o,
                     Py_ssize_t i, Py_ssize_t length) noexcept nogil:
    """A value of feature f at or soon after sample (o, i); 0 if none is found.

    It need not be there: sums about a pivot far from the mean are taken again about the mean.
    """
    cdef Py_ssize_t n, at_
    cdef double value
    for n in range(min(LOOKS, length)):
        if one_weight(a, o * job.inner + i) != 0:
            at_ = (o * job.features + f) * job.inner + i
            value = element(x, at_)
            if isfinite(value):
                return value
        i += 1
        if i == job.inner:
            o, i = o + 1, 0
    return 0


# --- Merging -------------------------------------------------------------------------------------

cdef void merge_weighted(const Job *job, Arrays a, const pack *x, Py_ssize_t f0,
                         Py_ssize_t f1) noexcept nogil:
    """count, mean and m2 of features [f0, f1) from their chunks, in order.

    The first chunk with any data gives the origin that means are offsets from. A feature without
    data has count 0, mean NaN and m2 0.
    """
    cdef Py_ssize_t c, f, at_
    cdef double n, delta, weight, origin
    for f in range(f0, f1):
        job.count[f] = job.mean[f] = job.m2[f] = 0
    for c in range(job.chunks):
        for f in range(f0, f1):
            at_ = c * job.features + f
            n = job.part_n[at_]
            if n == 0:
                continue
            if job.count[f] == 0:
                job.part_pivot[f] = job.part_pivot[at_]
            delta = job.part_pivot[at_] - job.part_pivot[f] + job.part_a[at_] - job.mean[f]
            weight = n / (job.count[f] + n)
            job.mean[f] += delta * weight
            job.m2[f] += job.part_b[at_] + delta * delta * (weight * job.count[f])
            job.count[f] += n
    for f in range(f0, f1):
        origin = job.part_pivot[f]
        if job.count[f] == 0:
            origin = NAN
        two_sum(origin, job.mean[f], job.mean + f, job.low + f)
        if job.count[f] > 0 and not (isfinite(job.mean[f]) and isfinite(job.m2[f])):
            moments_of_extremes(job, a, x, f)
