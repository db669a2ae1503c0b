# Packs and the operations on them, for both dtypes (simd.h says what a pack is).
#
# A kernel is written once over the fused type `pack`. A `pack *` is a pointer to ordinary
# float32 (f16) or float64 (d8) data of any alignment: it says which, and is only ever read and
# written through the functions below, whose index i counts elements, not packs.

cdef extern from "simd.h" nogil:
    ctypedef struct f16:
        pass
    ctypedef struct d8:
        pass
    const char *FASTBN_SIMD
    const bint FASTBN_SPECIAL
    void fastbn_prefetch(const void *p)
    void fastbn_fence()

    f16 f16_load(const float *p)
    d8 d8_load(const double *p)
    f16 f16_load_part(const float *p, int k)
    d8 d8_load_part(const double *p, int k)
    void f16_store(float *p, f16 a)
    void d8_store(double *p, d8 a)
    void f16_stream(float *p, f16 a)
    void d8_stream(double *p, d8 a)
    void f16_store_part(float *p, f16 a, int k)
    void d8_store_part(double *p, d8 a, int k)
    d8 d8_widen(const float *p)
    d8 d8_widen_part(const float *p, int k)
    d8 f16_low(f16 a)
    d8 f16_high(f16 a)
    f16 f16_splat(float a)
    d8 d8_splat(double a)
    f16 f16_add(f16 a, f16 b)
    d8 d8_add(d8 a, d8 b)
    f16 f16_sub(f16 a, f16 b)
    d8 d8_sub(d8 a, d8 b)
    f16 f16_mul(f16 a, f16 b)
    d8 d8_mul(d8 a, d8 b)
    f16 f16_fma(f16 a, f16 b, f16 c)
    d8 d8_fma(d8 a, d8 b, d8 c)
    f16 f16_relu(f16 a)
    d8 d8_relu(d8 a)
    f16 f16_where_positive(f16 t, f16 g)
    d8 d8_where_positive(d8 t, d8 g)
    d8 d8_less(d8 a, d8 p)
    d8 d8_div(d8 a, d8 b)
    d8 d8_sqrt(d8 a)
    void d8_narrow(float *p, d8 a, int k)
    d8 d8_keep(d8 a, int k)
    d8 d8_finite_or_zero(d8 a)
    int d8_any_less(d8 a, d8 b)
    f16 f16_where(f16 t, f16 g)
    d8 d8_where(d8 t, d8 g)
    f16 f16_where_number(f16 t, f16 g)
    d8 d8_where_number(d8 t, d8 g)
    d8 d8_where_bytes(const unsigned char *p, d8 g)
    int d8_numbers(d8 t)
    f16 f16_flags(const unsigned char *p, int k)
    d8 d8_flags(const unsigned char *p, int k)
    double fastbn_flag(const unsigned char *p)
    int fastbn_kept16(const unsigned char *p)
    int fastbn_count8(const unsigned char *p)
    int fastbn_kept8(const unsigned char *p)
    double d8_sum(d8 a)

ctypedef fused pack:
    f16
    d8


# --- Memory -----------------------------------------------------------------------------------

cdef inline int lanes(const pack *tag) noexcept nogil:
    """Elements in a pack."""
    return 16 if pack is f16 else 8


cdef inline pack *at(const pack *p, Py_ssize_t i) noexcept nogil:
    """Where element i is."""
    if pack is f16:
        return <pack *> (<float *> p + i)
    else:
        return <pack *> (<double *> p + i)


cdef inline double element(const pack *p, Py_ssize_t i) noexcept nogil:
    if pack is f16:
        return (<const float *> p)[i]
    else:
        return (<const double *> p)[i]


cdef inline void put(pack *p, Py_ssize_t i, double value) noexcept nogil:
    """p[i] = value, rounded to the dtype."""
    if pack is f16:
        (<float *> p)[i] = <float> value
    else:
        (<double *> p)[i] = value


