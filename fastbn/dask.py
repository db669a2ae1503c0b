"""Statistics and normalisation of Dask arrays: data past one machine's memory.

Import it by name, ``import fastbn.dask``; it needs ``pip install 'fastbn[dask]'``.

Three decisions hold for everything here.

- **One task reads a block and reduces it.** The blocks' graph is optimised before the tree of
  merges is put on top, so that loading a block and taking its moments are one task, after which
  the block is gone. What travels between workers are Moments: a few numbers per feature.
- **The tree is fixed by the chunks** (and `split_every`), never by who computed what first. The
  kernels' bits do not depend on threads, a merge's not on the process. So neither do the result's,
  and a block that has to be computed again, because its worker died, gives the same bits.
- **A task is one thread.** A scheduler runs a task on every core that it was given; kernels with
  several threads each would only wait for each other. The parallelism is over blocks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from fastbn import _dask_tasks
from fastbn._arguments import (
    as_array,
    as_mask,
    check_activation,
    check_axis,
    check_eps,
    compute_dtype,
    features_of,
)
from fastbn._foreign import check_dtype
from fastbn._layout import Array
from fastbn._samples import NanPolicy, check_nan, check_weights
from fastbn.functional import Activation

try:
    import dask.array as da
    from dask.base import is_dask_collection, tokenize
    from dask.delayed import Delayed, delayed
    from dask.highlevelgraph import HighLevelGraph
except ImportError as error:
    raise ImportError("fastbn.dask needs Dask: pip install 'fastbn[dask]'") from error

__all__ = ["denormalize", "moments", "normalize"]

SPLIT_EVERY = 8  # as many Moments fit in a page of memory; a million blocks are a tree of 7 levels


def moments(
    array: da.Array,
    *,
    axis: int = 1,
    weights: Any = None,
    where: Any = None,
    nan: NanPolicy = "propagate",
    split_every: int | None = None,
) -> Delayed:
    """`fastbn.moments` of a Dask array, lazily: each block is read once, and Moments are merged.

    Parameters
    ----------
    array : dask.array.Array of float32, float64, integers or bools, any number of dimensions
        With any chunks: along the feature axis too, of different sizes, empty, and of unknown
        sizes (as after ``x[x[:, 0] > 0]``). A 1-D array is N samples of one feature.
    axis : int, default 1
        The feature axis; every other axis is averaged over.
    weights, where : array_like or dask.array.Array, optional
        As in `fastbn.moments`: the array's shape without the feature axis, or one that broadcasts
        to it. A Dask array with other chunks is rechunked. NumPy arrays become part of the graph.
    nan : {"propagate", "omit", "raise"}, default "propagate"
        As in `fastbn.moments`. "raise" reads everything and then names all features concerned.
    split_every : int >= 2, optional
        How many Moments a task merges, 8 by default.

    Returns
    -------
    dask.delayed.Delayed
        ``.compute()`` gives the `Moments`; `normalize` takes it as it is.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; before a graph is built unless it
        takes the values to know.

    Notes
    -----
    Blocks are merged in a tree that depends on the chunks and `split_every` alone (Chan, Golub &
    LeVeque 1983). The bits are the same on every run, whatever the scheduler and the number of
    workers and threads. With other chunks they differ by rounding: within 1e-12 of
    `fastbn.moments` of the array in memory. The count is exact.

    Examples
    --------
    >>> import dask.array as da, fastbn.dask
    >>> x = da.arange(1_000_000, chunks=100_000).reshape(500_000, 2)
    >>> m = fastbn.dask.moments(x)
    >>> m.compute().mean
    array([499999., 500000.])
    """
    axis = _check(array, axis)
    check_nan(nan)
    fan_in = _check_split_every(split_every)
    scale, scale_axes = _by_sample(weights, "weights", array, axis)
    mask, mask_axes = _by_sample(where, "where", array, axis)
    index = tuple(range(array.ndim))
    # An "array" whose blocks are Measured, which nobody takes for an array: `to_delayed` follows.
    measured = da.blockwise(
        _dask_tasks.measure,
        index,
        array,
        index,
        scale,
        scale_axes,
        mask,
        mask_axes,
        axis=axis,
        nan=nan,
        scale_axes=scale_axes,
        mask_axes=mask_axes,
        align_arrays=False,
        dtype=np.float64,
        meta=np.empty((0,) * array.ndim),
    )
    blocks = measured.to_delayed(optimize_graph=True)
    name = "moments-" + tokenize(measured.name, fan_in)
    graph = _tree(blocks, axis, fan_in, name)
    # Delayed share the graph of all, so that one stands for them.
    layers = HighLevelGraph.from_collections(name, graph, dependencies=[blocks.flat[0]])
    return Delayed(name, layers)


def normalize(
    array: da.Array,
    stats: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: Activation = None,
    where: Any = None,
    nan: NanPolicy = "propagate",
) -> da.Array:
    """`fastbn.normalize` of a Dask array, lazily and block by block.

    Parameters
    ----------
    array : dask.array.Array of float32, float64, integers or bools, any number of dimensions
        With any chunks whose sizes along the feature axis are known.
    stats : Moments, RunningMoments, (mean, var), or what `moments` returned
        Population statistics, shape (C,). They are taken as they are now: later updates of a
        RunningMoments do not matter. The lazy Moments become part of the result's graph.
    gamma, beta : array_like of shape (C,), optional
        Scale and shift; None is 1 and 0.
    axis : int, default 1
        The feature axis.
    eps : float, default 1e-5
        Added to the variance. With ``var + eps == 0`` a feature becomes beta.
    activation : {None, "relu"}
    where, nan
        As in `moments`: y is 0 where the mask is False or, with ``nan="omit"``, the array is NaN.

    Returns
    -------
    dask.array.Array
        Of the array's shape and chunks; float32 for float32, otherwise float64. The bits are those
        of `fastbn.normalize` of the array in memory with the same statistics.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; before a graph is built unless it
        takes the values to know.

    Notes
    -----
    With lazy statistics of the same array each block is loaded twice, once for the statistics and
    once to be normalised, so that no worker has to hold the data in between. Where the cluster's
    memory does hold them, ``array = array.persist()`` before both saves the second time.

    Examples
    --------
    >>> import dask.array as da, fastbn.dask
    >>> x = da.arange(6.0, chunks=3).reshape(3, 2).rechunk((2, 2))
    >>> y = fastbn.dask.normalize(x, fastbn.dask.moments(x), beta=[0.0, 10.0])
    >>> y
    dask.array<normalize, shape=(3, 2), dtype=float64, chunksize=(2, 2), chunktype=numpy.ndarray>
    >>> y.compute().round(4)
    array([[-1.2247,  8.7753],
           [ 0.    , 10.    ],
           [ 1.2247, 11.2247]])
    """
    axis = _check(array, axis)
    check_activation(activation)
    check_nan(nan)
    mask, mask_axes = _by_sample(where, "where", array, axis)
    options = {"eps": check_eps(eps), "activation": activation, "nan": nan}
    given = stats, gamma, beta
    return _by_block(_dask_tasks.normalize, array, axis, given, mask, mask_axes, options)


def denormalize(
    array: da.Array,
    stats: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
) -> da.Array:
    """The inverse of `normalize`, block by block; the same arguments and errors.

    Examples
    --------
    >>> import dask.array as da, fastbn.dask
    >>> x = da.arange(6.0, chunks=2)
    >>> m = fastbn.dask.moments(x).compute()
    >>> fastbn.dask.denormalize(fastbn.dask.normalize(x, m), m).compute().round(12)
    array([0., 1., 2., 3., 4., 5.])
    """
    axis = _check(array, axis)
    given, options = (stats, gamma, beta), {"eps": check_eps(eps)}
    return _by_block(_dask_tasks.denormalize, array, axis, given, None, None, options)


# Before the graph: arguments.


def _check(array: Any, axis: Any) -> int:
    """The feature axis, not negative, of what has to be a Dask array of real numbers."""
    if not isinstance(array, da.Array):
        hint = "fastbn.moments and fastbn.normalize take arrays in memory"
        if is_dask_collection(array):
            hint = "a Dask dataframe becomes one by .to_dask_array()"
        raise TypeError(f"array: expected a Dask array, got {type(array).__name__}; {hint}")
    meta = array._meta
    if not isinstance(meta, np.ndarray) or isinstance(meta, np.ma.MaskedArray):
        raise TypeError(f"array: expected blocks of plain NumPy arrays, got {type(meta).__name__}")
    check_dtype(array.dtype, "array")
    return check_axis(axis, array, "array")


def _check_split_every(split_every: Any) -> int:
    if split_every is None:
        return SPLIT_EVERY
    try:
        n = operator.index(split_every)
    except TypeError:
        raise TypeError(f"split_every: expected an integer >= 2, got {split_every!r}") from None
    if n < 2:
        raise ValueError(f"split_every: expected an integer >= 2, got {n}")
    return n


def _by_sample(
    values: Any, name: str, array: da.Array, axis: int
) -> tuple[da.Array | None, tuple[int, ...] | None]:
    """Weights or a mask in the array's chunks, and which of its axes they have.

    Axes along which they are broadcast are dropped.
    """
    if values is None:
        return None, None
    values = _as_samples(values, name)
    axes = _dask_tasks.sample_axes(array.ndim, axis)
    shape = tuple(array.shape[k] for k in axes)
    kept = [
        (k, j) for k, j in zip(axes[::-1], range(values.ndim - 1, -1, -1)) if values.shape[j] != 1
    ][::-1]
    if values.ndim > len(axes) or any(_differ(array.shape[k], values.shape[j]) for k, j in kept):
        raise ValueError(
            f"{name}: expected shape {shape}, that of the array without the feature axis, or one "
            f"that broadcasts to it, got {values.shape}"
        )
    dropped = set(range(values.ndim)) - {j for _, j in kept}
    values = values[tuple(0 if j in dropped else slice(None) for j in range(values.ndim))]
    chunks = [array.chunks[k] for k, _ in kept]
    unknown = [np.isnan(c).any() for c in chunks]
    if not isinstance(values, da.Array):
        if any(unknown):
            raise ValueError(
                f"{name}: expected a Dask array in the chunks of the array, whose sizes are "
                "unknown; array.compute_chunk_sizes() finds them out"
            )
        values = da.from_array(values, chunks=tuple(chunks))
    elif any(unknown) or np.isnan(values.shape).any():  # a task compares the sizes
        if [len(c) for c in chunks] != [len(c) for c in values.chunks]:
            raise ValueError(
                f"{name}: expected the {[len(c) for c in chunks]} chunks of the array, of unknown "
                f"sizes, got {[len(c) for c in values.chunks]}"
            )
    else:
        values = values.rechunk(tuple(chunks))
    return values, tuple(k for k, _ in kept)


def _as_samples(values: Any, name: str) -> Any:
    """Weights or a mask as an array, in memory or Dask's, of the right dtype."""
    if name == "weights":
        if isinstance(values, da.Array):
            check_dtype(values.dtype, name)
            return values
        values = as_array(values, name)
        check_weights(np.require(values, np.float64, ["C", "A"]))
        return values
    if not isinstance(values, da.Array):
        return as_mask(values, "where")
    if values.dtype != bool:
        raise TypeError(f"{name}: expected an array of bools, got {values.dtype}")
    return values


