# The rows layout, where elements meet their parameters: y, the sums of the backward, and dx.

# --- Parameters by column ------------------------------------------------------------------------

cdef struct Columns:
    Py_ssize_t ahead        # elements from what is read to what is prefetched
    Py_ssize_t step         # `sample_step`
    void *kept              # of the row at hand, where there is a mask
    void *weight            # the same where there are weights
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
    p.step = 0 if one_sample(job) else 1
    p.kept = p.weight = p.slope_g = p.slope_x = p.level = p.unit = NULL
    if job.extreme[0]:
        p.unit = by_column(job, t, <pack *> job.unit, buffer + 3 * ROOM)
    p.center = by_column(job, t, <pack *> job.center, buffer)
    p.scale = by_column(job, t, <pack *> job.scale, buffer + ROOM)
    p.shift = by_column(job, t, <pack *> job.shift, buffer + 2 * ROOM)
    return p


cdef inline Py_ssize_t far(const pack *tag) noexcept nogil:
    """The usual `ahead`, said for the compiler: where every pack read it from the stack, inference
    of (20000, 1000) took 1.4 to 1.6 times as long."""
    return AHEAD * lanes(tag) // 64


cdef inline pack unit_at(const pack *tag, Py_ssize_t j, int k, Columns p) noexcept nogil:
    return splat(tag, 1) if p.unit == NULL else load(<pack *> p.unit, j, k)


cdef inline void samples_of_row(const Job *job, Arrays a, const pack *tag, Tile t, Py_ssize_t r,
                                Columns p) noexcept nogil:
    if a.where != NULL:
        spread_samples(<pack *> p.kept, job, a, t, r, True)
    if a.weights != NULL:
        spread_samples(<pack *> p.weight, job, a, t, r, False)


cdef inline pack kept_column(const pack *tag, Arrays a, Py_ssize_t j, int k,
                             Columns p) noexcept nogil:
    return load(<pack *> p.kept, j * p.step, k) if a.where != NULL else splat(tag, 1)


# --- y = (x - center) * scale + shift ------------------------------------------------------------
# A row at a time: the parameters come from L1, and memory sees one stream in and one out.

cdef inline void forward_at(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t stride, int rows,
                            Py_ssize_t j, int k, Columns p) noexcept nogil:
    cdef pack unit = unit_at(x, j, k, p), center = load(<pack *> p.center, j, k)
    cdef pack scale = load(<pack *> p.scale, j, k), shift = load(<pack *> p.shift, j, k)
    cdef int r
    for r in range(rows):
        fetch(a, x, i + r * stride + j + p.ahead)
        forward_pack(a, x, i + r * stride + j, k, kept_column(x, a, j, k, p), unit, center, scale,
                     shift)


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


cdef inline void forward_tile(const Job *job, Arrays a, const pack *x, Tile t, int rows,
                              Columns p) noexcept nogil:
    cdef Py_ssize_t r = 0
    while r + rows <= t.rows:
        samples_of_row(job, a, x, t, r, p)
        forward_span(a, x, t.start + r * job.width, job.width, rows, t.columns, p)
        r += rows
    while r < t.rows:
        forward_span(a, x, t.start + r * job.width, job.width, 1, t.columns, p)
        r += 1
    if t.rest:
        samples_of_row(job, a, x, t, r, p)
        forward_span(a, x, t.start + r * job.width, job.width, 1, t.rest, p)


cdef inline void forward_kept(const Job *job, Arrays a, const pack *x, Tile t,
                              Columns p) noexcept nogil:
    if plain_but_mask(a):
        forward_tile(job, bare_but_mask(a), x, t, 1, p)
    elif plain_but_omit(a):
        forward_tile(job, bare_but_omit(a), x, t, 1, p)
    elif not plain(a):
        forward_tile(job, a, x, t, 1, p)
    elif a.stream and p.ahead == far(x):
        p.ahead = far(x)
        forward_tile(job, bare(a, True), x, t, 1, p)
    elif a.stream:
        forward_tile(job, bare(a, True), x, t, 1, p)
    else:
        forward_tile(job, bare(a, False), x, t, 2, p)


