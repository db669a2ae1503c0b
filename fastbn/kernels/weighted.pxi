# Moments of samples with weights: sum(w), and the mean and sum(w (x - mean)^2) from sums of
# w (x - pivot) and w (x - pivot)^2 (West 1979 has the formulas; here they are taken by chunks and
# merged, as without weights). A mask and omitted NaN are weights of 0.
#
# A chunk keeps its pivot and sum of weights for each feature. No value of the data can be counted
# on to be there, so that chunks have no origin in common before they are merged.

cdef enum:
    LOOKS = 32          # samples of a chunk that are looked at for a pivot


cdef struct Sums:
    # Of a feature, or of neighbouring ones, a lane each: sum(w), sum(w d), sum(w d^2), d = x - pivot.
    d8 n
    d8 a
    d8 b


cdef inline Sums add_weighted(Sums s, Arrays a, d8 x, d8 pivot, d8 weight) noexcept nogil:
    cdef d8 d = d8_less(x, pivot)
    if a.omit:
        weight = where_number(x, weight)
    d = where(weight, d)
    s.n = add(s.n, weight)
    weight = mul(weight, d)
    s.a = add(s.a, weight)
    s.b = fma(weight, d, s.b)
    return s


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


# --- Rows ----------------------------------------------------------------------------------------

cdef inline void add_columns(double *sums, Arrays a, const double *pivot, const pack *x,
                             Py_ssize_t stride, int rows, const double *weights, Py_ssize_t step,
                             Py_ssize_t j, int k) noexcept nogil:
    """`rows` rows of columns [j, j + k) into sums, which are ROOM apart; so are rows of weights."""
    cdef Sums s
    cdef d8 p = load(<d8 *> pivot, j, 8), w
    cdef int r
    s.n = load(<d8 *> sums, j, 8)
    s.a = load(<d8 *> sums, j + ROOM, 8)
    s.b = load(<d8 *> sums, j + 2 * ROOM, 8)
    for r in range(rows):
        w = load(<d8 *> weights, r * ROOM + j * step, 8)
        if k < 8:
            w = d8_keep(w, k)
        s = add_weighted(s, a, widen(x, r * stride + j, k), p, w)
    store(<d8 *> sums, j, 8, s.n)
    store(<d8 *> sums, j + ROOM, 8, s.a)
    store(<d8 *> sums, j + 2 * ROOM, 8, s.b)


cdef inline void add_rows(double *sums, const Job *job, Arrays a, const double *pivot,
                          const pack *x, Tile t, Py_ssize_t r, int rows,
                          double *weights) noexcept nogil:
    """Rows [r, r + rows) of a tile, the last of which may be its short one."""
    cdef Py_ssize_t j = 0, step = sample_step(job)
    cdef Py_ssize_t columns = t.columns if r < t.rows else t.rest
    cdef const pack *row = at(x, t.start + r * job.width)
    cdef int n
    for n in range(rows):
        spread_samples(<d8 *> (weights + n * ROOM), job, a, t, r + n, False)
    while j + 16 <= columns:
        if rows == ROWS:
            prefetch_rows(row, job.width, job.ahead_rows + j)
        add_columns(sums, a, pivot, row, job.width, rows, weights, step, j, 8)
        add_columns(sums, a, pivot, row, job.width, rows, weights, step, j + 8, 8)
        j += 16
    while j < columns:
        add_columns(sums, a, pivot, row, job.width, rows, weights, step, j,
                    <int> min(8, columns - j))
        j += 8


cdef inline void add_tile(double *sums, const Job *job, Arrays a, const double *pivot,
                          const pack *x, Tile t, double *weights) noexcept nogil:
    cdef Py_ssize_t r = 0
    while r + ROWS <= t.rows:
        add_rows(sums, job, a, pivot, x, t, r, ROWS, weights)
        r += ROWS
    while r < t.rows + (t.rest > 0):
        add_rows(sums, job, a, pivot, x, t, r, 1, weights)
        r += 1