cdef inline pack load(const pack *p, Py_ssize_t i, int k) noexcept nogil:
    """k elements from i on, a whole pack or the first lanes of one (the others are 0)."""
    if pack is f16:
        if k == 16:
            return f16_load(<const float *> p + i)
        return f16_load_part(<const float *> p + i, k)
    else:
        if k == 8:
            return d8_load(<const double *> p + i)
        return d8_load_part(<const double *> p + i, k)


cdef inline void store(pack *p, Py_ssize_t i, int k, pack a) noexcept nogil:
    """The first k lanes of a to the elements from i on."""
    if pack is f16:
        if k == 16:
            f16_store(<float *> p + i, a)
        else:
            f16_store_part(<float *> p + i, a, k)
    else:
        if k == 8:
            d8_store(<double *> p + i, a)
        else:
            d8_store_part(<double *> p + i, a, k)


cdef inline void stream(pack *p, Py_ssize_t i, pack a) noexcept nogil:
    """A whole pack to memory past the caches; at(p, i) is aligned to 64 bytes."""
    if pack is f16:
        f16_stream(<float *> p + i, a)
    else:
        d8_stream(<double *> p + i, a)


cdef inline d8 widen(const pack *p, Py_ssize_t i, int k) noexcept nogil:
    """k <= 8 elements from i on, as float64."""
    if pack is f16:
        if k == 8:
            return d8_widen(<const float *> p + i)
        return d8_widen_part(<const float *> p + i, k)
    else:
        if k == 8:
            return d8_load(<const double *> p + i)
        return d8_load_part(<const double *> p + i, k)


cdef inline void narrow(pack *p, Py_ssize_t i, int k, d8 a) noexcept nogil:
    """The first k lanes of a to the elements from i on, rounded to the dtype."""
    if pack is f16:
        d8_narrow(<float *> p + i, a, k)
    else:
        store(<d8 *> p, i, k, a)


# --- Arithmetic -------------------------------------------------------------------------------

cdef inline pack splat(const pack *tag, double value) noexcept nogil:
    """`value` in every lane, rounded to the dtype of `tag`, which is not read."""
    if pack is f16:
        return f16_splat(<float> value)
    else:
        return d8_splat(value)


cdef inline pack add(pack a, pack b) noexcept nogil:
    if pack is f16:
        return f16_add(a, b)
    else:
        return d8_add(a, b)


cdef inline pack sub(pack a, pack b) noexcept nogil:
    if pack is f16:
        return f16_sub(a, b)
    else:
        return d8_sub(a, b)


cdef inline pack mul(pack a, pack b) noexcept nogil:
    if pack is f16:
        return f16_mul(a, b)
    else:
        return d8_mul(a, b)


cdef inline pack fma(pack a, pack b, pack c) noexcept nogil:
    """a * b + c"""
    if pack is f16:
        return f16_fma(a, b, c)
    else:
        return d8_fma(a, b, c)


cdef inline pack relu(pack a) noexcept nogil:
    """max(a, 0); NaN stays NaN."""
    if pack is f16:
        return f16_relu(a)
    else:
        return d8_relu(a)


cdef inline pack where_positive(pack t, pack g) noexcept nogil:
    """g where t > 0 (or NaN), else 0: the gradient of relu at t."""
    if pack is f16:
        return f16_where_positive(t, g)
    else:
        return d8_where_positive(t, g)


cdef inline pack where(pack t, pack g) noexcept nogil:
    """g where t != 0, else 0."""
    if pack is f16:
        return f16_where(t, g)
    else:
        return d8_where(t, g)


cdef inline pack where_number(pack t, pack g) noexcept nogil:
    """g where t is not NaN, else 0."""
    if pack is f16:
        return f16_where_number(t, g)
    else:
        return d8_where_number(t, g)


cdef inline pack flags(const pack *tag, const unsigned char *p, int k) noexcept nogil:
    """1 for each of k bytes that is not 0, else 0."""
    if pack is f16:
        return f16_flags(p, k)
    else:
        return d8_flags(p, k)
