"""What Dask arrays' statistics and normalisation refuse, and when."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn

dask = pytest.importorskip("dask", reason="needs the extra fastbn[dask]")
da = pytest.importorskip("dask.array", reason="needs the extra fastbn[dask]")

import fastbn.dask  # noqa: E402

ONES = np.ones((6, 4))
ERRORS = {
    "array in memory": (TypeError, r"^array: .*got ndarray; fastbn.moments", lambda x: (ONES, {})),
    "delayed": (TypeError, r"^array: expected a Dask array", lambda x: (dask.delayed(ONES), {})),
    "complex": (TypeError, r"^array: .*complex128", lambda x: (x * 1j, {})),
    "object": (TypeError, r"^array: .*object", lambda x: (x.astype(object), {})),
    "float16": (TypeError, r"^array: .*float16", lambda x: (x.astype("f2"), {})),
    "masked": (TypeError, r"^array: .*MaskedArray", lambda x: (da.ma.masked_less(x, 0), {})),
    "scalar": (ValueError, r"^array: .*at least one dimension", lambda x: (x.sum(), {})),
    "axis beyond": (ValueError, r"^axis: 2 is out of bounds", lambda x: (x, {"axis": 2})),
    "axis": (TypeError, r"^axis: expected an integer", lambda x: (x, {"axis": None})),
    "nan": (ValueError, r"^nan: expected 'propagate'", lambda x: (x, {"nan": "drop"})),
    "where": (TypeError, r"^where: .*bools", lambda x: (x, {"where": np.ones(6)})),
    "lazy where": (TypeError, r"^where: .*bools, got float64", lambda x: (x, {"where": x[:, 0]})),
    "where's shape": (
        ValueError,
        r"^where: expected shape \(6,\), .* got \(4,\)$",
        lambda x: (x, {"where": da.ones(4, dtype=bool)}),
    ),
}
OF_MOMENTS = {
    "weights": (TypeError, r"^weights: .*complex", lambda x: (x, {"weights": 1j})),
    "lazy weights": (TypeError, r"^weights: .*complex", lambda x: (x, {"weights": x[:, 0] * 1j})),
    "negative": (
        ValueError,
        r"^weights: .*got -1",
        lambda x: (x, {"weights": [-1] * 6}),
    ),
    "weights' axes": (ValueError, r"^weights: .*\(6, 1\)", lambda x: (x, {"weights": x[:, :1]})),
    "split_every 1": (
        ValueError,
        r"^split_every: .*got 1",
        lambda x: (x, {"split_every": 1}),
    ),
    "split_every": (TypeError, r"^split_every: .*'a'", lambda x: (x, {"split_every": "a"})),
}
OF_NORMALIZE = {
    "stats": (TypeError, r"^stats: expected Moments", lambda x: (x, {"stats": ONES})),
    "features": (
        ValueError,
        r"^stats: expected 4 features, got 1$",
        lambda x: (x, {"stats": fastbn.moments([1.0])}),
    ),
    "variance": (
        ValueError,
        r"^stats: expected variances >= 0",
        lambda x: (x, {"stats": (np.ones(4), -np.ones(4))}),
    ),
    "gamma": (ValueError, r"^gamma: expected shape \(4,\)", lambda x: (x, {"gamma": [1.0]})),
    "beta": (TypeError, r"^beta: .*complex", lambda x: (x, {"beta": [1j] * 4})),
    "eps": (ValueError, r"^eps: .*>= 0", lambda x: (x, {"eps": -1})),
    "activation": (ValueError, r"^activation: ", lambda x: (x, {"activation": "gelu"})),
}


@pytest.mark.parametrize("name", [*ERRORS, *OF_MOMENTS])
def test_errors_of_moments(name):
    """Raised by the call itself, before anything is computed."""
    error, message, arguments = (ERRORS | OF_MOMENTS)[name]
    array, options = arguments(da.ones((6, 4), chunks=2))
    with pytest.raises(error, match=message):
        fastbn.dask.moments(array, **options)


@pytest.mark.parametrize("name", [*ERRORS, *OF_NORMALIZE])
def test_errors_of_normalize(name):
    error, message, arguments = (ERRORS | OF_NORMALIZE)[name]
    array, options = arguments(da.ones((6, 4), chunks=2))
    options = {"stats": fastbn.moments(ONES), **options}
    with pytest.raises(error, match=message):
        fastbn.dask.normalize(array, **options)


def test_weights_that_overflow_together():
    lazy = da.ones((6, 4), chunks=2)
    m = fastbn.dask.moments(lazy, weights=da.full(6, 5e307, chunks=2))
    with pytest.raises(ValueError, match=r"^weights: expected a finite sum"):
        m.compute()
    m = fastbn.dask.moments(lazy, weights=da.full(6, -1.0, chunks=2))
    with pytest.raises(ValueError, match=r"^weights: expected finite numbers >= 0"):
        m.compute()
