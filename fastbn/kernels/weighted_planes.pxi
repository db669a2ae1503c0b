# Sums of weighted data in the planes layout.

cdef struct Run:
    Sums s
    double kept             # elements that are not in s.n


cdef inline void add_run(Run *run, Arrays a, Kind kind, const pack *x, Py_ssize_t i,
                         Py_ssize_t end, Py_ssize_t ahead, Py_ssize_t to_sample,
                         double pivot) noexcept nogil:
    """Elements [i, end) of a feature; element i is sample i + to_sample.

    Where weights are 0 or 1 they are counted, apart from the arithmetic.
    """
    cdef d8 p = d8_splat(pivot), u, d
    cdef Sums s = run.s
    cdef Py_ssize_t kept = 0
    cdef int k, n, all_ = 0
    while i + 16 <= end:
        fastbn_prefetch(at(x, i + ahead))
        if pack is d8:                      # 16 elements are two cache lines
            fastbn_prefetch(at(x, i + ahead + 8))
        if kind == BY_MASK:
            all_ = fastbn_kept16(a.where + i + to_sample)
            if all_ == 0:
                i += 16
                continue
        for n in range(0, 16, 8):
            u = widen(x, i + n, 8)
            if kind == BY_MASK or kind == BY_NUMBER:
                d = d8_less(u, p)
                if kind == BY_NUMBER:
                    d = where_number(u, d)
                    kept += d8_numbers(u)
                elif all_ != 16:
                    d = d8_where_bytes(a.where + i + n + to_sample, d)
                    kept += fastbn_count8(a.where + i + n + to_sample)
                s.a = add(s.a, d)
                s.b = fma(d, d, s.b)
            elif kind == BY_WEIGHT:
                s = add_weighted(s, a, kind, u, p, load(<d8 *> a.weights, i + n + to_sample, 8))
            else:
                s = add_weighted(s, a, kind, u, p, weight_at(a, i + n + to_sample, 8))
        if kind == BY_MASK and all_ == 16:
            kept += 16
        i += 16
    while i < end:
        k = <int> min(8, end - i)
        s = add_weighted(s, a, BY_ANYTHING, widen(x, i, k), p, weight_at(a, i + to_sample, k))
        i += 8
    run.s = s
    run.kept += kept


cdef inline void add_runs(Run *runs, const Job *job, Arrays a, Kind kind, const pack *x, Block t,
                          const double *pivots) noexcept nogil:
    cdef Py_ssize_t r, f, i, middle, s
    for r in range(t.runs):
        for f in range(t.features):
            i = t.start + r * t.stride + f * job.inner
            middle = i + (t.length - t.near) // 16 * 16
            s = sample_of(job, t, r, i)
            if middle > i:
                add_run(runs + f, a, kind, x, i, middle, t.near, s, pivots[f])
            add_run(runs + f, a, kind, x, middle, i + t.length, t.far, s, pivots[f])


cdef void weighted_planes(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                          Py_ssize_t g) noexcept nogil:
    """part_n, part_pivot, part_a, part_b <- moments of chunk c of the features of group g."""
    cdef Block t = block_of(job, c, g)
    cdef Run runs[GROUP]
    cdef double n[GROUP]
    cdef double sum1[GROUP]
    cdef double sum2[GROUP]
    cdef Py_ssize_t f, at_ = c * job.features + t.first
    cdef double *pivots = job.part_pivot + at_
    cdef double *mean = job.part_a + at_
    cdef double *m2 = job.part_b + at_
    cdef Kind kind = kind_of(a)
    cdef int attempt = 0
    for f in range(t.features):
        pivots[f] = pivot_of(job, a, x, t.first + f, t.sample // job.inner,
                             t.sample % job.inner, t.length)
    while attempt < 2:
        memset(runs, 0, t.features * sizeof(Run))
        if kind == BY_MASK:
            add_runs(runs, job, a, BY_MASK, x, t, pivots)
        elif kind == BY_WEIGHT:
            add_runs(runs, job, a, BY_WEIGHT, x, t, pivots)
        elif kind == BY_NUMBER:
            add_runs(runs, job, a, BY_NUMBER, x, t, pivots)
        else:
            add_runs(runs, job, a, BY_ANYTHING, x, t, pivots)
        for f in range(t.features):
            n[f] = d8_sum(runs[f].s.n) + runs[f].kept
            sum1[f] = d8_sum(runs[f].s.a)
            sum2[f] = d8_sum(runs[f].s.b)
        if kind == BY_WEIGHT and hides_nan(sum1, n, t.features):
            kind = BY_ANYTHING              # once more, careful of what weight 0 hides
            continue
        if not close_chunk(sum1, sum2, t.features, n, 0, mean, m2):
            break
        attempt += 1
        for f in range(t.features):
            if attempt == 1 and cancelled(m2[f], sum2[f]):
                pivots[f] += mean[f]
    memcpy(job.part_n + at_, n, t.features * sizeof(double))
