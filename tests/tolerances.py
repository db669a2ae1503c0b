"""How far from exact a result may be: one number for each operation and dtype, and its reason.

A number counts machine epsilons of a *size*: the sum of the magnitudes that the exact formula
adds up, which is what rounding errors are proportional to. Where nothing cancels it is |result|.
oracle.py works out the sizes.
"""

from __future__ import annotations

import numpy as np

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
EPS = {FLOAT32: 2.0**-23, FLOAT64: 2.0**-52}
EPS64 = EPS[FLOAT64]

# Statistics, in epsilons of float64 for float32 data too: all sums are held in float64.
#
# mean: of |mean| + the farthest |x - mean|. The mean is the first element plus an offset, each
#   rounded once, and the offset is merged from chunks.
MEAN = 4
# m2: of sum((x - pivot)**2). A pivot may be so far from the mean that 6 bits cancel (features.pxi),
#   and each lane adds up to some thousand terms one after another.
M2 = 8
# dgamma and dbeta: of the sum of |terms|. Up to 1024 terms in a lane one after another, whose
#   roundings are a random walk: sqrt(1024) of them in the worst case, where one term outweighs
#   all others; 3 are typical.
SUM = 32
# All of these where thousands of chunks are merged: what chunks are off by goes both ways, and
#   merging them adds nothing that grows with their number (`add_to` in features.pxi).
MANY_CHUNKS = 2

# Elements, in epsilons of their own dtype.
#
# y: of max(1, |xhat|) |gamma| + |beta| + |residual|. x - center, the scale, and the multiply-add
#   are half an epsilon each, one half more where it is not fused, one for adding a residual:
#   DESIGN.md promises 2. The 1 is for the low part of the mean, which is in the shift.
Y = {FLOAT32: 2, FLOAT64: 2}
# dx: of |gamma| / std * (|g| + |mean(g)| + |xhat mean(g xhat)|). As y, with two multiply-adds.
#   In float64 the root, the quotients and the products of its parameters are rounded as dx is: 2.01
#   was met in 2**31 elements, where g is 0 and its two means are all there is.
DX = {FLOAT32: 2, FLOAT64: 3}
# denormalize: of |y - beta| |std / gamma| + |mean|. As y.
DENORMALIZE = {FLOAT32: 2, FLOAT64: 2}

# Derivatives by differences of fourth order in float64, relative: a step of 1e-3 leaves an error
# of 1e-12 from the formula and 1e-13 from rounding, times what a sum over the batch adds up.
DIFFERENCES = 1e-9
# PyTorch in float64, relative to the largest value: both sides round, at most some 100 times.
TORCH = 1e-12
# Merging the moments of parts, relative (DESIGN.md).
MERGE = 1e-12
# Batch norm over processes: Y and DX (whose statistics' part, added in a pass of its own, is one
# rounding more; 1.3 was the most in float32), and what merged statistics add: a rounding of the
# mean and some of m2, in epsilons of float64 of the element's size, times 1 + |mean| / std.
STATISTICS_SYNC = 4
# PyTorch in float32, relative to the largest value: its sums over a batch are in float32.
TORCH_FLOAT32 = 2e-6
