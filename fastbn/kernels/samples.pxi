# Samples with a weight, and samples that are left out.
#
# A sample is one place outside the feature axis: number o * inner + i. `Arrays.weights` and
# `Arrays.where` hold one value for each; weights are 0 wherever `where` is, and a missing array
# is all ones. What has weight 0, or is NaN and omitted, is replaced by 0 before it meets any
# arithmetic: a NaN there poisons nothing.

cdef enum Kept:
    NONE
    SOME
    ALL

cdef enum:
    MIXED = 8           # rows that are worked on with their mask, where shorter runs are kept


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
    return fastbn_flag(a.where + s) if a.where != NULL else 1.0


cdef inline double one_weight(Arrays a, Py_ssize_t s) noexcept nogil:
    return a.weights[s] if a.weights != NULL else one_flag(a, s)


# --- By element, in the dtype of x ---------------------------------------------------------------

cdef inline pack kept_at(Arrays a, const pack *tag, Py_ssize_t s, int k) noexcept nogil:
    """1 for each of k samples from s on that is not left out, else 0; not read without a mask."""
    return flags(tag, a.where + s, k) if a.where != NULL else splat(tag, 1)


cdef inline bint all_kept(Arrays a, const pack *tag, Py_ssize_t s) noexcept nogil:
    """Whether a whole pack of samples from s on is."""
    if pack is f16:
        return fastbn_kept16(a.where + s) == 16
    else:
        return fastbn_kept8(a.where + s)


cdef inline Arrays without_mask(Arrays a) noexcept nogil:
    a.where = NULL
    return a


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

cdef inline bint one_sample(const Job *job) noexcept nogil:
    """Whether a row is one sample, with one weight for all columns."""
    return job.fold == 1 and job.inner == 1


cdef inline Py_ssize_t sample_step(const Job *job, Arrays a) noexcept nogil:
    """0 where one value serves all columns of a row; else 1."""
    return not (one_sample(job) or (a.weights == NULL and a.where == NULL))


cdef inline Tile next_rows(Arrays a, Tile t, Py_ssize_t stride, Py_ssize_t *r,
                           Kept *kept) noexcept nogil:
    """The rows from r on that are all kept, or all left out, or a few of both; r <- their end.

    Of rows that are one sample each. Those that are kept need no mask.
    """
    cdef Py_ssize_t first = r[0], end = first
    cdef bint flag = a.where[t.row + first] != 0
    while end < t.rows and (a.where[t.row + end] != 0) == flag:
        end += 1
    kept[0] = ALL if flag else NONE
    if end < t.rows and end - first < MIXED:
        end = min(first + MIXED, t.rows)
        kept[0] = SOME
    r[0] = end
    t.row += first
    t.start += first * stride
    t.rows = end - first
    return t


cdef inline void spread_samples(pack *columns, const Job *job, Arrays a, Tile t, Py_ssize_t r,
                                bint kept) noexcept nogil:
    """Weights of row r of a tile by column, or whether each is kept; room for PAD beyond.

    Where `sample_step` is 0, PAD columns are all that is filled.
    """
    cdef Py_ssize_t s = (t.row + r) * job.fold * job.inner, i, k, f
    cdef Py_ssize_t outer = job.fold if r < t.rows else t.rest // (t.features * job.inner)
    cdef Py_ssize_t at_
    cdef pack value
    cdef int n
    if not sample_step(job, a):
        store(columns, 0, lanes(columns), splat(columns, one_flag(a, s) if kept
                                                else one_weight(a, s)))
    elif job.inner == 1:
        for k in range(outer):                              # the next sample overwrites the excess
            value = splat(columns, one_flag(a, s + k) if kept else one_weight(a, s + k))
            if t.features <= 4:
                store(columns, k * t.features, 4, value)
            elif t.features <= 8:
                store(columns, k * t.features, 8, value)
            else:
                for i in range(0, t.features, 8):
                    store(columns, k * t.features + i, 8, value)
    else:
        for k in range(outer):
            at_ = k * t.features * job.inner
            for i in range(0, job.inner, 8):                # the first feature
                n = <int> min(8, job.inner - i)
                if kept or a.weights == NULL:
                    value = flags(columns, a.where + s + k * job.inner + i, n)
                else:
                    value = share_at(a, columns, s + k * job.inner + i, n)
                store(columns, at_ + i, 8, value)
            for f in range(1, t.features):                  # and copies of it
                for i in range(0, job.inner, 8):
                    store(columns, at_ + f * job.inner + i, 8, load(columns, at_ + i, 8))
