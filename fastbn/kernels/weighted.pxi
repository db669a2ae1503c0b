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
    """count, mean and m2 of features [f0, f1) from their chunks, in order; at most MERGED features.

    The first chunk with any data gives the origin that means are offsets from. A feature without
    data has count 0, mean NaN and m2 0.
    """
    cdef Py_ssize_t c, f, at_
    cdef int k
    cdef d8 n, count, pivot, origin, delta, weight, square
    cdef double count_rest[MERGED]
    cdef double mean_rest[MERGED]
    cdef double m2_rest[MERGED]
    cdef double *count_ = job.count + f0
    cdef double *mean = job.mean + f0
    cdef double *m2 = job.m2 + f0
    cdef double *origins = job.part_pivot + f0      # the first chunk's, which is merged first
    cdef size_t bytes_ = (f1 - f0) * sizeof(double)
    memset(count_, 0, bytes_)
    memset(mean, 0, bytes_)
    memset(m2, 0, bytes_)
    memset(count_rest, 0, bytes_)
    memset(mean_rest, 0, bytes_)
    memset(m2_rest, 0, bytes_)
    for c in range(job.chunks):
        for f in range(0, f1 - f0, 8):
            k = <int> min(8, f1 - f0 - f)
            at_ = c * job.features + f0 + f
            n, count = load(<d8 *> job.part_n, at_, k), load(<d8 *> count_, f, k)
            pivot, origin = load(<d8 *> job.part_pivot, at_, k), load(<d8 *> origins, f, k)
            origin = add(where(count, origin), sub(pivot, where(count, pivot)))
            store(<d8 *> origins, f, k, origin)
            delta = add(sub(pivot, origin), load(<d8 *> job.part_a, at_, k))
            delta = sub(sub(delta, load(<d8 *> mean, f, k)), load(<d8 *> mean_rest, f, k))
            weight = d8_div(n, add(count, n))
            square = mul(mul(delta, delta), mul(weight, count))
            add_to(count_ + f, count_rest + f, k, n)
            add_to(mean + f, mean_rest + f, k, where(n, mul(delta, weight)))
            add_to(m2 + f, m2_rest + f, k, where(n, add(load(<d8 *> job.part_b, at_, k), square)))
    for f in range(f1 - f0):
        if isfinite(count_[f]):
            count_[f] += count_rest[f]
        m2[f] += m2_rest[f]
        two_sum(NAN if count_[f] == 0 else origins[f], mean[f], mean + f, job.low + f0 + f)
        two_sum(mean[f], job.low[f0 + f] + mean_rest[f], mean + f, job.low + f0 + f)
        if count_[f] > 0 and not (isfinite(mean[f]) and isfinite(m2[f])):
            moments_of_extremes(job, a, x, f0 + f)
