# What is done to each pack of elements, in either layout, once its parameters are in registers.
# `Arrays` goes by value: through a pointer, its fields would be read again after every store.

cdef inline void put_result(Arrays a, Py_ssize_t i, int k, pack value) noexcept nogil:
    if a.stream and k == lanes(<pack *> a.y):
        stream(<pack *> a.y, i, value)
    else:
        store(<pack *> a.y, i, k, value)


cdef inline int lead(Arrays a, const pack *tag, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    """Elements (at most n) to store before y + i is aligned, as streaming needs it."""
    if not a.stream:
        return 0
    cdef size_t beyond = <size_t> at(<pack *> a.y, i) % 64
    return <int> min(n, <Py_ssize_t> ((64 - beyond) % 64 * lanes(tag) // 64))


cdef inline void fetch(Arrays a, const pack *x, Py_ssize_t i) noexcept nogil:
    """Bring what will be read into the second-level cache, where the result bypasses it.

    Next to ordinary stores this gains nothing, and in a plain copy loses a third.
    """
    if not a.stream:
        return
    fastbn_prefetch(at(x, i))
    if a.dy != NULL:
        fastbn_prefetch(at(<pack *> a.dy, i))


cdef inline bint plain(Arrays a) noexcept nogil:
    """Whether the arithmetic is the bare formula."""
    return unfused(a) and not chosen(a)


cdef inline Arrays bare(Arrays a, bint streamed) noexcept nogil:
    """The same where `plain`, said so that the compiler leaves no test of it in a loop."""
    a.relu = a.scaled = a.omit = False
    a.residual = a.dresidual = NULL
    a.weights = NULL
    a.where = NULL
    a.stream = streamed
    return a


cdef inline bint unfused(Arrays a) noexcept nogil:
    return not (a.relu or a.scaled or a.residual != NULL or a.dresidual != NULL)


cdef inline bint plain_but_mask(Arrays a) noexcept nogil:
    return FASTBN_SPECIAL and unfused(a) and a.where != NULL and a.weights == NULL and not a.omit


cdef inline bint plain_but_omit(Arrays a) noexcept nogil:
    return FASTBN_SPECIAL and unfused(a) and a.omit and a.where == NULL and a.weights == NULL


cdef inline Arrays bare_but_mask(Arrays a) noexcept nogil:
    """The same where `plain_but_mask`, said so for the compiler."""
    cdef Arrays b = bare(a, a.stream)
    b.where = a.where
    return b


cdef inline Arrays bare_but_omit(Arrays a) noexcept nogil:
    cdef Arrays b = bare(a, a.stream)
    b.omit = True
    return b


cdef inline pack centred(Arrays a, const pack *x, Py_ssize_t i, int k, pack unit,
                         pack center) noexcept nogil:
    """x - mean, but for what `shift` and `level` make up; in units that the dtype can hold."""
    cdef pack value = load(x, i, k)
    if a.scaled:
        value = mul(value, unit)
    return sub(value, center)


cdef inline pack linear(Arrays a, const pack *x, Py_ssize_t i, int k, pack unit, pack center,
                        pack scale, pack shift) noexcept nogil:
    """What the activation is given: (x - center) * scale + shift + residual"""
    cdef pack value = fma(centred(a, x, i, k, unit, center), scale, shift)
    if a.residual != NULL:
        value = add(value, load(<const pack *> a.residual, i, k))
    return value


cdef inline pack kept_only(Arrays a, pack kept, pack x, pack value) noexcept nogil:
    """0 for what the mask or `omit` leaves out."""
    if a.where != NULL:
        value = where(kept, value)
    if a.omit:
        value = where_number(x, value)
    return value


cdef inline void forward_pack(Arrays a, const pack *x, Py_ssize_t i, int k, pack kept, pack unit,
                              pack center, pack scale, pack shift) noexcept nogil:
    """y = relu(linear)"""
    cdef pack value = linear(a, x, i, k, unit, center, scale, shift)
    if a.relu:
        value = relu(value)
    put_result(a, i, k, kept_only(a, kept, load(x, i, k), value))


cdef inline pack masked(Arrays a, const pack *x, Py_ssize_t i, int k, pack kept, pack unit,
                        pack center, pack scale, pack shift) noexcept nogil:
    """g = dy where the activation let the value through: the forward's own arithmetic again."""
    cdef pack g = load(<const pack *> a.dy, i, k)
    if a.relu:
        g = where_positive(linear(a, x, i, k, unit, center, scale, shift), g)
    return kept_only(a, kept, load(x, i, k), g)


cdef inline void backward_pack(Arrays a, const pack *x, Py_ssize_t i, int k, pack g, pack kept,
                               pack weight, pack unit, pack center, pack slope_g, pack slope_x,
                               pack level) noexcept nogil:
    """dx = g * slope_g + ((x - center) * slope_x + level), and dresidual = g

    With weights the second term, which comes through the statistics, has the sample's.
    """
    cdef pack value
    if a.frozen:
        value = mul(g, slope_g)
    else:
        value = fma(centred(a, x, i, k, unit, center), slope_x, level)
        if a.weights != NULL:
            value = mul(value, weight)
        value = fma(g, slope_g, value)
    if a.scaled:
        value = mul(value, unit)
    value = kept_only(a, kept, load(x, i, k), value)
    if a.dresidual != NULL:
        store(<pack *> a.dresidual, i, k, g)
    put_result(a, i, k, value)
