# Samples with a weight, and samples that are left out.
#
# A sample is one place outside the feature axis: number o * inner + i. `Arrays.weights` and
# `Arrays.where` hold one value for each; weights are 0 wherever `where` is, and a missing array
# is all ones. What has weight 0, or is NaN and omitted, is replaced by 0 before it meets any
# arithmetic: a NaN there poisons nothing.

cdef inline bint chosen(Arrays a) noexcept nogil:
    """Whether samples have weights, or some may be left out."""
    return a.weights != NULL or a.where != NULL or a.omit


cdef inline d8 weight_at(Arrays a, Py_ssize_t s, int k) noexcept nogil:
    """Weights of k samples from s on."""
    if a.weights != NULL:
        return load(<d8 *> a.weights, s, k)
    if a.where != NULL:
        return d8_flags(a.where + s, k)
    return d8_keep(d8_splat(1), k)


cdef inline double one_flag(Arrays a, Py_ssize_t s) noexcept nogil:
    return 1 if a.where == NULL or a.where[s] != 0 else 0


cdef inline double one_weight(Arrays a, Py_ssize_t s) noexcept nogil:
    return a.weights[s] if a.weights != NULL else one_flag(a, s)


# --- By element, in the dtype of x ---------------------------------------------------------------

cdef inline pack kept_at(Arrays a, const pack *tag, Py_ssize_t s, int k) noexcept nogil:
    """1 for each of k samples from s on that is not left out, else 0; not read without a mask."""
    return flags(tag, a.where + s, k) if a.where != NULL else splat(tag, 1)


cdef inline pack share_at(Arrays a, const pack *tag, Py_ssize_t s, int k) noexcept nogil:
    """Weights of k samples in the dtype of x."""
    cdef double values[16]
    cdef int i
    if a.weights == NULL:
        return splat(tag, 1)
    if pack is f16:
        memset(values, 0, 64)
        for i in range(0, k, 8):
            narrow(<pack *> values, i, <int> min(8, k - i),
                   load(<d8 *> a.weights, s + i, <int> min(8, k - i)))
        return load(<pack *> values, 0, 16)
    else:
        return load(<pack *> a.weights, s, k)


# --- By column of a rows tile --------------------------------------------------------------------

cdef inline Py_ssize_t sample_step(const Job *job) noexcept nogil:
    """0 where a row is one sample, whose value serves all columns; else 1."""
    return job.fold > 1 or job.inner > 1


cdef inline void spread_samples(pack *columns, const Job *job, Arrays a, Tile t, Py_ssize_t r,
                                bint kept) noexcept nogil:
    """Weights of row r of a tile by column, or whether each is kept; room for PAD beyond.

    A row that is one sample fills PAD columns: see `sample_step`.
    """
    cdef Py_ssize_t s = (t.row + r) * job.fold * job.inner, i, k, f
    cdef Py_ssize_t outer = job.fold if r < t.rows else t.rest // (t.features * job.inner)
    cdef Py_ssize_t features = t.features if sample_step(job) else 1
    cdef pack value
    for k in range(outer):
        if job.inner == 1:
            value = splat(columns, one_flag(a, s + k) if kept else one_weight(a, s + k))
            i = 0
            while i < features:                             # the next sample overwrites the excess
                store(columns, k * features + i, lanes(columns), value)
                i += lanes(columns)
        else:
            for f in range(features):
                for i in range(job.inner):
                    put(columns, (k * features + f) * job.inner + i,
                        one_flag(a, s + k * job.inner + i) if kept
                        else one_weight(a, s + k * job.inner + i))
