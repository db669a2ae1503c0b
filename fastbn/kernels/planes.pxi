# The planes layout: a feature is `outer` runs of `inner` contiguous elements. Its parameters are
# the same for a whole run, and a run is summed in registers.
#
# Neighbouring features are taken together where runs are short, run beside run as memory lies,
# and the same place in the next sample is prefetched: a run of 196 float32 and then a jump is too
# short for the hardware to see a pattern.

cdef struct Block:
    Py_ssize_t first        # its first feature
    Py_ssize_t features
    Py_ssize_t start        # element where its chunk's first run begins
    Py_ssize_t sample       # the sample that this is
    Py_ssize_t length       # of a run
    Py_ssize_t runs         # of a feature
    Py_ssize_t stride       # elements from a run to the feature's next
    Py_ssize_t near         # elements from one to what is prefetched with it, within a run
    Py_ssize_t far          # the same for the last `near` of it: the start of the next one


cdef inline Block block_of(const Job *job, Py_ssize_t c, Py_ssize_t g) noexcept nogil:
    cdef Block t
    cdef Py_ssize_t pieces = ceil_div(job.inner, job.piece)
    cdef Py_ssize_t run = c // pieces * job.runs, within = c % pieces * job.piece
    t.first = first_of(job, g)
    t.features = first_of(job, g + 1) - t.first
    t.stride = job.features * job.inner
    t.start = run * t.stride + t.first * job.inner + within
    t.sample = run * job.inner + within
    t.length = min(job.piece, job.inner - within)
    t.runs = min(job.runs, job.outer - run)
    t.near = min(t.length, job.near)
    t.far = t.near
    if within + t.length == job.inner:
        t.far += t.stride - job.inner
    return t


cdef inline Py_ssize_t sample_of(const Job *job, Block t, Py_ssize_t r,
                                 Py_ssize_t i) noexcept nogil:
    """What to add to an element's number to get its sample's: in run r, which begins at i."""
    return t.sample + r * job.inner - i


cdef struct Lanes:
    # Sums of a feature, in two packs each so that one multiply-add need not wait for the last.
    d8 a
    d8 b
    d8 a2
    d8 b2


cdef inline Lanes no_sums() noexcept nogil:
    cdef Lanes s
    s.a = s.b = s.a2 = s.b2 = d8_splat(0)
    return s


cdef inline Lanes sum_part(Lanes s, const pack *x, Py_ssize_t i, Py_ssize_t end,
                           Py_ssize_t ahead, double pivot) noexcept nogil:
    """sum(x - pivot) and sum((x - pivot)^2) of elements [i, end), added to s."""
    cdef d8 p = d8_splat(pivot), u, v
    cdef int k
    while i + 16 <= end:
        fastbn_prefetch(at(x, i + ahead))
        if pack is d8:                      # 16 elements are two cache lines
            fastbn_prefetch(at(x, i + ahead + 8))
        u = d8_less(widen(x, i, 8), p)
        v = d8_less(widen(x, i + 8, 8), p)
        s.a = add(s.a, u)
        s.b = add(s.b, v)
        s.a2 = fma(u, u, s.a2)
        s.b2 = fma(v, v, s.b2)
        i += 16
    while i < end:
        k = <int> min(8, end - i)
        u = d8_keep(d8_less(widen(x, i, k), p), k)
        s.a = add(s.a, u)
        s.a2 = fma(u, u, s.a2)
        i += 8
    return s


cdef inline Lanes sum_run(Lanes s, const pack *x, Block t, Py_ssize_t i,
                          double pivot) noexcept nogil:
    """The same of a run, whose last part prefetches the next run's first."""
    cdef Py_ssize_t middle = i + (t.length - t.near) // 16 * 16
    if middle > i:
        s = sum_part(s, x, i, middle, t.near, pivot)
    return sum_part(s, x, middle, i + t.length, t.far, pivot)


cdef void moments_planes(const Job *job, const pack *x, Py_ssize_t c, Py_ssize_t g) noexcept nogil:
    """part_a, part_b <- moments of chunk c of the features of group g."""
    cdef Block t = block_of(job, c, g)
    cdef Lanes sums[GROUP]
    cdef double pivot[GROUP]
    cdef double sum1[GROUP]
    cdef double sum2[GROUP]
    cdef double *mean = job.part_a + c * job.features + t.first
    cdef double *m2 = job.part_b + c * job.features + t.first
    cdef Py_ssize_t r, f, i
    cdef int attempt, k
    for f in range(0, t.features, 8):
        k = <int> min(8, t.features - f)
        store(<d8 *> pivot, f, 8, firsts(job, x, t.start + f * job.inner, k))
    for attempt in range(2):
        for f in range(t.features):
            sums[f] = no_sums()
        for r in range(t.runs):
            for f in range(t.features):
                i = t.start + r * t.stride + f * job.inner
                sums[f] = sum_run(sums[f], x, t, i, pivot[f])
        for f in range(t.features):
            sum1[f] = d8_sum(add(sums[f].a, sums[f].b))
            sum2[f] = d8_sum(add(sums[f].a2, sums[f].b2))
        if (not close_chunk(sum1, sum2, t.features, NULL, t.length * t.runs, mean, m2)
                or attempt == 1):
            break
        for f in range(t.features):
            if cancelled(m2[f], sum2[f]):
                pivot[f] += mean[f]
    place_offsets(job, x, mean, pivot, t.first, t.features)


