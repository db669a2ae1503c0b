"""fastbn, NumPy, PyTorch and oneDNN as their users call them, for what accuracy.py compares.

Each takes the arrays of one `exact.Problem` in one layout and gives all results: statistics of the
batch, and what follows from the statistics that the same library found. peers.py is for speed:
there every call gets the same exact statistics.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from arrays import EPS, Array, Data
from onednn import OneDNN
from peers import Unavailable, require
from shapes import Case

Results = dict[str, Any]


@dataclass
class Given:
    """x, dy and y in one layout, (N, C, ...), and parameters of shape (C,), all of one dtype."""

    case: Case
    x: Array
    dy: Array
    y: Array
    gamma: Array
    beta: Array

    @property
    def axes(self) -> tuple[int, ...]:
        return (0, *range(2, self.x.ndim))

    def column(self, values: Any) -> Any:
        return values.reshape((1, -1) + (1,) * (self.x.ndim - 2))


def fastbn_on(name: str) -> Callable[[Given], Results]:
    """fastbn with the kernels of one instruction set."""
    fastbn: Any = importlib.import_module("fastbn")
    runtime: Any = importlib.import_module("fastbn._runtime")
    kernels = runtime.load_kernels(name)

    def run(a: Given) -> Results:
        before, runtime.kernels = runtime.kernels, kernels
        try:
            y, m = fastbn.batch_norm(a.x, a.gamma, a.beta, eps=EPS)
            dx, dgamma, dbeta = fastbn.batch_norm_backward(a.dy, a.x, m, a.gamma, a.beta, eps=EPS)
            again = fastbn.normalize(a.x, m, a.gamma, a.beta, eps=EPS)
            x = fastbn.denormalize(a.y, m, a.gamma, a.beta, eps=EPS)
        finally:
            runtime.kernels = before
        found = {"mean": m.mean, "var": m.var, "y": y, "normalize": again, "denormalize": x}
        return found | {"dx": dx, "dgamma": dgamma, "dbeta": dbeta}

    return run


def numpy_in(dtype: Any) -> Callable[[Given], Results]:
    """The usual expressions, with sums and all arithmetic in ``dtype`` (None: x's)."""

    def run(a: Given) -> Results:
        own = a.x.dtype
        x, dy, y = (v.astype(dtype or own, copy=False) for v in (a.x, a.dy, a.y))
        gamma, beta = a.column(a.gamma), a.column(a.beta)
        over: dict[str, Any] = {"axis": a.axes, "keepdims": True}
        mean, var = x.mean(**over), x.var(**over)
        std = np.sqrt(var + EPS)
        xhat, n = (x - mean) / std, x.size // a.gamma.size
        dgamma, dbeta = (dy * xhat).sum(**over), dy.sum(**over)
        dx = gamma / std * (dy - dbeta / n - xhat * (dgamma / n))
        out, back = xhat * gamma + beta, (y - beta) / gamma * std + mean
        elements = {"y": out, "normalize": out, "denormalize": back, "dx": dx}
        found = {key: value.astype(own, copy=False) for key, value in elements.items()}
        return found | {"mean": mean, "var": var, "dgamma": dgamma, "dbeta": dbeta}

    return run


def pytorch(threads: int) -> Callable[[Given], Results]:
    """F.batch_norm and its gradient, and var_mean."""
    torch, _ = require("torch")
    torch.set_num_threads(threads)

    def run(a: Given) -> Results:
        x, dy, y, gamma, beta = map(torch.from_numpy, (a.x, a.dy, a.y, a.gamma, a.beta))
        var, mean = torch.var_mean(x, a.axes, correction=0)
        f = torch.nn.functional.batch_norm
        again = f(x, mean, var, gamma, beta, training=False, eps=EPS)
        back = (y - a.column(beta)) / a.column(gamma)
        back = back * a.column(torch.sqrt(var + EPS)) + a.column(mean)
        for tensor in (x, gamma, beta):
            tensor.requires_grad_()
        out = f(x, None, None, gamma, beta, training=True, eps=EPS)
        out.backward(dy)
        tensors = {"mean": mean, "var": var, "y": out, "normalize": again, "denormalize": back}
        tensors |= {"dx": x.grad, "dgamma": gamma.grad, "dbeta": beta.grad}
        return {key: tensor.detach().numpy() for key, tensor in tensors.items()}

    return run


class _Held(Data):
    """The arrays of a `Given` under the names that onednn.py asks for."""

    def __init__(self, a: Given) -> None:
        self.case, self.dtype = a.case, a.x.dtype.name
        self.x, self.dy, self.gamma, self.beta = a.x, a.dy, a.gamma, a.beta
        self.y, self.dx = np.zeros_like(a.x), np.zeros_like(a.x)
        self.mean, self.var = np.zeros_like(a.gamma), np.ones_like(a.gamma)


def onednn(threads: int) -> Callable[[Given], Results]:
    """The primitive: training forward, then inference and backward with what that found."""
    library = OneDNN(threads)

    def run(a: Given) -> Results:
        data = _Held(a)

        def do(operation: str) -> Results:
            prepared = library.prepare(operation, data)
            return prepared.results(prepared.call())

        found = {key: value.copy() for key, value in do("forward").items()}
        data.mean, data.var = found["mean"], found["var"]
        return found | do("backward") | {"normalize": do("inference")["y"]}

    return run


def load(threads: int) -> tuple[dict[str, Callable[[Given], Results]], list[str]]:
    """(contenders by name, why others are not here)."""
    runtime: Any = importlib.import_module("fastbn._runtime")
    importlib.import_module("fastbn").set_num_threads(threads)
    found = {f"fastbn, {name}": fastbn_on(name) for name in runtime.instruction_sets()}
    found |= {"NumPy": numpy_in(None), "NumPy in float64": numpy_in(np.float64)}
    missing = []
    for name, make in (("PyTorch", pytorch), ("oneDNN", onednn)):
        try:
            found[name] = make(threads)
        except Unavailable as reason:
            missing.append(f"{name} {reason}")
    return found, missing
