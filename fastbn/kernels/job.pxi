# A job is one call: its arrays, its sizes, and how the work is cut into pieces.
#
# Every array is seen as (outer, features, inner), contiguous. Two layouts serve all of them.
#
#   rows    features lie side by side in memory (inner == 1, or runs too short to be worth a
#           vector loop of their own). The array is a matrix of `length` rows and `width` columns,
#           each column with accumulators of its own; columns of the same feature are added up
#           at the end. When `features * inner` is small, `fold` samples are laid in one row, so
#           that (1000000, 3) is worked on as rows of 480 columns; `rest` columns may remain for
#           a last, shorter row.
#   planes  a feature is `outer` long runs of `inner` elements; a run is summed in registers.
#
# The work is a grid: groups of features by chunks of samples. **Chunks are cut by shape alone**
# and the chunks of a feature are merged in order, so that the result has the same bits for any
# number of threads. Features never meet, so groups and the schedule are free to follow threads
# and caches.

cdef enum:
    TILE = 512          # most columns of a rows group: accumulators and parameters stay in L1
    CHUNK = 65536       # elements of a tile's chunk (rows): 256 KB of float32
    GROUP = 64          # most features of a planes group
    WIDE = 2048         # most columns that are written together: their parameters stay in L1
    ROWS = 4            # rows that are reduced together
    PAGE_BYTES = 4096
    SPAN = 16384        # elements of a chunk in planes: few enough sums per lane to lose nothing
    SHORT_RUN = 64      # runs up to this length are worked on as rows
    AHEAD = 16384       # bytes from what is read to what is prefetched, where memory is contiguous
    GRAIN = 32768       # elements that make it worth to wake another thread
    L2_BYTES = 819200   # what of a core's second-level cache one group's data may fill

    STREAM_BYTES = 10485760     # results larger than this bypass the caches: nobody reads them soon

cdef enum Operation:
    MOMENTS             # mean, m2 <- x
    FORWARD             # mean, m2, y <- x
    NORMALIZE           # y <- x, with given statistics
    BACKWARD            # dbeta, dgamma, dx <- dy, x
    FROZEN              # the same where the statistics did not come from x

# An argument per feature, of either dtype; both NULL where it is not given.
cdef struct Vector:
    const double *doubles
    const float *floats


cdef struct Job:
    Operation operation
    Py_ssize_t outer, features, inner
    # The cut
    bint rows
    Py_ssize_t fold, length, width, rest    # rows: the matrix
    Py_ssize_t piece, runs                  # planes: a chunk is `runs` pieces of `piece` elements
    Py_ssize_t chunk, chunks                # rows of a chunk; chunks of a feature
    Py_ssize_t group, groups                # features of a group
    Py_ssize_t skew                         # by how many features the first group is shorter
    int threads
    bint own                                # a thread works on whole groups, with no barrier
    bint shared                             # samples have weights, or some are left out
    Py_ssize_t near                         # AHEAD in elements
    Py_ssize_t ahead_rows                   # the same in whole blocks of rows
    Py_ssize_t ahead                        # the same where results are written: see `cut`
    # Per feature, float64, shape (features,). The variance is m2 / count, or m2 / n.
    double *mean
    double *m2
    double *low                             # what float64 does not hold of the mean; or NULL
    double *count                           # or NULL
    double n
    const double *total                     # backward: samples of each feature, NULL for all
    double *dbeta
    double *dgamma
    Vector gamma                            # 1 where not given
    Vector beta                             # 0 where not given
    double eps
    # Per chunk and feature, shape (chunks, features): the mean's offset and m2, or sum(g) and
    # sum(g (x - mean)), where g is dy masked by the activation. Of weighted data also the sum of
    # weights, and the pivot that the offset is from.
    double *part_a
    double *part_b
    double *part_n
    double *part_pivot
    # Per feature in the dtype of x: y = (x * unit - center) * scale + shift and
    # dx = (g * slope_g + ((x * unit - center) * slope_x + level)) * unit. The units are powers
    # of two, and 1 for all but extreme data; `extreme` tells whether any is not.
    int *extreme
    void *unit
    void *center
    void *scale
    void *shift
    void *slope_g
    void *slope_x
    void *level