# --- y = (x - center) * scale + shift ------------------------------------------------------------

cdef inline void forward_run(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t end,
                             Py_ssize_t ahead, Py_ssize_t to_sample, pack unit, pack center,
                             pack scale, pack shift) noexcept nogil:
    cdef int k = lead(a, x, i, end - i)
    if k > 0:
        forward_pack(a, x, i, k, kept_at(a, x, i + to_sample, k), unit, center, scale, shift)
        i += k
    while i + lanes(x) <= end:
        fetch(a, x, i + ahead)
        if a.where != NULL and all_kept(a, x, i + to_sample):
            forward_pack(without_mask(a), x, i, lanes(x), unit, unit, center, scale, shift)
        else:
            forward_pack(a, x, i, lanes(x), kept_at(a, x, i + to_sample, lanes(x)), unit, center,
                         scale, shift)
        i += lanes(x)
    if i < end:
        k = <int> (end - i)
        forward_pack(a, x, i, k, kept_at(a, x, i + to_sample, k), unit, center, scale, shift)


cdef inline pack parameter(const pack *values, Py_ssize_t f) noexcept nogil:
    return splat(values, element(values, f))


cdef inline void forward_block(const Job *job, Arrays a, const pack *x, Block t) noexcept nogil:
    cdef Py_ssize_t r, f, i
    for r in range(t.runs):
        for f in range(t.first, t.first + t.features):
            i = t.start + r * t.stride + (f - t.first) * job.inner
            forward_run(a, x, i, i + t.length, job.ahead, sample_of(job, t, r, i),
                        parameter(<pack *> job.unit, f),
                        parameter(<pack *> job.center, f), parameter(<pack *> job.scale, f),
                        parameter(<pack *> job.shift, f))


cdef void forward_planes(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                         Py_ssize_t g) noexcept nogil:
    cdef Block t = block_of(job, c, g)
    a.weights = NULL                        # y does not depend on them
    a.scaled = job.extreme[0]
    if plain_but_mask(a):
        forward_block(job, bare_but_mask(a), x, t)
    elif plain_but_omit(a):
        forward_block(job, bare_but_omit(a), x, t)
    elif not plain(a):
        forward_block(job, a, x, t)
    elif a.stream:
        forward_block(job, bare(a, True), x, t)
    else:
        forward_block(job, bare(a, False), x, t)


# --- Backward ------------------------------------------------------------------------------------

cdef inline Lanes sum_gradients_part(Lanes s, Arrays a, const pack *x, Py_ssize_t i,
                                     Py_ssize_t end, Py_ssize_t ahead, Py_ssize_t to_sample,
                                     double mean, pack unit, pack center, pack scale,
                                     pack shift) noexcept nogil:
    """sum(g) and sum(g (x - mean)) of elements [i, end), added to s."""
    cdef d8 m = d8_splat(mean)
    cdef pack g, u, kept
    cdef d8 v
    cdef int k
    while not a.relu and not chosen(a) and i + 16 <= end:
        fastbn_prefetch(at(x, i + ahead))
        fastbn_prefetch(at(<pack *> a.dy, i + ahead))
        if pack is d8:
            fastbn_prefetch(at(x, i + ahead + 8))
            fastbn_prefetch(at(<pack *> a.dy, i + ahead + 8))
        v = widen(<pack *> a.dy, i, 8)
        s.a = add(s.a, v)
        s.a2 = fma(v, d8_less(widen(x, i, 8), m), s.a2)
        v = widen(<pack *> a.dy, i + 8, 8)
        s.b = add(s.b, v)
        s.b2 = fma(v, d8_less(widen(x, i + 8, 8), m), s.b2)
        i += 16
    while i < end:
        fastbn_prefetch(at(x, i + ahead))
        fastbn_prefetch(at(<pack *> a.dy, i + ahead))
        # Lanes beyond the end have g = 0, and add nothing.
        k = <int> min(lanes(x), end - i)
        kept = kept_at(a, x, i + to_sample, k)
        g = masked(a, x, i, k, kept, unit, center, scale, shift)
        u = load(x, i, k)
        u = kept_only(a, kept, u, u)
        if pack is f16:
            s.a = add(s.a, f16_low(g))
            s.b = add(s.b, f16_high(g))
            s.a2 = fma(f16_low(g), d8_less(f16_low(u), m), s.a2)
            s.b2 = fma(f16_high(g), d8_less(f16_high(u), m), s.b2)
        else:
            s.a = add(s.a, g)
            s.a2 = fma(g, d8_less(u, m), s.a2)
        i += lanes(x)
    return s


