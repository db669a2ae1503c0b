# The rows layout: a matrix whose columns each have accumulators of their own.
#
# The reductions take ROWS rows at a time and, column by column, keep the accumulators in
# registers over them: a row at a time would load and store as much state as data, and many more
# rows would be more streams than a prefetcher follows. The rows after next are prefetched by
# hand; without it, (n, 512) float32 was summed at 11 GB/s from memory, with it at 24.

cdef enum:
    PAD = 16            # so that a part of a pack at the end of a tile has somewhere to go
    ROOM = TILE + PAD   # columns of a tile's buffers


cdef void spread(pack *columns, const pack *values, Py_ssize_t features, Py_ssize_t inner,
                 Py_ssize_t fold) noexcept nogil:
    """One value per feature -> one value per column of a tile. Writes up to PAD columns beyond."""
    cdef Py_ssize_t k, f, i, size = features * inner * 64 // lanes(values)
    cdef pack value
    if inner == 1:
        memcpy(columns, values, size)
    else:
        for f in range(features):
            value = splat(values, element(values, f))
            i = f * inner
            while i < (f + 1) * inner:                      # the next feature overwrites the excess
                store(columns, i, lanes(values), value)
                i += lanes(values)
    for k in range(1, fold):
        memcpy(at(columns, k * features * inner), columns, size)


cdef void gather(double *columns, Py_ssize_t features, Py_ssize_t inner,
                 Py_ssize_t fold) noexcept nogil:
    """columns[f] <- the sum of feature f's columns, in place."""
    cdef Py_ssize_t k, i, f, sample = features * inner
    cdef d8 total
    for k in range(1, fold):
        for i in range(sample):
            columns[i] += columns[k * sample + i]
    if inner > 1:
        for f in range(features):
            total = d8_splat(0)
            for i in range(f * inner, (f + 1) * inner - 7, 8):
                total = add(total, load(<d8 *> columns, i, 8))
            i = (f + 1) * inner - inner % 8
            if inner % 8:
                total = add(total, load(<d8 *> columns, i, <int> (inner % 8)))
            columns[f] = d8_sum(total)


cdef inline void sum_columns(double *sum1, double *sum2, const double *pivot, const pack *x,
                             Py_ssize_t stride, int rows, Py_ssize_t j, int k) noexcept nogil:
    """sum1 += x - pivot and sum2 += (x - pivot)^2 over `rows` rows of columns [j, j + k)."""
    cdef d8 a = load(<const d8 *> sum1, j, 8), b = load(<const d8 *> sum2, j, 8)
    cdef d8 p = load(<const d8 *> pivot, j, 8), d
    cdef int r
    for r in range(rows):
        d = d8_less(widen(x, r * stride + j, k), p)
        if k < 8:                           # what lies beyond has a pivot, and may be a column
            d = d8_keep(d, k)
        a = add(a, d)
        b = fma(d, d, b)
    store(<d8 *> sum1, j, 8, a)
    store(<d8 *> sum2, j, 8, b)