# What an element's arithmetic needs to know of the call.
cdef struct Arrays:
    void *y                 # y, or dx
    void *dresidual         # or NULL
    const void *dy          # backward
    const void *x
    const void *residual    # or NULL
    const double *weights   # per sample, shape (outer, inner), 0 where left out; or NULL
    const unsigned char *where      # the same, 0 for samples that are left out; or NULL
    bint omit               # leave out NaN
    bint relu
    bint frozen             # backward: dx does not depend on x
    bint scaled             # some unit is not 1
    bint stream             # write the result past the caches


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef Py_ssize_t gcd(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    while b:
        a, b = b, a % b
    return a


cdef void cut(Job *job, int itemsize, int threads, const void *y, bint chosen) noexcept nogil:
    """Fill in the cut. Where anything is reduced, chunks depend on the shape and nothing else
    (and on whether samples have weights or are left out)."""
    cdef Py_ssize_t sample = job.features * job.inner, step, tile, bytes_
    cdef Py_ssize_t elements = job.outer * sample
    job.threads = <int> min(threads, max(1, elements // GRAIN))
    job.shared = chosen
    job.rows = (job.inner == 1 or job.inner < 16
                or (job.inner <= SHORT_RUN and job.outer >= 4))
    if job.rows:
        # Fold only where it leaves enough rows, to whole packs where that is possible.
        job.fold = max(1, min(TILE // sample, job.outer // 64))
        if chosen and sample >= 64:         # rows of one sample are kept or left out as a whole
            job.fold = 1
        step = 16 // gcd(sample, 16)
        if job.fold > step:
            job.fold -= job.fold % step
        job.width = job.fold * sample
        job.length = job.outer // job.fold
        job.rest = (job.outer - job.length * job.fold) * sample
        job.chunk = CHUNK // min(job.width, TILE)
        job.chunks = ceil_div(job.length, job.chunk)
        if job.fold > 1:
            job.group = job.features
            job.own = False
        else:
            tile = TILE
            bytes_ = job.outer * itemsize
            # Narrower tiles where that keeps a tile's data in cache between the two passes, or
            # gives each thread one; not below 64 columns, where rows become too short to stream.
            while tile > 128 and tile * bytes_ > L2_BYTES:
                tile //= 2
            while tile > 64 and sample < tile * job.threads:
                tile //= 2
            # Columns of a row written by two cores cost more than a wait, so threads own columns
            # only where there are too few chunks to share, or where it saves reading from memory.
            job.own = (tile * bytes_ <= L2_BYTES and sample >= tile * job.threads
                       and (job.chunks < job.threads or sample * bytes_ > STREAM_BYTES))
            if not job.own:
                tile = TILE
            job.group = min(job.features, max(1, tile // job.inner))
            if job.own and job.inner == 1 and sample * itemsize % 64 == 0 and y != NULL:
                # Groups end where cache lines do: two threads that write to one line wait for
                # each other at every row.
                job.skew = <size_t> y % 64 // itemsize
        job.groups = ceil_div(job.features + job.skew, job.group)
    else:
        job.piece = min(job.inner, SPAN)
        job.runs = max(1, SPAN // job.inner)
        # Enough features side by side to read a page at a time, while they fit in cache.
        bytes_ = job.inner * itemsize
        job.group = max(1, min(PAGE_BYTES // bytes_, L2_BYTES // (bytes_ * job.outer)))
        job.group = min(job.group, max(1, job.features // (4 * job.threads)))
        job.groups = ceil_div(job.features, job.group)
        job.chunks = ceil_div(job.outer, job.runs) * ceil_div(job.inner, job.piece)
        # With few features the threads share each one; with many, each takes features whole.
        job.own = job.threads == 1 or job.groups >= 4 * job.threads or job.chunks == 1
        if chosen and job.operation == MOMENTS:
            job.own = False                 # see `piece_of`
        if job.own:
            job.threads = <int> min(job.threads, job.groups)
    if job.operation == NORMALIZE:
        # Nothing is reduced: chunks are free, and everything is worked on as memory lies.
        job.skew = 0
        if job.rows:
            # Long rows are shared out by columns, which saves a wait for parameters.
            job.own = sample >= 8 * WIDE or (job.length < 4 * job.threads and job.fold == 1)
            if job.own and job.inner == 1:
                job.group = min(WIDE, ceil_div(job.features, 4 * job.threads))
            job.groups = ceil_div(job.features, job.group)
        else:
            job.own = False
            job.runs = 1
            job.chunks = job.outer * ceil_div(job.inner, job.piece)
    job.near = job.ahead = AHEAD // itemsize
    if job.rows:
        job.ahead_rows = max(1, job.near // (ROWS * job.width)) * ROWS * job.width
    bytes_ = job.outer * job.inner * job.group * itemsize
    if job.operation != FORWARD:
        bytes_ *= 2
    if job.rows and job.inner > 1:
        job.ahead = job.group * job.inner           # worked on tile by tile, and so is the next one
    elif job.own and job.operation != NORMALIZE:
        # While one group's result is written the next group is read into the caches: memory is
        # read and written at once, and the next sums need not wait for it.
        job.ahead = job.group * job.inner if bytes_ <= 4 * L2_BYTES else 0


cdef inline Py_ssize_t chunk_count(const Job *job, Py_ssize_t c) noexcept nogil:
    """Elements of each feature in chunk c."""
    cdef Py_ssize_t pieces, first, count
    if job.rows:
        count = min(job.chunk, job.length - c * job.chunk) * job.fold * job.inner
        if c == job.chunks - 1:
            count += job.rest // job.features
        return count
    pieces = ceil_div(job.inner, job.piece)
    first = c % pieces * job.piece
    return (min(job.piece, job.inner - first)
            * min(job.runs, job.outer - c // pieces * job.runs))


cdef inline Py_ssize_t first_of(const Job *job, Py_ssize_t g) noexcept nogil:
    """The first feature of group g; of the group after the last one, the number of features."""
    return max(0, min(job.features, g * job.group - job.skew))


cdef inline Py_ssize_t share(Py_ssize_t n, int rank, int size) noexcept nogil:
    """Where the part of `rank` begins when n things are shared out to `size`."""
    return n * rank // size