cdef inline Lanes sum_gradients_run(Lanes s, const Job *job, Arrays a, const pack *x, Block t,
                                    Py_ssize_t i, Py_ssize_t to_sample,
                                    Py_ssize_t f) noexcept nogil:
    cdef Py_ssize_t middle = i + (t.length - t.near) // 16 * 16
    cdef pack unit = parameter(<pack *> job.unit, f), center = parameter(<pack *> job.center, f)
    cdef pack scale = parameter(<pack *> job.scale, f), shift = parameter(<pack *> job.shift, f)
    if middle > i:
        s = sum_gradients_part(s, a, x, i, middle, t.near, to_sample, job.mean[f], unit, center,
                               scale, shift)
    return sum_gradients_part(s, a, x, middle, i + t.length, t.far, to_sample, job.mean[f], unit,
                              center, scale, shift)


cdef inline void sum_gradients_block(Lanes *sums, const Job *job, Arrays a, const pack *x,
                                     Block t) noexcept nogil:
    cdef Py_ssize_t r, i, n
    for r in range(t.runs):
        for n in range(t.features):
            i = t.start + r * t.stride + n * job.inner
            sums[n] = sum_gradients_run(sums[n], job, a, x, t, i, sample_of(job, t, r, i),
                                        t.first + n)


cdef void gradients_planes(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                           Py_ssize_t g) noexcept nogil:
    """part_a, part_b <- sum(g) and sum(g (x - mean)) of chunk c of the features of group g."""
    cdef Block t = block_of(job, c, g)
    cdef Lanes sums[GROUP]
    cdef Py_ssize_t f, n
    a.scaled = job.extreme[0]
    a.weights = NULL                        # which have no part in these sums
    for f in range(t.features):
        sums[f] = no_sums()
    if plain_but_mask(a):
        sum_gradients_block(sums, job, bare_but_mask(a), x, t)
    elif plain_but_omit(a):
        sum_gradients_block(sums, job, bare_but_omit(a), x, t)
    else:
        sum_gradients_block(sums, job, a, x, t)
    for n in range(t.features):
        job.part_a[c * job.features + t.first + n] = d8_sum(add(sums[n].a, sums[n].b))
        job.part_b[c * job.features + t.first + n] = d8_sum(add(sums[n].a2, sums[n].b2))


cdef inline void backward_at_run(Arrays a, const pack *x, Py_ssize_t i, int k, Py_ssize_t s,
                                 pack unit, pack center, pack scale, pack shift, pack slope_g,
                                 pack slope_x, pack level) noexcept nogil:
    cdef pack kept = kept_at(a, x, s, k)
    backward_pack(a, x, i, k, masked(a, x, i, k, kept, unit, center, scale, shift), kept,
                  share_at(a, x, s, k), unit, center, slope_g, slope_x, level)


cdef inline void backward_run(Arrays a, const pack *x, Py_ssize_t i, Py_ssize_t end,
                              Py_ssize_t ahead, Py_ssize_t to_sample, pack unit, pack center,
                              pack scale, pack shift, pack slope_g, pack slope_x,
                              pack level) noexcept nogil:
    cdef int k = lead(a, x, i, end - i)
    if k > 0:
        backward_at_run(a, x, i, k, i + to_sample, unit, center, scale, shift, slope_g, slope_x,
                        level)
        i += k
    while i + lanes(x) <= end:
        fetch(a, x, i + ahead)
        if a.where != NULL and all_kept(a, x, i + to_sample):
            backward_at_run(without_mask(a), x, i, lanes(x), i + to_sample, unit, center, scale,
                            shift, slope_g, slope_x, level)
        else:
            backward_at_run(a, x, i, lanes(x), i + to_sample, unit, center, scale, shift, slope_g,
                            slope_x, level)
        i += lanes(x)
    if i < end:
        backward_at_run(a, x, i, <int> (end - i), i + to_sample, unit, center, scale, shift,
                        slope_g, slope_x, level)


cdef inline void backward_block(const Job *job, Arrays a, const pack *x, Block t) noexcept nogil:
    cdef Py_ssize_t r, f, i
    for r in range(t.runs):
        for f in range(t.first, t.first + t.features):
            i = t.start + r * t.stride + (f - t.first) * job.inner
            backward_run(a, x, i, i + t.length, job.ahead, sample_of(job, t, r, i),
                         parameter(<pack *> job.unit, f), parameter(<pack *> job.center, f),
                         parameter(<pack *> job.scale, f), parameter(<pack *> job.shift, f),
                         parameter(<pack *> job.slope_g, f), parameter(<pack *> job.slope_x, f),
                         parameter(<pack *> job.level, f))


cdef void backward_planes(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                          Py_ssize_t g) noexcept nogil:
    cdef Block t = block_of(job, c, g)
    a.scaled = job.extreme[0]
    if plain_but_mask(a):
        backward_block(job, bare_but_mask(a), x, t)
    elif plain_but_omit(a):
        backward_block(job, bare_but_omit(a), x, t)
    elif not plain(a):
        backward_block(job, a, x, t)
    elif a.stream:
        backward_block(job, bare(a, True), x, t)
    else:
        backward_block(job, bare(a, False), x, t)
