# The rows layout: a matrix whose columns each have accumulators of their own.
#
# The reductions take ROWS rows at a time and, column by column, keep the accumulators in
# registers over them: a row at a time would load and store as much state as data, and many more
# rows would be more streams than a prefetcher follows. The rows after next are prefetched by
# hand; without it, (n, 512) float32 was summed at 11 GB/s from memory, with it at 24.

cdef enum:
    ROWS = 4
    PAD = 16            # so that a part of a pack at the end of a tile has somewhere to go


cdef void spread(pack *columns, const pack *values, Py_ssize_t features, Py_ssize_t inner,
                 Py_ssize_t fold) noexcept nogil:
    """One value per feature -> one value per column of a tile."""
    cdef Py_ssize_t k, f, i, j = 0
    for k in range(fold):
        for f in range(features):
            for i in range(inner):
                put(columns, j, element(values, f))
                j += 1


cdef double gather(const double *columns, Py_ssize_t f, Py_ssize_t features, Py_ssize_t inner,
                   Py_ssize_t fold) noexcept nogil:
    """The sum of feature f's columns."""
    cdef Py_ssize_t k, i
    cdef double total = 0
    for k in range(fold):
        for i in range(inner):
            total += columns[(k * features + f) * inner + i]
    return total


cdef inline void sum_columns(double *sum1, double *sum2, const double *pivot, const pack *x,
                             Py_ssize_t stride, int rows, Py_ssize_t j, int k) noexcept nogil:
    """sum1 += x - pivot and sum2 += (x - pivot)^2 over `rows` rows of columns [j, j + k)."""
    cdef d8 a = load(<const d8 *> sum1, j, 8), b = load(<const d8 *> sum2, j, 8)
    cdef d8 p = load(<const d8 *> pivot, j, 8), d
    cdef int r
    for r in range(rows):
        d = sub(widen(x, r * stride + j, k), p)
        a = add(a, d)
        b = fma(d, d, b)
    store(<d8 *> sum1, j, 8, a)
    store(<d8 *> sum2, j, 8, b)


