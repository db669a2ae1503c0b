# What Python calls on statistics alone: tables of `Moments`, whose rows are count, mean, m2 and the
# mean's low-order part.

def merge(table, other):
    """The table of two Moments together (Chan, Golub & LeVeque 1983); both have equal shapes.

    Means carry their low-order parts along, so that as little is lost of the differences
    between means as of the data's deviations, however large the means are.
    """
    cdef Operand a, b, o
    cdef Py_ssize_t f, n
    cdef double *to
    cdef const double *p
    cdef const double *q
    cdef double count, delta, weight, mean, low
    if not (read_table(table, &a) and read_table(other, &b)) or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected two tables of {TABLE} rows and as many features")
    merged = new_like(table)
    if not read_table(merged, &o):
        raise ValueError("expected the table of a Moments to stay as it is")
    n = a.shape[1]
    for f in range(n):
        p, q, to = <double *> a.data + f, <double *> b.data + f, <double *> o.data + f
        if p[0] == 0 or q[0] == 0:          # to the bit, of one that is empty too
            if q[0] != 0:
                p = q
            to[0], to[n], to[2 * n], to[3 * n] = p[0], p[n], p[2 * n], p[3 * n]
            continue
        count = p[0] + q[0]
        weight = q[0] / count
        delta = (q[n] - p[n]) + (q[3 * n] - p[3 * n])
        to[0] = count
        to[2 * n] = p[2 * n] + q[2 * n] + delta * (weight * p[0]) * delta
        if isfinite(delta):
            two_sum(p[n], delta * weight, &mean, &low)
            two_sum(mean, low + p[3 * n], to + n, to + 3 * n)
        elif isfinite(p[n]) and isfinite(q[n]):     # half of the difference is finite
            delta = q[n] * 0.5 - p[n] * 0.5
            to[n], to[3 * n] = p[n] + delta * weight + delta * weight, 0
        else:                                       # what a sum of the data would be
            to[n], to[3 * n] = p[n] + q[n], 0
    return merged