cdef void sum_rows(double *sum1, double *sum2, const double *pivot, const pack *x,
                   Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns,
                   Py_ssize_t ahead) noexcept nogil:
    cdef Py_ssize_t r, j, whole = columns - columns % 16
    cdef const pack *row
    for r in range(rows // ROWS):
        row = at(x, r * ROWS * stride)
        for j in range(0, whole, 16):
            prefetch_rows(row, stride, ahead + j)
            sum_columns(sum1, sum2, pivot, row, stride, ROWS, j, 8)
            sum_columns(sum1, sum2, pivot, row, stride, ROWS, j + 8, 8)
        for j in range(whole, columns, 8):
            sum_columns(sum1, sum2, pivot, row, stride, ROWS, j, <int> min(8, columns - j))
    for r in range(rows - rows % ROWS, rows):
        row = at(x, r * stride)
        for j in range(0, columns - columns % 8, 8):
            sum_columns(sum1, sum2, pivot, row, stride, 1, j, 8)
        for j in range(columns - columns % 8, columns, 8):
            sum_columns(sum1, sum2, pivot, row, stride, 1, j, <int> (columns - j))


cdef inline void prefetch_rows(const pack *x, Py_ssize_t stride, Py_ssize_t j) noexcept nogil:
    cdef int r
    for r in range(ROWS):
        fastbn_prefetch(at(x, r * stride + j))
        if pack is d8:                      # 16 columns are two cache lines
            fastbn_prefetch(at(x, r * stride + j + 8))


cdef struct Tile:
    Py_ssize_t first        # its first feature
    Py_ssize_t features
    Py_ssize_t columns
    Py_ssize_t start        # element where its chunk's first row begins
    Py_ssize_t rows         # whole rows of the chunk
    Py_ssize_t rest         # columns of the shorter row that follows them, or 0


cdef inline Tile tile_of_rows(const Job *job, Py_ssize_t r0, Py_ssize_t r1, Py_ssize_t f0,
                              Py_ssize_t f1) noexcept nogil:
    """Features [f0, f1) of rows [r0, r1)."""
    cdef Tile t
    t.first = f0
    t.features = f1 - f0
    t.columns = t.features * job.inner * job.fold
    t.start = r0 * job.width + f0 * job.inner
    t.rows = r1 - r0
    t.rest = job.rest if r1 == job.length else 0
    return t


cdef inline Tile tile_of(const Job *job, Py_ssize_t c, Py_ssize_t g) noexcept nogil:
    """Chunk c of group g."""
    return tile_of_rows(job, c * job.chunk, min((c + 1) * job.chunk, job.length),
                        first_of(job, g), first_of(job, g + 1))


cdef void moments_rows(const Job *job, const pack *x, Py_ssize_t c, Py_ssize_t g) noexcept nogil:
    """part_a, part_b <- moments of chunk c of the features of group g."""
    cdef Tile t = tile_of(job, c, g)
    cdef double first[ROOM]         # a value of the chunk for each feature: its pivot
    cdef double pivot[ROOM]   # the same by column
    cdef double sum1[ROOM]
    cdef double sum2[ROOM]
    cdef double *mean = job.part_a + c * job.features + t.first
    cdef double *m2 = job.part_b + c * job.features + t.first
    cdef double n = chunk_count(job, c)
    cdef Py_ssize_t f
    cdef int attempt, k
    for f in range(0, t.features, 8):
        k = <int> min(8, t.features - f)
        store(<d8 *> first, f, 8, firsts(job, x, t.start + f * job.inner, k))
    for attempt in range(2):
        memset(pivot + t.columns, 0, PAD * sizeof(double))
        spread(<d8 *> pivot, <d8 *> first, t.features, job.inner, job.fold)
        memset(sum1, 0, (t.columns + PAD) * sizeof(double))
        memset(sum2, 0, (t.columns + PAD) * sizeof(double))
        sum_rows(sum1, sum2, pivot, at(x, t.start), job.width, t.rows, t.columns,
                 job.ahead_rows)
        if t.rest:
            sum_rows(sum1, sum2, pivot, at(x, t.start + t.rows * job.width), job.width, 1, t.rest,
                     0)
        gather(sum1, t.features, job.inner, job.fold)
        gather(sum2, t.features, job.inner, job.fold)
        if not close_chunk(sum1, sum2, t.features, n, mean, m2) or attempt == 1:
            break
        for f in range(t.features):
            if cancelled(m2[f], sum2[f]):
                first[f] += mean[f]
    place_offsets(job, x, mean, first, t.first, t.features)


# --- Parameters by column ------------------------------------------------------------------------

cdef struct Columns:
    Py_ssize_t ahead        # elements from what is read to what is prefetched
    void *unit              # or NULL where every unit is 1
    void *center
    void *scale
    void *shift
    void *slope_g
    void *slope_x
    void *level


cdef inline void *by_column(const Job *job, Tile t, const pack *values,
                            double *buffer) noexcept nogil:
    """A per-feature parameter by column: itself where columns are features, else spread out."""
    if job.fold == 1 and job.inner == 1:
        return <void *> at(values, t.first)
    spread(<pack *> buffer, at(values, t.first), t.features, job.inner, job.fold)
    return buffer


cdef inline Columns forward_columns(const Job *job, const pack *tag, Tile t,
                                    double *buffer) noexcept nogil:
    """Those of the forward; `buffer` has room for 4 * ROOM."""
    cdef Columns p
    p.ahead = job.ahead
    p.unit = NULL
    if job.extreme[0]:
        p.unit = by_column(job, t, <pack *> job.unit, buffer + 3 * ROOM)
    p.center = by_column(job, t, <pack *> job.center, buffer)
    p.scale = by_column(job, t, <pack *> job.scale, buffer + ROOM)
    p.shift = by_column(job, t, <pack *> job.shift, buffer + 2 * ROOM)
    return p


cdef inline pack unit_at(const pack *tag, Py_ssize_t j, int k, Columns p) noexcept nogil:
    return splat(tag, 1) if p.unit == NULL else load(<pack *> p.unit, j, k)


# --- y = (x - center) * scale + shift ------------------------------------------------------------
# A row at a time: the parameters come from L1, and memory sees one stream in and one out.

cdef inline void forward_at(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t stride, int rows,
                            Py_ssize_t j, int k, Columns p) noexcept nogil:
    cdef pack unit = unit_at(x, j, k, p), center = load(<pack *> p.center, j, k)
    cdef pack scale = load(<pack *> p.scale, j, k), shift = load(<pack *> p.shift, j, k)
    cdef int r
    for r in range(rows):
        fetch(a, x, i + r * stride + j + p.ahead)
        forward_pack(a, x, i + r * stride + j, k, unit, center, scale, shift)


cdef inline void forward_span(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t stride, int rows,
                              Py_ssize_t columns, Columns p) noexcept nogil:
    cdef Py_ssize_t j = lead(a, x, i, columns)
    if j > 0:
        forward_at(a, x, i, stride, rows, 0, <int> j, p)
    while j + lanes(x) <= columns:
        forward_at(a, x, i, stride, rows, j, lanes(x), p)
        j += lanes(x)
    if j < columns:
        forward_at(a, x, i, stride, rows, j, <int> (columns - j), p)


cdef inline void forward_tile(Arrays a, const pack *x, Tile t, Py_ssize_t stride, int rows,
                              Columns p) noexcept nogil:
    cdef Py_ssize_t r = 0
    while r + rows <= t.rows:
        forward_span(a, x, t.start + r * stride, stride, rows, t.columns, p)
        r += rows
    while r < t.rows:
        forward_span(a, x, t.start + r * stride, stride, 1, t.columns, p)
        r += 1
    if t.rest:
        forward_span(a, x, t.start + r * stride, stride, 1, t.rest, p)


cdef void forward_rows(const Job *job, Arrays a, const pack *x, Tile t) noexcept nogil:
    cdef double buffer[4 * ROOM]
    cdef Columns p = forward_columns(job, x, t, buffer)
    a.scaled = p.unit != NULL
    if not plain(a):
        forward_tile(a, x, t, job.width, 1, p)
    elif a.stream:
        forward_tile(bare(a, True), x, t, job.width, 1, p)
    else:
        forward_tile(bare(a, False), x, t, job.width, 2, p)


# --- Backward ------------------------------------------------------------------------------------

cdef inline void sum_gradients(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t stride, int rows,
                               Py_ssize_t j, int k, double *sum_g, double *sum_gx,
                               const double *mean) noexcept nogil:
    """sum_g += dy and sum_gx += dy (x - mean) over `rows` rows of columns [j, j + k)."""
    cdef d8 ga = load(<d8 *> sum_g, j, 8), xa = load(<d8 *> sum_gx, j, 8)
    cdef d8 m = load(<d8 *> mean, j, 8), g
    cdef int r
    for r in range(rows):
        g = widen(<pack *> a.dy, i + r * stride + j, k)
        ga = add(ga, g)
        xa = fma(g, d8_less(widen(x, i + r * stride + j, k), m), xa)
    store(<d8 *> sum_g, j, 8, ga)
    store(<d8 *> sum_gx, j, 8, xa)


cdef inline pack masked_at(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t j, int k,
                           Columns p) noexcept nogil:
    return masked(a, x, i, k, unit_at(x, j, k, p), load(<pack *> p.center, j, k),
                  load(<pack *> p.scale, j, k), load(<pack *> p.shift, j, k))


cdef inline void sum_masked_gradients(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t j, int k,
                                      double *sum_g, double *sum_gx, const double *mean,
                                      Columns p) noexcept nogil:
    """The same for one row, with dy masked by the activation; k may be a whole pack."""
    cdef pack g = masked_at(a, x, i + j, j, k, p), u = load(x, i + j, k)
    if pack is f16:
        accumulate(sum_g, sum_gx, mean, j, f16_low(g), f16_low(u))
        accumulate(sum_g, sum_gx, mean, j + 8, f16_high(g), f16_high(u))
    else:
        accumulate(sum_g, sum_gx, mean, j, g, u)


cdef inline void accumulate(double *sum_g, double *sum_gx, const double *mean, Py_ssize_t j,
                            d8 g, d8 x) noexcept nogil:
    store(<d8 *> sum_g, j, 8, add(load(<d8 *> sum_g, j, 8), g))
    store(<d8 *> sum_gx, j, 8,
          fma(g, d8_less(x, load(<d8 *> mean, j, 8)), load(<d8 *> sum_gx, j, 8)))


cdef inline void gradients_span(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t stride, int rows,
                                Py_ssize_t columns, Py_ssize_t ahead, double *sum_g,
                                double *sum_gx, const double *mean) noexcept nogil:
    cdef Py_ssize_t j = 0
    while j + 16 <= columns:
        if rows == ROWS:
            prefetch_rows(at(x, i), stride, ahead + j)
            prefetch_rows(at(<pack *> a.dy, i), stride, ahead + j)
        sum_gradients(a, x, i, stride, rows, j, 8, sum_g, sum_gx, mean)
        sum_gradients(a, x, i, stride, rows, j + 8, 8, sum_g, sum_gx, mean)
        j += 16
    while j < columns:
        sum_gradients(a, x, i, stride, rows, j, <int> min(8, columns - j), sum_g, sum_gx, mean)
        j += 8


cdef void gradients_rows(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                         Py_ssize_t g) noexcept nogil:
    """part_a, part_b <- sum(g) and sum(g (x - mean)) of chunk c of the features of group g."""
    cdef Tile t = tile_of(job, c, g)
    cdef double sum_g[ROOM]
    cdef double sum_gx[ROOM]
    cdef double mean[ROOM]
    cdef double buffer[4 * ROOM]
    cdef Columns p = forward_columns(job, x, t, buffer)
    cdef Py_ssize_t r = 0, i, j, columns
    a.scaled = p.unit != NULL
    memset(sum_g, 0, (t.columns + PAD) * sizeof(double))
    memset(sum_gx, 0, (t.columns + PAD) * sizeof(double))
    memset(mean + t.columns, 0, PAD * sizeof(double))
    spread(<d8 *> mean, <d8 *> (job.mean + t.first), t.features, job.inner, job.fold)
    while r < t.rows + (t.rest > 0):
        i = t.start + r * job.width
        columns = t.columns if r < t.rows else t.rest
        if a.relu:
            j = 0
            while j + lanes(x) <= columns:
                sum_masked_gradients(a, x, i, j, lanes(x), sum_g, sum_gx, mean, p)
                j += lanes(x)
            if j < columns:
                sum_masked_gradients(a, x, i, j, <int> (columns - j), sum_g, sum_gx, mean, p)
            r += 1
        elif r + ROWS <= t.rows:
            gradients_span(a, x, i, job.width, ROWS, columns, job.ahead_rows, sum_g, sum_gx,
                           mean)
            r += ROWS
        else:
            gradients_span(a, x, i, job.width, 1, columns, 0, sum_g, sum_gx, mean)
            r += 1
    gather(sum_g, t.features, job.inner, job.fold)
    gather(sum_gx, t.features, job.inner, job.fold)
    memcpy(job.part_a + c * job.features + t.first, sum_g, t.features * sizeof(double))
    memcpy(job.part_b + c * job.features + t.first, sum_gx, t.features * sizeof(double))


cdef inline void backward_at(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t stride, int rows,
                             Py_ssize_t j, int k, Columns p) noexcept nogil:
    cdef pack unit = unit_at(x, j, k, p), center = load(<pack *> p.center, j, k)
    cdef pack slope_g = load(<pack *> p.slope_g, j, k), slope_x = load(<pack *> p.slope_x, j, k)
    cdef pack level = load(<pack *> p.level, j, k)
    cdef int r
    for r in range(rows):
        fetch(a, x, i + r * stride + j + p.ahead)
        backward_pack(a, x, i + r * stride + j, k, masked_at(a, x, i + r * stride + j, j, k, p),
                      unit, center, slope_g, slope_x, level)


cdef inline void backward_span(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t stride, int rows,
                               Py_ssize_t columns, Columns p) noexcept nogil:
    cdef Py_ssize_t j = lead(a, x, i, columns)
    if j > 0:
        backward_at(a, x, i, stride, rows, 0, <int> j, p)
    while j + lanes(x) <= columns:
        backward_at(a, x, i, stride, rows, j, lanes(x), p)
        j += lanes(x)
    if j < columns:
        backward_at(a, x, i, stride, rows, j, <int> (columns - j), p)


cdef inline void backward_tile(Arrays a, const pack *x, Tile t, Py_ssize_t stride, int rows,
                               Columns p) noexcept nogil:
    cdef Py_ssize_t r = 0
    while r + rows <= t.rows:
        backward_span(a, x, t.start + r * stride, stride, rows, t.columns, p)
        r += rows
    while r < t.rows:
        backward_span(a, x, t.start + r * stride, stride, 1, t.columns, p)
        r += 1
    if t.rest:
        backward_span(a, x, t.start + r * stride, stride, 1, t.rest, p)


cdef void backward_rows(const Job *job, Arrays a, const pack *x, Tile t) noexcept nogil:
    cdef double buffer[7 * ROOM]
    cdef Columns p = forward_columns(job, x, t, buffer)
    a.scaled = p.unit != NULL
    p.slope_g = by_column(job, t, <pack *> job.slope_g, buffer + 4 * ROOM)
    p.slope_x = by_column(job, t, <pack *> job.slope_x, buffer + 5 * ROOM)
    p.level = by_column(job, t, <pack *> job.level, buffer + 6 * ROOM)
    if not plain(a):
        backward_tile(a, x, t, job.width, 1, p)
    elif a.stream:
        backward_tile(bare(a, True), x, t, job.width, 1, p)
    else:
        backward_tile(bare(a, False), x, t, job.width, 2, p)