cdef void sum_rows(double *sum1, double *sum2, const double *pivot, const pack *x,
                   Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns) noexcept nogil:
    cdef Py_ssize_t r, j, whole = columns - columns % 16
    cdef const pack *row
    for r in range(rows // ROWS):
        row = at(x, r * ROWS * stride)
        for j in range(0, whole, 16):
            prefetch_rows(row, stride, ROWS * stride + j)
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


cdef inline Tile tile_of(const Job *job, Py_ssize_t c, Py_ssize_t g) noexcept nogil:
    cdef Tile t
    t.first = g * job.group
    t.features = min(job.group, job.features - t.first)
    t.columns = t.features * job.inner * job.fold
    t.start = c * job.chunk * job.width + t.first * job.inner
    t.rows = min(job.chunk, job.length - c * job.chunk)
    t.rest = job.rest if c == job.chunks - 1 else 0
    return t


cdef void moments_rows(const Job *job, const pack *x, Py_ssize_t c, Py_ssize_t g) noexcept nogil:
    """part_a, part_b <- moments of chunk c of the features of group g."""
    cdef Tile t = tile_of(job, c, g)
    cdef double pivot[TILE + PAD]
    cdef double sum1[TILE + PAD]
    cdef double sum2[TILE + PAD]
    cdef double first[TILE]
    cdef double *mean = job.part_a + c * job.features + t.first
    cdef double *m2 = job.part_b + c * job.features + t.first
    cdef double offset, n = chunk_count(job, c)
    cdef Py_ssize_t f, attempt
    cdef bint again = False
    cdef bint direct = job.fold == 1 and job.inner == 1
    for f in range(t.features):
        first[f] = finite_or_zero(element(x, t.start + f * job.inner))
    for attempt in range(2):
        memset(pivot + (t.columns & ~7), 0, 8 * sizeof(double))
        spread(<d8 *> pivot, <d8 *> first, t.features, job.inner, job.fold)
        memset(sum1, 0, (t.columns + 8) * sizeof(double))
        memset(sum2, 0, (t.columns + 8) * sizeof(double))
        sum_rows(sum1, sum2, pivot, at(x, t.start), job.width, t.rows, t.columns)
        if t.rest:
            sum_rows(sum1, sum2, pivot, at(x, t.start + t.rows * job.width), job.width, 1, t.rest)
        again = False
        for f in range(t.features):
            if not direct:
                sum1[f] = gather(sum1, f, t.features, job.inner, job.fold)
                sum2[f] = gather(sum2, f, t.features, job.inner, job.fold)
            offset = first[f] - origin(job, x, t.first + f)
            if close_chunk(sum1[f], sum2[f], n, &mean[f], &m2[f]) and attempt == 0:
                first[f] += mean[f]
                again = True
            mean[f] += offset
        if not again:
            break


# --- y = (x - center) * scale + shift ----------------------------------------------------------

cdef inline void forward_pack(const Job *job, pack *y, const pack *x, const pack *residual,
                              Py_ssize_t i, int k, pack center, pack scale,
                              pack shift) noexcept nogil:
    cdef pack value = fma(sub(load(x, i, k), center), scale, shift)
    if residual != NULL:
        value = add(value, load(residual, i, k))
    if job.relu:
        value = relu(value)
    store(y, i, k, value)


cdef inline void forward_columns(const Job *job, pack *y, const pack *x, const pack *residual,
                                 const pack *center, const pack *scale, const pack *shift,
                                 Py_ssize_t i, int rows, Py_ssize_t j, int k) noexcept nogil:
    cdef pack m = load(center, j, k), s = load(scale, j, k), b = load(shift, j, k)
    cdef int r
    for r in range(rows):
        forward_pack(job, y, x, residual, i + r * job.width + j, k, m, s, b)


cdef inline void forward_row(const Job *job, pack *y, const pack *x, const pack *residual,
                             const pack *center, const pack *scale, const pack *shift,
                             Py_ssize_t i, int rows, Py_ssize_t columns) noexcept nogil:
    cdef Py_ssize_t j = 0
    while j + lanes(x) <= columns:
        forward_columns(job, y, x, residual, center, scale, shift, i, rows, j, lanes(x))
        j += lanes(x)
    if j < columns:
        forward_columns(job, y, x, residual, center, scale, shift, i, rows, j, <int> (columns - j))


cdef inline pack *of_columns(const Job *job, Tile t, const pack *values,
                             pack *buffer) noexcept nogil:
    """A per-feature parameter by column: itself where columns are features, else spread out."""
    if job.fold == 1 and job.inner == 1:
        return at(values, t.first)
    spread(buffer, at(values, t.first), t.features, job.inner, job.fold)
    return buffer


cdef void forward_rows(const Job *job, pack *y, const pack *x, const pack *residual,
                       Py_ssize_t c, Py_ssize_t g) noexcept nogil:
    cdef Tile t = tile_of(job, c, g)
    cdef double buffer[3 * TILE]
    cdef pack *center = of_columns(job, t, <pack *> job.center, <pack *> &buffer[0])
    cdef pack *scale = of_columns(job, t, <pack *> job.scale, <pack *> &buffer[TILE])
    cdef pack *shift = of_columns(job, t, <pack *> job.shift, <pack *> &buffer[2 * TILE])
    cdef Py_ssize_t r
    for r in range(0, t.rows - 1, 2):
        forward_row(job, y, x, residual, center, scale, shift,
                    t.start + r * job.width, 2, t.columns)
    if t.rows % 2:
        forward_row(job, y, x, residual, center, scale, shift,
                    t.start + (t.rows - 1) * job.width, 1, t.columns)
    if t.rest:
        forward_row(job, y, x, residual, center, scale, shift,
                    t.start + t.rows * job.width, 1, t.rest)


# --- Backward ------------------------------------------------------------------------------------

cdef inline pack masked(const Job *job, const pack *dy, const pack *x, const pack *residual,
                        Py_ssize_t i, int k, pack center, pack scale, pack shift) noexcept nogil:
    """g = dy where the activation let the value through: the forward's own arithmetic again."""
    cdef pack g = load(dy, i, k), value
    if job.relu:
        value = fma(sub(load(x, i, k), center), scale, shift)
        if residual != NULL:
            value = add(value, load(residual, i, k))
        g = where_positive(value, g)
    return g


cdef inline void accumulate(double *sum_g, double *sum_gx, const double *mean, Py_ssize_t j,
                            int k, d8 g, d8 x) noexcept nogil:
    cdef d8 a = load(<const d8 *> sum_g, j, k), b = load(<const d8 *> sum_gx, j, k)
    store(<d8 *> sum_g, j, k, add(a, g))
    store(<d8 *> sum_gx, j, k, fma(g, sub(x, load(<const d8 *> mean, j, k)), b))


cdef inline void accumulate_row(const Job *job, double *sum_g, double *sum_gx, const double *mean,
                                const pack *center, const pack *scale, const pack *shift,
                                const pack *dy, const pack *x, const pack *residual,
                                Py_ssize_t i, Py_ssize_t j, int k) noexcept nogil:
    cdef pack m = load(center, j, k), s = load(scale, j, k), b = load(shift, j, k)
    cdef pack g = masked(job, dy, x, residual, i + j, k, m, s, b)
    cdef pack u = load(x, i + j, k)
    if pack is f16:
        accumulate(sum_g, sum_gx, mean, j, min(k, 8), f16_low(g), f16_low(u))
        if k > 8:
            accumulate(sum_g, sum_gx, mean, j + 8, k - 8, f16_high(g), f16_high(u))
    else:
        accumulate(sum_g, sum_gx, mean, j, k, g, u)


cdef void gradients_rows(const Job *job, const pack *dy, const pack *x, const pack *residual,
                         Py_ssize_t c, Py_ssize_t g) noexcept nogil:
    """part_a, part_b <- sum(g) and sum(g (x - mean)) of chunk c of the features of group g."""
    cdef Tile t = tile_of(job, c, g)
    cdef double sum_g[TILE]
    cdef double sum_gx[TILE]
    cdef double buffer[4 * TILE]
    cdef pack *center = of_columns(job, t, <pack *> job.center, <pack *> &buffer[0])
    cdef pack *scale = of_columns(job, t, <pack *> job.scale, <pack *> &buffer[TILE])
    cdef pack *shift = of_columns(job, t, <pack *> job.shift, <pack *> &buffer[2 * TILE])
    cdef double *mean = <double *> of_columns(job, t, <d8 *> job.mean, <d8 *> &buffer[3 * TILE])
    cdef double *part_a = job.part_a + c * job.features + t.first
    cdef double *part_b = job.part_b + c * job.features + t.first
    cdef Py_ssize_t r, j, i, f, columns
    memset(sum_g, 0, t.columns * sizeof(double))
    memset(sum_gx, 0, t.columns * sizeof(double))
    for r in range(t.rows + (t.rest > 0)):
        i = t.start + r * job.width
        columns = t.columns if r < t.rows else t.rest
        j = 0
        while j + lanes(x) <= columns:
            accumulate_row(job, sum_g, sum_gx, mean, center, scale, shift, dy, x, residual,
                           i, j, lanes(x))
            j += lanes(x)
        if j < columns:
            accumulate_row(job, sum_g, sum_gx, mean, center, scale, shift, dy, x, residual,
                           i, j, <int> (columns - j))
    for f in range(t.features):
        part_a[f] = gather(sum_g, f, t.features, job.inner, job.fold)
        part_b[f] = gather(sum_gx, f, t.features, job.inner, job.fold)


cdef inline void backward_pack(const Job *job, pack *dx, pack *dresidual, const pack *x,
                               Py_ssize_t i, int k, pack g, pack center, pack slope_g,
                               pack slope_x, pack level) noexcept nogil:
    cdef pack value
    if job.operation == FROZEN:
        value = mul(g, slope_g)
    else:
        value = fma(g, slope_g, fma(sub(load(x, i, k), center), slope_x, level))
    if dresidual != NULL:
        store(dresidual, i, k, g)
    store(dx, i, k, value)


cdef void backward_rows(const Job *job, pack *dx, pack *dresidual, const pack *dy, const pack *x,
                        const pack *residual, Py_ssize_t c, Py_ssize_t g) noexcept nogil:
    cdef Tile t = tile_of(job, c, g)
    cdef double buffer[6 * TILE]
    cdef pack *center = of_columns(job, t, <pack *> job.center, <pack *> &buffer[0])
    cdef pack *scale = of_columns(job, t, <pack *> job.scale, <pack *> &buffer[TILE])
    cdef pack *shift = of_columns(job, t, <pack *> job.shift, <pack *> &buffer[2 * TILE])
    cdef pack *slope_g = of_columns(job, t, <pack *> job.slope_g, <pack *> &buffer[3 * TILE])
    cdef pack *slope_x = of_columns(job, t, <pack *> job.slope_x, <pack *> &buffer[4 * TILE])
    cdef pack *level = of_columns(job, t, <pack *> job.level, <pack *> &buffer[5 * TILE])
    cdef Py_ssize_t r, j, i, columns
    cdef int k
    cdef pack m
    for r in range(t.rows + (t.rest > 0)):
        i = t.start + r * job.width
        columns = t.columns if r < t.rows else t.rest
        j = 0
        while j < columns:
            k = <int> min(lanes(x), columns - j)
            m = load(center, j, k)
            backward_pack(job, dx, dresidual, x, i + j, k,
                          masked(job, dy, x, residual, i + j, k, m, load(scale, j, k),
                                 load(shift, j, k)),
                          m, load(slope_g, j, k), load(slope_x, j, k), load(level, j, k))
            j += lanes(x)
