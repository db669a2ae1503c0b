# The planes layout: a feature is `outer` runs of `inner` contiguous elements. Its parameters are
# the same for a whole run, and its sums stay in registers from run to run.

cdef struct Chunk:
    Py_ssize_t start        # element where its first run begins
    Py_ssize_t length       # of a run
    Py_ssize_t runs
    Py_ssize_t stride       # elements from run to run


cdef inline Chunk chunk_of(const Job *job, Py_ssize_t c, Py_ssize_t f) noexcept nogil:
    cdef Chunk t
    cdef Py_ssize_t pieces = ceil_div(job.inner, job.piece)
    cdef Py_ssize_t run = c // pieces * job.runs, first = c % pieces * job.piece
    t.stride = job.features * job.inner
    t.start = run * t.stride + f * job.inner + first
    t.length = min(job.piece, job.inner - first)
    t.runs = min(job.runs, job.outer - run)
    return t


cdef void moments_planes(const Job *job, const pack *x, Py_ssize_t c, Py_ssize_t f) noexcept nogil:
    """part_a, part_b <- moments of chunk c of feature f."""
    cdef Chunk t = chunk_of(job, c, f)
    cdef double pivot = finite_or_zero(element(x, t.start))
    cdef double *mean = job.part_a + c * job.features + f
    cdef double *m2 = job.part_b + c * job.features + f
    cdef double total1, total2
    cdef d8 p, u, v, sum1, sum1b, sum2, sum2b, zero = d8_splat(0)
    cdef Py_ssize_t r, i, end
    cdef int attempt
    for attempt in range(2):
        p = d8_splat(pivot)
        sum1 = sum1b = sum2 = sum2b = zero
        for r in range(t.runs):
            i = t.start + r * t.stride
            end = i + t.length
            # Two packs at a time, so that one multiply-add need not wait for the last.
            while i + 16 <= end:
                u = sub(widen(x, i, 8), p)
                v = sub(widen(x, i + 8, 8), p)
                sum1 = add(sum1, u)
                sum1b = add(sum1b, v)
                sum2 = fma(u, u, sum2)
                sum2b = fma(v, v, sum2b)
                i += 16
            while i < end:
                u = sub(widen(x, i, <int> min(8, end - i)), p)
                u = d8_keep(u, <int> min(8, end - i))
                sum1 = add(sum1, u)
                sum2 = fma(u, u, sum2)
                i += 8
        total1 = d8_sum(add(sum1, sum1b))
        total2 = d8_sum(add(sum2, sum2b))
        if not close_chunk(&total1, &total2, 1, t.length * t.runs, mean, m2) or attempt == 1:
            break
        pivot += mean[0]
    mean[0] += pivot - origin(job, x, f)


cdef void forward_planes(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                         Py_ssize_t f) noexcept nogil:
    cdef Chunk t = chunk_of(job, c, f)
    cdef pack center = splat(x, element(<pack *> job.center, f))
    cdef pack scale = splat(x, element(<pack *> job.scale, f))
    cdef pack shift = splat(x, element(<pack *> job.shift, f))
    cdef Py_ssize_t r, i, k, end
    for r in range(t.runs):
        i = t.start + r * t.stride
        end = i + t.length
        k = lead(a, x, i, t.length)
        if k > 0:
            forward_pack(a, x, i, <int> k, center, scale, shift)
            i += k
        while i + lanes(x) <= end:
            forward_pack(a, x, i, lanes(x), center, scale, shift)
            i += lanes(x)
        if i < end:
            forward_pack(a, x, i, <int> (end - i), center, scale, shift)


cdef void gradients_planes(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                           Py_ssize_t f) noexcept nogil:
    """part_a, part_b <- sum(g) and sum(g (x - mean)) of chunk c of feature f."""
    cdef Chunk t = chunk_of(job, c, f)
    cdef pack center = splat(x, element(<pack *> job.center, f))
    cdef pack scale = splat(x, element(<pack *> job.scale, f))
    cdef pack shift = splat(x, element(<pack *> job.shift, f))
    cdef d8 mean = d8_splat(job.mean[f]), zero = d8_splat(0)
    cdef d8 sum_g = zero, sum_gb = zero, sum_gx = zero, sum_gxb = zero
    cdef pack g, u
    cdef Py_ssize_t r, i, end
    cdef int k
    for r in range(t.runs):
        i = t.start + r * t.stride
        end = i + t.length
        while i < end:
            # Lanes beyond the end of a run have g = 0, and add nothing.
            k = <int> min(lanes(x), end - i)
            g = masked(a, x, i, k, center, scale, shift)
            u = load(x, i, k)
            if pack is f16:
                sum_g = add(sum_g, f16_low(g))
                sum_gb = add(sum_gb, f16_high(g))
                sum_gx = fma(f16_low(g), sub(f16_low(u), mean), sum_gx)
                sum_gxb = fma(f16_high(g), sub(f16_high(u), mean), sum_gxb)
            else:
                sum_g = add(sum_g, g)
                sum_gx = fma(g, sub(u, mean), sum_gx)
            i += lanes(x)
    job.part_a[c * job.features + f] = d8_sum(add(sum_g, sum_gb))
    job.part_b[c * job.features + f] = d8_sum(add(sum_gx, sum_gxb))


cdef void backward_planes(const Job *job, Arrays a, const pack *x, Py_ssize_t c,
                          Py_ssize_t f) noexcept nogil:
    cdef Chunk t = chunk_of(job, c, f)
    cdef pack center = splat(x, element(<pack *> job.center, f))
    cdef pack scale = splat(x, element(<pack *> job.scale, f))
    cdef pack shift = splat(x, element(<pack *> job.shift, f))
    cdef pack slope_g = splat(x, element(<pack *> job.slope_g, f))
    cdef pack slope_x = splat(x, element(<pack *> job.slope_x, f))
    cdef pack level = splat(x, element(<pack *> job.level, f))
    cdef Py_ssize_t r, i, end
    cdef int k
    for r in range(t.runs):
        i = t.start + r * t.stride
        end = i + t.length
        k = lead(a, x, i, t.length)
        while i < end:
            if k == 0:
                k = <int> min(lanes(x), end - i)
            backward_pack(a, x, i, k, masked(a, x, i, k, center, scale, shift),
                          center, slope_g, slope_x, level)
            i += k
            k = 0
