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
    Py_ssize_t row          # that row
    Py_ssize_t rows         # whole rows of the chunk
    Py_ssize_t rest         # columns of the shorter row that follows them, or 0


cdef inline Tile tile_of_rows(const Job *job, Py_ssize_t r0, Py_ssize_t r1, Py_ssize_t f0,
                              Py_ssize_t f1) noexcept nogil:
    """Features [f0, f1) of rows [r0, r1)."""
    cdef Tile t
    t.first = f0
    t.features = f1 - f0
    t.columns = t.features * job.inner * job.fold
    t.row = r0
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
        if not close_chunk(sum1, sum2, t.features, NULL, n, mean, m2) or attempt == 1:
            break
        for f in range(t.features):
            if cancelled(m2[f], sum2[f]):
                first[f] += mean[f]
    place_offsets(job, x, mean, first, t.first, t.features)
