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


# --- Rows ----------------------------------------------------------------------------------------

cdef inline void add_columns(double *sums, Arrays a, const double *pivot, const pack *x,
                             Py_ssize_t stride, int rows, const double *weights, Py_ssize_t step,
                             Py_ssize_t j, int k, Kind kind) noexcept nogil:
    """`rows` rows of columns [j, j + k) into sums, which are ROOM apart; so are rows of weights."""
    cdef Sums s
    cdef d8 p = load(<d8 *> pivot, j, 8), w
    cdef int r
    s.n = load(<d8 *> sums, j, 8)
    s.a = load(<d8 *> sums, j + ROOM, 8)
    s.b = load(<d8 *> sums, j + 2 * ROOM, 8)
    for r in range(rows):
        w = load(<d8 *> weights, r * ROOM + j * step, 8)
        if k < 8:                           # what lies beyond has a pivot, and may be a column
            s = add_weighted(s, a, BY_ANYTHING, widen(x, r * stride + j, k), p, d8_keep(w, k))
        else:
            s = add_weighted(s, a, kind, widen(x, r * stride + j, 8), p, w)
    store(<d8 *> sums, j, 8, s.n)
    store(<d8 *> sums, j + ROOM, 8, s.a)
    store(<d8 *> sums, j + 2 * ROOM, 8, s.b)


cdef inline void add_rows(double *sums, const Job *job, Arrays a, const double *pivot,
                          const pack *x, Tile t, Py_ssize_t r, int rows, double *weights,
                          Kind kind) noexcept nogil:
    """Rows [r, r + rows) of a tile, the last of which may be its short one."""
    cdef Py_ssize_t j = 0, step = sample_step(job, a)
    cdef Py_ssize_t columns = t.columns if r < t.rows else t.rest
    cdef const pack *row = at(x, t.start + r * job.width)
    cdef int n
    for n in range(rows):
        spread_samples(<d8 *> (weights + n * ROOM), job, a, t, r + n, False)
    while j + 16 <= columns:
        if rows == ROWS:
            prefetch_rows(row, job.width, job.ahead_rows + j)
        add_columns(sums, a, pivot, row, job.width, rows, weights, step, j, 8,
                    kind)
        add_columns(sums, a, pivot, row, job.width, rows, weights, step, j + 8, 8,
                    kind)
        j += 16
    while j < columns:
        add_columns(sums, a, pivot, row, job.width, rows, weights, step, j,
                    <int> min(8, columns - j), kind)
        j += 8


cdef inline void add_tile(double *sums, const Job *job, Arrays a, const double *pivot,
                          const pack *x, Tile t, Kind kind) noexcept nogil:
    """Any rows: weights are laid out by column."""
    cdef double weights[ROWS * ROOM]
    cdef Py_ssize_t r = 0
    while r + ROWS <= t.rows:
        add_rows(sums, job, a, pivot, x, t, r, ROWS, weights, kind)
        r += ROWS
    while r < t.rows + (t.rest > 0):
        add_rows(sums, job, a, pivot, x, t, r, 1, weights, kind)
        r += 1


cdef inline void add_sample_rows(double *sums, const double *pivot, const pack *x,
                                 Py_ssize_t stride, int rows, Py_ssize_t columns,
                                 Py_ssize_t ahead, const double *weights,
                                 pack *zeros) noexcept nogil:
    """`rows` samples that have a weight each, from column 0 of sums and pivot on.

    A row of zeros is read for one of weight 0, whatever it holds.
    """
    cdef const pack *row[ROWS]
    cdef d8 weight[ROWS]
    cdef d8 p, d, w, s, q
    cdef Py_ssize_t j
    cdef int r, k
    for r in range(rows):
        weight[r] = d8_splat(weights[r])
        row[r] = at(x, r * stride) if weights[r] != 0 else zeros
    for j in range(0, columns, 8):
        k = <int> min(8, columns - j)
        if rows == ROWS:
            for r in range(rows):
                fastbn_prefetch(at(x, r * stride + j + ahead))
        p, s = load(<d8 *> pivot, j, 8), load(<d8 *> sums, j + ROOM, 8)
        q = load(<d8 *> sums, j + 2 * ROOM, 8)
        for r in range(rows):
            d = d8_less(widen(row[r], j, k), p)
            if k < 8:                       # what lies beyond has a pivot, and may be a column
                d = d8_keep(d, k)
            w = mul(weight[r], d)
            s = add(s, w)
            q = fma(w, d, q)
        store(<d8 *> sums, j + ROOM, 8, s)
        store(<d8 *> sums, j + 2 * ROOM, 8, q)