cdef inline void clear_rows(void *y, const pack *tag, Tile t, Py_ssize_t stride) noexcept nogil:
    """y <- 0"""
    cdef Py_ssize_t r
    for r in range(t.rows):
        memset(at(<pack *> y, t.start + r * stride), 0, t.columns * (64 // lanes(tag)))


cdef void forward_rows(const Job *job, Arrays a, const pack *x, Tile t) noexcept nogil:
    cdef double buffer[4 * ROOM]
    cdef double kept[ROOM]
    cdef Columns p = forward_columns(job, x, t, buffer)
    cdef Tile run = t
    cdef Kept which = SOME
    cdef bint by_rows = a.where != NULL and one_sample(job)
    cdef Py_ssize_t r = 0
    p.kept = kept
    a.weights = NULL                        # y does not depend on them
    a.scaled = p.unit != NULL
    while True:
        if by_rows:
            run = next_rows(a, t, job.width, &r, &which)
        if which == NONE:
            clear_rows(a.y, x, run, job.width)
        else:
            forward_kept(job, without_mask(a) if which == ALL else a, x, run, p)
        if not by_rows or r >= t.rows:
            return


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
    return masked(a, x, i, k, kept_column(x, a, j, k, p), unit_at(x, j, k, p),
                  load(<pack *> p.center, j, k), load(<pack *> p.scale, j, k),
                  load(<pack *> p.shift, j, k))


cdef inline void sum_masked_gradients(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t j, int k,
                                      double *sum_g, double *sum_gx, const double *mean,
                                      Columns p) noexcept nogil:
    """The same for one row, with dy masked by activation and mask; k may be a whole pack."""
    cdef pack g = masked_at(a, x, i + j, j, k, p), u = load(x, i + j, k)
    u = kept_only(a, kept_column(x, a, j, k, p), u, u)
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


cdef inline void add_gradients(const Job *job, Arrays a, const pack *x, Tile t, double *sum_g,
                               double *sum_gx, const double *mean, Columns p) noexcept nogil:
    """The rows of a tile."""
    cdef Py_ssize_t r = 0, i, j, columns
    while r < t.rows + (t.rest > 0):
        i = t.start + r * job.width
        columns = t.columns if r < t.rows else t.rest
        if a.relu or a.where != NULL or a.omit:
            if a.where != NULL:
                spread_samples(<pack *> p.kept, job, a, t, r, True)
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


cdef void add_gradients_of(const Job *job, Arrays a, const pack *x, Tile t, double *sum_g,
                           double *sum_gx, const double *mean, Columns p) noexcept nogil:
    a.weights = NULL                        # which have no part in these sums
    if plain_but_mask(a):
        add_gradients(job, bare_but_mask(a), x, t, sum_g, sum_gx, mean, p)
    elif plain_but_omit(a):
        add_gradients(job, bare_but_omit(a), x, t, sum_g, sum_gx, mean, p)
    else:
        add_gradients(job, a, x, t, sum_g, sum_gx, mean, p)


cdef void gradients_rows(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                         Py_ssize_t g) noexcept nogil:
    """part_a, part_b <- sum(g) and sum(g (x - mean)) of chunk c of the features of group g."""
    cdef Tile t = tile_of(job, c, g), run
    cdef double sum_g[ROOM]
    cdef double sum_gx[ROOM]
    cdef double mean[ROOM]
    cdef double buffer[4 * ROOM]
    cdef double kept[ROOM]
    cdef Columns p = forward_columns(job, x, t, buffer)
    cdef Kept which
    cdef Py_ssize_t r = 0
    p.kept = kept
    a.scaled = p.unit != NULL
    memset(sum_g, 0, (t.columns + PAD) * sizeof(double))
    memset(sum_gx, 0, (t.columns + PAD) * sizeof(double))
    memset(mean + t.columns, 0, PAD * sizeof(double))
    spread(<d8 *> mean, <d8 *> (job.mean + t.first), t.features, job.inner, job.fold)
    if a.where == NULL or not one_sample(job):
        add_gradients_of(job, a, x, t, sum_g, sum_gx, mean, p)
    else:
        while r < t.rows:
            run = next_rows(a, t, job.width, &r, &which)
            if which != NONE:
                add_gradients_of(job, a if which == SOME else without_mask(a), x, run, sum_g,
                                 sum_gx, mean, p)
    gather(sum_g, t.features, job.inner, job.fold)
    gather(sum_gx, t.features, job.inner, job.fold)
    memcpy(job.part_a + c * job.features + t.first, sum_g, t.features * sizeof(double))
    memcpy(job.part_b + c * job.features + t.first, sum_gx, t.features * sizeof(double))


cdef inline void backward_at(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t stride, int rows,
                             Py_ssize_t j, int k, Columns p) noexcept nogil:
    cdef pack unit = unit_at(x, j, k, p), center = load(<pack *> p.center, j, k)
    cdef pack slope_g = load(<pack *> p.slope_g, j, k), slope_x = load(<pack *> p.slope_x, j, k)
    cdef pack level = load(<pack *> p.level, j, k), weight = splat(x, 1)
    cdef int r
    if a.weights != NULL:
        weight = load(<pack *> p.weight, j * p.step, k)
    for r in range(rows):
        fetch(a, x, i + r * stride + j + p.ahead)
        backward_pack(a, x, i + r * stride + j, k, masked_at(a, x, i + r * stride + j, j, k, p),
                      kept_column(x, a, j, k, p), weight, unit, center, slope_g, slope_x, level)


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


cdef inline void backward_tile(const Job *job, Arrays a, const pack *x, Tile t, int rows,
                               Columns p) noexcept nogil:
    cdef Py_ssize_t r = 0
    while r + rows <= t.rows:
        samples_of_row(job, a, x, t, r, p)
        backward_span(a, x, t.start + r * job.width, job.width, rows, t.columns, p)
        r += rows
    while r < t.rows:
        backward_span(a, x, t.start + r * job.width, job.width, 1, t.columns, p)
        r += 1
    if t.rest:
        samples_of_row(job, a, x, t, r, p)
        backward_span(a, x, t.start + r * job.width, job.width, 1, t.rest, p)


cdef inline void backward_kept(const Job *job, Arrays a, const pack *x, Tile t,
                               Columns p) noexcept nogil:
    if plain_but_mask(a):
        backward_tile(job, bare_but_mask(a), x, t, 1, p)
    elif plain_but_omit(a):
        backward_tile(job, bare_but_omit(a), x, t, 1, p)
    elif not plain(a):
        backward_tile(job, a, x, t, 1, p)
    elif a.stream and p.ahead == far(x):
        p.ahead = far(x)
        backward_tile(job, bare(a, True), x, t, 1, p)
    elif a.stream:
        backward_tile(job, bare(a, True), x, t, 1, p)
    else:
        backward_tile(job, bare(a, False), x, t, 2, p)


cdef void backward_rows(const Job *job, Arrays a, const pack *x, Tile t) noexcept nogil:
    cdef double buffer[7 * ROOM]
    cdef double kept[ROOM]
    cdef double weight[ROOM]
    cdef Columns p = forward_columns(job, x, t, buffer)
    cdef Tile run = t
    cdef Kept which = SOME
    cdef bint by_rows = a.where != NULL and one_sample(job)
    cdef Py_ssize_t r = 0
    p.kept, p.weight = kept, weight
    a.scaled = p.unit != NULL
    p.slope_g = by_column(job, t, <pack *> job.slope_g, buffer + 4 * ROOM)
    p.slope_x = by_column(job, t, <pack *> job.slope_x, buffer + 5 * ROOM)
    p.level = by_column(job, t, <pack *> job.level, buffer + 6 * ROOM)
    while True:
        if by_rows:
            run = next_rows(a, t, job.width, &r, &which)
        if which == NONE:
            clear_rows(a.y, x, run, job.width)
            if a.dresidual != NULL:
                clear_rows(a.dresidual, x, run, job.width)
        else:
            backward_kept(job, without_mask(a) if which == ALL else a, x, run, p)
        if not by_rows or r >= t.rows:
            return
