# Sums of weighted data in the rows layout.

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
            d = d8_less(widen(row[r], j, k), p)     # what lies beyond the last one is nobody's
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
