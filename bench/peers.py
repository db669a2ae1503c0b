"""The contenders: what they share, the list of them, and the three that need no binding.

A peer is loaded once per run and prepared once per case and operation. Everything that can be done
beforehand is: arrays wrapped, outputs allocated, code compiled. What remains is a callable without
arguments, and that alone is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from arrays import EPS, Data
from expected import Results
from shapes import ROWS


class Unavailable(Exception):
    """Not installed, or does not offer this; the message is printed and recorded."""


@dataclass
class Prepared:
    """One operation on one case, ready to run.

    ``results`` turns what ``call`` returned into arrays under the keys of `expected.Oracle`.
    ``note`` goes into the record: a restriction, or which implementation was chosen.
    """

    call: Callable[[], Any]
    results: Callable[[Any], Results]
    note: str = ""


@dataclass(frozen=True)
class Tolerance:
    """The largest error, in the terms of `expected`, with which a result is still called right.

    ``arrays`` is for y and dx, ``sums`` for mean, var, dgamma and dbeta; each (float32, float64).
    """

    arrays: tuple[float, float]
    sums: tuple[float, float]
    reason: str

    def limit(self, key: str, dtype: str) -> float:
        pair = self.arrays if key in ("y", "dx", "standardised") else self.sums
        return pair[dtype == "float64"]


class Peer:
    """Base class. A subclass defines what it has of forward, inference, backward and moments."""

    name = ""
    tolerance = Tolerance((0.0, 0.0), (0.0, 0.0), "")

    def __init__(self, threads: int) -> None:
        """Import what is needed and set the threads, or raise `Unavailable`."""
        self.threads = threads
        self.version = ""

    def prepare(self, operation: str, data: Data) -> Prepared:
        method: Callable[[Data], Prepared] | None = getattr(self, operation, None)
        if method is None:
            raise Unavailable(f"offers no {operation} as one call")
        return method(data)


def require(module: str, distribution: str | None = None) -> tuple[Any, str]:
    """(module, version), or `Unavailable`."""
    try:
        return importlib.import_module(module), version(distribution or module)
    except (ImportError, OSError, PackageNotFoundError) as error:
        raise Unavailable(f"cannot be imported: {error}") from None


class FastBN(Peer):
    """The package itself, through its public functions."""

    name = "fastbn"
    tolerance = Tolerance(
        (2 * 2.0**-23, 2e-14), (1e-12, 1e-13), "y to 2 eps of float32, float64-grade sums"
    )

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.lib, self.version = require("fastbn")
        self.lib.set_num_threads(threads)

    def _moments(self, data: Data) -> Any:
        count = np.full(data.case.features, float(data.case.samples))
        return self.lib.Moments(count, data.mean64, data.var64 * count)

    def forward(self, data: Data) -> Prepared:
        f, x, gamma, beta, y = self.lib.batch_norm, data.x, data.gamma, data.beta, data.y
        return Prepared(
            lambda: f(x, gamma, beta, axis=1, eps=EPS, out=y),
            lambda r: {"y": y, "mean": r[1].mean, "var": r[1].var},
        )

    def inference(self, data: Data) -> Prepared:
        f, x, gamma, beta, y = self.lib.normalize, data.x, data.gamma, data.beta, data.y
        m = self._moments(data)
        return Prepared(
            lambda: f(x, m, gamma, beta, axis=1, eps=EPS, out=y),
            lambda r: {"y": y},
        )

    def backward(self, data: Data) -> Prepared:
        f, x, gamma, beta = self.lib.batch_norm_backward, data.x, data.gamma, data.beta
        dy, dx, m = data.dy, data.dx, self._moments(data)
        return Prepared(
            lambda: f(dy, x, m, gamma, beta, axis=1, eps=EPS, out=dx),
            lambda r: {"dx": dx, "dgamma": r[1], "dbeta": r[2]},
        )

    def moments(self, data: Data) -> Prepared:
        f, x = self.lib.moments, data.x
        return Prepared(lambda: f(x, axis=1), lambda r: {"mean": r.mean, "var": r.var})


class NumPy(Peer):
    """The plain expressions that people write, temporaries included. One thread, as NumPy is."""

    name = "numpy"
    tolerance = Tolerance(
        (3e-2, 1e-11), (3e-2, 1e-11), "float32 sums over axis 0 are made row by row, not pairwise"
    )

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.version = np.__version__

    def forward(self, data: Data) -> Prepared:
        x, axes = data.x, data.axes
        gamma, beta = data.column(data.gamma), data.column(data.beta)

        def call() -> Any:
            mean = x.mean(axis=axes, keepdims=True)
            var = x.var(axis=axes, keepdims=True)
            return (x - mean) / np.sqrt(var + EPS) * gamma + beta, mean, var

        return Prepared(
            call, lambda r: {"y": r[0], "mean": r[1].reshape(-1), "var": r[2].reshape(-1)}
        )

    def inference(self, data: Data) -> Prepared:
        x, mean, var = data.x, data.column(data.mean), data.column(data.var)
        gamma, beta = data.column(data.gamma), data.column(data.beta)
        return Prepared(lambda: (x - mean) / np.sqrt(var + EPS) * gamma + beta, lambda r: {"y": r})

    def backward(self, data: Data) -> Prepared:
        x, dy, axes, count = data.x, data.dy, data.axes, data.case.samples
        mean, invstd = data.column(data.mean), data.column(data.invstd)
        gamma = data.column(data.gamma)

        def call() -> Any:
            xhat = (x - mean) * invstd
            dbeta = dy.sum(axis=axes, keepdims=True)
            dgamma = (dy * xhat).sum(axis=axes, keepdims=True)
            return gamma * invstd * (dy - dbeta / count - xhat * dgamma / count), dgamma, dbeta

        return Prepared(
            call, lambda r: {"dx": r[0], "dgamma": r[1].reshape(-1), "dbeta": r[2].reshape(-1)}
        )

    def moments(self, data: Data) -> Prepared:
        x, axes = data.x, data.axes
        return Prepared(
            lambda: (x.mean(axis=axes), x.var(axis=axes)), lambda r: {"mean": r[0], "var": r[1]}
        )


class StandardScaler(Peer):
    """scikit-learn's scaler: fit, transform and fit_transform of an (N, C) array. One thread.

    It has no gamma and beta, and it reads its input again to look for NaN; both as a user gets it.
    """

    name = "sklearn"
    tolerance = Tolerance(
        (2e-6, 1e-11), (1e-11, 1e-11), "statistics in float64, arithmetic in x's dtype"
    )

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        _, self.version = require("sklearn", "scikit-learn")
        self.scaler = require("sklearn.preprocessing", "scikit-learn")[0].StandardScaler

    def prepare(self, operation: str, data: Data) -> Prepared:
        if data.case.layout != ROWS:
            raise Unavailable("takes (N, C) alone")
        return super().prepare(operation, data)

    def forward(self, data: Data) -> Prepared:
        f, x = self.scaler().fit_transform, data.x
        return Prepared(lambda: f(x), lambda r: {"standardised": r}, "fit_transform, no affine")

    def inference(self, data: Data) -> Prepared:
        f, x = self.scaler().fit(data.x).transform, data.x
        return Prepared(lambda: f(x), lambda r: {"standardised": r}, "transform, no affine")

    def moments(self, data: Data) -> Prepared:
        f, x = self.scaler().fit, data.x
        return Prepared(lambda: f(x), lambda r: {"mean": r.mean_, "var": r.var_}, "fit")


# Name -> "module:class", imported when asked for: importing PyTorch or JAX takes seconds, and the
# number of threads must be in the environment before.
PEERS = {
    "fastbn": "peers:FastBN",
    "fastbn:serial": "variants:Serial",
    "fastbn:avx2": "variants:AVX2",
    "fastbn:generic": "variants:Generic",
    "torch": "peers_torch:Eager",
    "compile": "peers_torch:Compiled",
    "xla": "peers_xla:XLA",
    "onednn": "onednn:OneDNN",
    "sklearn": "peers:StandardScaler",
    "numpy": "peers:NumPy",
}
SLOW_TO_PREPARE = ("compile",)
VARIANTS = tuple(name for name in PEERS if name.startswith("fastbn:"))
DEFAULT = tuple(name for name in PEERS if name not in (*SLOW_TO_PREPARE, *VARIANTS))


def load(names: list[str], threads: int) -> tuple[dict[str, Peer], dict[str, str]]:
    """(the peers that are here, the reasons of those that are not)."""
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"unknown peers {unknown}: expected some of {', '.join(PEERS)}")
    for name in names:
        module, _, attribute = PEERS[name].partition(":")
        try:
            found[name] = getattr(importlib.import_module(module), attribute)(threads)
        except Unavailable as reason:
            missing[name] = str(reason)
    return found, missing
