# What a kernel's entry sees of a NumPy array: where it is, how it lies, and whether it is ordinary
# (calls.pxi says what that is).
#
# Arrays are read through NumPy's C interface: through the buffer protocol, five of them took
# longer than normalising a small batch.

from libc.stdlib cimport free, malloc

cimport numpy as np

np.import_array()

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewLikeArray(np.ndarray prototype, np.NPY_ORDER order, void *dtype, int subok)

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX

cdef enum:
    MAX_DIMS = 8

cdef struct Operand:
    char *data
    Py_ssize_t size                 # elements
    Py_ssize_t shape[MAX_DIMS]
    Py_ssize_t strides[MAX_DIMS]
    int ndim
    int itemsize
    bint readonly


cdef bint read(object array, Operand *o) noexcept:
    """Look at an array; whether it is ordinary. The caller keeps it alive."""
    cdef np.ndarray a
    cdef int k, dtype
    if not np.PyArray_CheckExact(array):
        return False
    a = array
    dtype = np.PyArray_TYPE(a)
    o.ndim = np.PyArray_NDIM(a)
    if (not 0 < o.ndim <= MAX_DIMS or (dtype != np.NPY_FLOAT32 and dtype != np.NPY_FLOAT64)
            or not np.PyArray_ISALIGNED(a) or not np.PyArray_ISNOTSWAPPED(a)):
        return False
    o.data = np.PyArray_BYTES(a)
    o.itemsize = 4 if dtype == np.NPY_FLOAT32 else 8
    o.readonly = not np.PyArray_ISWRITEABLE(a)
    o.size = 1
    for k in range(o.ndim):
        o.shape[k] = np.PyArray_DIM(a, k)
        o.strides[k] = np.PyArray_STRIDE(a, k)
        o.size *= o.shape[k]
    return o.size > 0


cdef object new_array(int ndim, Py_ssize_t rows, Py_ssize_t columns):
    """float64, not initialised."""
    cdef np.npy_intp shape[2]
    shape[0], shape[1] = rows, columns
    return np.PyArray_EMPTY(ndim, shape + 2 - ndim, np.NPY_FLOAT64, 0)


cdef object new_like(object x):
    """An array of x's shape, dtype and memory order."""
    return PyArray_NewLikeArray(x, np.NPY_KEEPORDER, NULL, 0)


cdef inline Py_ssize_t width(const Operand *o, int k) noexcept:
    """An axis's stride. One of length 1 lies anywhere: by the widest stride it splits no run."""
    return PY_SSIZE_T_MAX if o.shape[k] == 1 else o.strides[k]


cdef bint dense(const Operand *o, int *order) noexcept:
    """Whether an array has no gaps; `order` <- its axes from the widest stride to the narrowest."""
    cdef Py_ssize_t expected = o.itemsize
    cdef int k, at
    for k in range(o.ndim):
        at = k
        while at > 0 and width(o, order[at - 1]) < width(o, k):
            order[at] = order[at - 1]
            at -= 1
        order[at] = k
    for k in range(o.ndim - 1, -1, -1):
        if o.shape[order[k]] != 1:
            if o.strides[order[k]] != expected:
                return False
            expected *= o.shape[order[k]]
    return True


cdef bint contiguous(const Operand *o) noexcept:
    """Whether an array is dense in C order."""
    cdef Py_ssize_t expected = o.itemsize
    cdef int k
    for k in range(o.ndim - 1, -1, -1):
        if o.shape[k] != 1:
            if o.strides[k] != expected:
                return False
            expected *= o.shape[k]
    return True


cdef bint apart(const Operand *a, const Operand *b) noexcept:
    return (a.data + a.size * a.itemsize <= b.data or b.data + b.size * b.itemsize <= a.data)


cdef bint same_memory_or_none(const Operand *a, const Operand *b) noexcept:
    return (a.data == b.data and a.size == b.size and a.itemsize == b.itemsize) or apart(a, b)