def _differ(a: float, b: float) -> bool:
    """Of two sizes; an unknown one may be any."""
    return a != b and not (math.isnan(a) or math.isnan(b))


def _tree(blocks: Array, axis: int, fan_in: int, name: str) -> dict[Any, Any]:
    """The tasks that merge neighbours, `fan_in` at a time, and put the features side by side.

    A graph by hand, in one layer: `dask.delayed` takes a second for a thousand merges.
    """
    by_feature = np.moveaxis(blocks, axis, 0) if blocks.ndim > 1 else blocks[np.newaxis]
    graph: dict[Any, Any] = {}
    roots = []
    for f, parts in enumerate(by_feature):
        keys, level = [_task_of(part) for part in parts.flat], 0
        while len(keys) > 1:
            groups = [keys[i : i + fan_in] for i in range(0, len(keys), fan_in)]
            keys = [(f"merge-{name}", f, level, i) for i in range(len(groups))]
            graph.update((key, (_dask_tasks.merge, group)) for key, group in zip(keys, groups))
            level += 1
        roots += keys
    graph[name] = (_dask_tasks.finish, roots)
    return graph


def _task_of(block: Delayed) -> Any:
    """The key of the task that makes a block, where the block's own is another name for it.

    A later optimisation would fuse the two under a third name, and the statistics that are part
    of `normalize`'s graph would no more be the same tasks as those computed beside it.
    """
    graph = block.dask
    node = graph[block.key]
    target = getattr(node, "target", node)  # in older versions of Dask the key itself
    try:
        return target if target in graph else block.key
    except TypeError:  # a task with lists in it
        return block.key