cdef inline bint by_sample(const Job *job, Arrays a) noexcept nogil:
    """Whether samples are taken one by one, each with its weight in a register."""
    return (job.inner == 1 and (job.fold == 1 or job.features % 8 == 0) and not a.omit)


cdef double add_samples(double *sums, const Job *job, Arrays a, const double *pivot,
                        const pack *x, Tile t) noexcept nogil:
    """The samples of a tile one by one; the sum of weights, which all features share."""
    cdef double zeros[ROOM]
    cdef double w[ROWS]
    cdef Py_ssize_t r = 0, k, samples, at_
    cdef int n, rows
    cdef double total = 0
    memset(zeros, 0, sizeof(zeros))
    while r < t.rows + (t.rest > 0):
        rows = ROWS if r + ROWS <= t.rows else 1
        samples = job.fold if r < t.rows else t.rest // t.features
        for k in range(samples):
            for n in range(rows):
                w[n] = one_weight(a, (t.row + r + n) * job.fold + k)
                total += w[n]
            at_ = t.start + r * job.width + k * t.features
            if rows == 1:
                add_sample_rows(sums + k * t.features, pivot + k * t.features, at(x, at_),
                                job.width, 1, t.features, 0, w, <pack *> zeros)
            elif w[0] != 0 or w[1] != 0 or w[2] != 0 or w[3] != 0:
                add_sample_rows(sums + k * t.features, pivot + k * t.features, at(x, at_),
                                job.width, ROWS, t.features, job.ahead_rows, w, <pack *> zeros)
        r += rows
    return total


cdef double add_kept(double *sums, const Job *job, Arrays a, const double *pivot, const pack *x,
                     Tile t) noexcept nogil:
    """The same with a mask and without weights, of rows that are one sample each."""
    cdef Py_ssize_t r = 0
    cdef double total = 0
    cdef Tile run
    cdef Kept which
    while r < t.rows:
        run = next_rows(a, t, job.width, &r, &which)
        if which == ALL:
            total += run.rows
            sum_rows(sums + ROOM, sums + 2 * ROOM, pivot, at(x, run.start), job.width, run.rows,
                     t.columns, job.ahead_rows)
        elif which == SOME:
            total += add_samples(sums, job, a, pivot, x, run)
    return total


cdef void weighted_rows(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                        Py_ssize_t g) noexcept nogil:
    """part_n, part_pivot, part_a, part_b <- moments of chunk c of the features of group g."""
    cdef Tile t = tile_of(job, c, g)
    cdef double pivot[ROOM]
    cdef double sums[3 * ROOM]              # of weights, of w d and of w d^2
    cdef Py_ssize_t f, at_ = c * job.features + t.first
    cdef double *pivots = job.part_pivot + at_
    cdef double *mean = job.part_a + at_
    cdef double *m2 = job.part_b + at_
    cdef double total
    cdef Kind kind = kind_of(a)
    cdef int attempt, s
    for f in range(t.features):
        pivots[f] = pivot_of(job, a, x, t.first + f, t.row * job.fold, 0,
                             chunk_count(job, c))
    for attempt in range(2):
        memset(pivot + t.columns, 0, PAD * sizeof(double))
        spread(<d8 *> pivot, <d8 *> pivots, t.features, job.inner, job.fold)
        memset(sums, 0, sizeof(sums))
        total = -1                          # where it differs from feature to feature
        if by_sample(job, a) and one_sample(job) and a.weights == NULL:
            total = add_kept(sums, job, a, pivot, x, t)
        elif by_sample(job, a):
            total = add_samples(sums, job, a, pivot, x, t)
        elif kind == BY_NUMBER:
            add_tile(sums, job, a, pivot, x, t, BY_NUMBER)
        elif kind == BY_MASK:
            add_tile(sums, job, a, pivot, x, t, BY_MASK)
        else:
            add_tile(sums, job, a, pivot, x, t, BY_ANYTHING)
        for s in range(3):
            gather(sums + s * ROOM, t.features, job.inner, job.fold)
        if total >= 0:
            for f in range(t.features):
                sums[f] = total
        if (not close_chunk(sums + ROOM, sums + 2 * ROOM, t.features, sums, 0, mean, m2)
                or attempt == 1):
            break
        for f in range(t.features):
            if cancelled(m2[f], sums[2 * ROOM + f]):
                pivots[f] += mean[f]
    memcpy(job.part_n + at_, sums, t.features * sizeof(double))


# --- Planes --------------------------------------------------------------------------------------

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
    """The same of chunk c of the features of group g in the planes layout."""
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