cdef void weighted_rows(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                        Py_ssize_t g) noexcept nogil:
    """part_n, part_pivot, part_a, part_b <- moments of chunk c of the features of group g."""
    cdef Tile t = tile_of(job, c, g)
    cdef double pivot[ROOM]
    cdef double sums[3 * ROOM]
    cdef double weights[ROWS * ROOM]
    cdef Py_ssize_t f, at_ = c * job.features + t.first
    cdef double *pivots = job.part_pivot + at_
    cdef double *mean = job.part_a + at_
    cdef double *m2 = job.part_b + at_
    cdef int attempt, s
    for f in range(t.features):
        pivots[f] = pivot_of(job, a, x, t.first + f, t.row * job.fold, 0,
                             chunk_count(job, c))
    for attempt in range(2):
        memset(pivot + t.columns, 0, PAD * sizeof(double))
        spread(<d8 *> pivot, <d8 *> pivots, t.features, job.inner, job.fold)
        memset(sums, 0, sizeof(sums))
        add_tile(sums, job, a, pivot, x, t, weights)
        for s in range(3):
            gather(sums + s * ROOM, t.features, job.inner, job.fold)
        if (not close_chunk(sums + ROOM, sums + 2 * ROOM, t.features, sums, 0, mean, m2)
                or attempt == 1):
            break
        for f in range(t.features):
            if cancelled(m2[f], sums[2 * ROOM + f]):
                pivots[f] += mean[f]
    memcpy(job.part_n + at_, sums, t.features * sizeof(double))


# --- Planes --------------------------------------------------------------------------------------

cdef inline void add_run(Sums *two, Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t end,
                         Py_ssize_t ahead, Py_ssize_t to_sample, double pivot) noexcept nogil:
    """Elements [i, end) of a feature; element i is sample i + to_sample."""
    cdef d8 p = d8_splat(pivot)
    cdef Sums s = two[0], t = two[1]
    cdef int k
    while i + 16 <= end:
        fastbn_prefetch(at(x, i + ahead))
        if pack is d8:
            fastbn_prefetch(at(x, i + ahead + 8))
        s = add_weighted(s, a, widen(x, i, 8), p, weight_at(a, i + to_sample, 8))
        t = add_weighted(t, a, widen(x, i + 8, 8), p, weight_at(a, i + 8 + to_sample, 8))
        i += 16
    while i < end:
        k = <int> min(8, end - i)
        s = add_weighted(s, a, widen(x, i, k), p, weight_at(a, i + to_sample, k))
        i += 8
    two[0], two[1] = s, t


cdef void weighted_planes(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                          Py_ssize_t g) noexcept nogil:
    """The same of chunk c of the features of group g in the planes layout."""
    cdef Block t = block_of(job, c, g)
    cdef Sums sums[2 * GROUP]
    cdef double n[GROUP]
    cdef double sum1[GROUP]
    cdef double sum2[GROUP]
    cdef Py_ssize_t r, f, i, middle, at_ = c * job.features + t.first
    cdef double *pivots = job.part_pivot + at_
    cdef double *mean = job.part_a + at_
    cdef double *m2 = job.part_b + at_
    cdef int attempt
    for f in range(t.features):
        pivots[f] = pivot_of(job, a, x, t.first + f, t.sample // job.inner,
                             t.sample % job.inner, t.length)
    for attempt in range(2):
        memset(sums, 0, 2 * t.features * sizeof(Sums))
        for r in range(t.runs):
            for f in range(t.features):
                i = t.start + r * t.stride + f * job.inner
                middle = i + (t.length - t.near) // 16 * 16
                add_run(sums + 2 * f, a, x, i, middle, t.near, sample_of(job, t, r, i),
                        pivots[f])
                add_run(sums + 2 * f, a, x, middle, i + t.length, t.far, sample_of(job, t, r, i),
                        pivots[f])
        for f in range(t.features):
            n[f] = d8_sum(add(sums[2 * f].n, sums[2 * f + 1].n))
            sum1[f] = d8_sum(add(sums[2 * f].a, sums[2 * f + 1].a))
            sum2[f] = d8_sum(add(sums[2 * f].b, sums[2 * f + 1].b))
        if not close_chunk(sum1, sum2, t.features, n, 0, mean, m2) or attempt == 1:
            break
        for f in range(t.features):
            if cancelled(m2[f], sum2[f]):
                pivots[f] += mean[f]
    memcpy(job.part_n + at_, n, t.features * sizeof(double))


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