def _by_block(
    function: Callable[..., Array],
    array: da.Array,
    axis: int,
    given: tuple[Any, Any, Any],
    mask: da.Array | None,
    mask_axes: tuple[int, ...] | None,
    options: dict[str, Any],
) -> da.Array:
    """`function` of every block with its features' share of (stats, gamma, beta)."""
    sizes = (1,) if array.ndim == 1 else array.chunks[axis]
    if np.isnan(sizes).any():
        raise ValueError(
            "array: expected known chunk sizes along the feature axis; "
            "array.compute_chunk_sizes() finds them out"
        )
    features = features_of(array, axis)
    stats, gamma, beta = given
    parts = (*stats, gamma, beta) if isinstance(stats, tuple) else (stats, gamma, beta)
    if any(is_dask_collection(part) for part in parts):
        parameters = delayed(_dask_tasks.parameters, pure=True)(stats, gamma, beta, features)
    else:  # one node of the graph, which all blocks share
        parameters = delayed(
            _dask_tasks.parameters(stats, gamma, beta, features), pure=True, traverse=False
        )
    first = None  # of the features of a block
    if len(sizes) > 1:
        first = da.from_array(np.cumsum((0, *sizes[:-1])), chunks=1)
    index = tuple(range(array.ndim))
    dtype = compute_dtype(array)
    return da.blockwise(
        function,
        index,
        array,
        index,
        first,
        None if first is None else (axis,),
        mask,
        mask_axes,
        parameters,
        None,
        axis=axis,
        mask_axes=mask_axes,
        options=options,
        align_arrays=False,
        dtype=dtype,
        meta=np.empty((0,) * array.ndim, dtype),
    )
