"""PyTorch: the eager kernels, and torch.compile.

Both work on the memory of the NumPy arrays; `torch.from_numpy` keeps the strides, so that a
channels-last view arrives as PyTorch's own channels_last.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from arrays import EPS, Data
from expected import Results
from peers import Peer, Prepared, Tolerance, Unavailable, require


class Eager(Peer):
    """The ATen kernels behind torch.nn.functional.batch_norm, called with ``out=``."""

    name = "torch"
    tolerance = Tolerance(
        (1e-2, 1e-11), (1e-2, 1e-11), "keeps float32 partial sums per thread for features innermost"
    )

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.torch, self.version = require("torch")
        self.torch.set_num_threads(threads)

    def _wrap(self, data: Data, *names: str) -> list[Any]:
        return [self.torch.from_numpy(getattr(data, name)) for name in names]

    def forward(self, data: Data) -> Prepared:
        f = self.torch.native_batch_norm
        x, gamma, beta, y = self._wrap(data, "x", "gamma", "beta", "y")
        mean, invstd = self.torch.empty_like(gamma), self.torch.empty_like(gamma)
        out = (y, mean, invstd)

        def results(_: Any) -> Results:
            return {"y": data.y, "mean": mean.numpy(), "var": invstd.double().numpy() ** -2 - EPS}

        return Prepared(lambda: f(x, gamma, beta, None, None, True, 0.1, EPS, out=out), results)

    def inference(self, data: Data) -> Prepared:
        f = self.torch.native_batch_norm
        x, gamma, beta, mean, var, y = self._wrap(data, "x", "gamma", "beta", "mean", "var", "y")
        empty = self.torch.empty(0, dtype=x.dtype)
        out = (y, empty, empty.clone())
        return Prepared(
            lambda: f(x, gamma, beta, mean, var, False, 0.1, EPS, out=out),
            lambda _: {"y": data.y},
        )

    def backward(self, data: Data) -> Prepared:
        # The out= overload of the backward computes into fresh memory and copies: slower, so not
        # used. The memory is warm all the same (see environment.prepare).
        f = self.torch.ops.aten.native_batch_norm_backward.default
        dy, x, gamma, mean, invstd = self._wrap(data, "dy", "x", "gamma", "mean", "invstd")
        mask = [True, True, True]
        return Prepared(
            lambda: f(dy, x, gamma, None, None, mean, invstd, True, EPS, mask),
            lambda r: {"dx": r[0].numpy(), "dgamma": r[1].numpy(), "dbeta": r[2].numpy()},
        )

    def moments(self, data: Data) -> Prepared:
        f, (x,), axes = self.torch.var_mean, self._wrap(data, "x"), data.axes
        return Prepared(
            lambda: f(x, axes, correction=0),
            lambda r: {"mean": r[1].numpy(), "var": r[0].numpy()},
        )


class Compiled(Eager):
    """torch.compile of the functional form, copied into the output: the compiler fuses that."""

    name = "compile"
    seconds = 120

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
            raise Unavailable("needs a C++ compiler")

    def _compile(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        self.torch._dynamo.reset()  # forget the last case, or a limit on recompilations is reached
        compiled = self.torch.compile(function, dynamic=False, fullgraph=True)
        with _deadline(self.seconds):
            compiled(*arguments)
        return lambda: compiled(*arguments)

    def forward(self, data: Data) -> Prepared:
        f = self.torch.ops.aten._native_batch_norm_legit.no_stats

        def step(x: Any, gamma: Any, beta: Any, y: Any) -> Any:
            result, mean, invstd = f(x, gamma, beta, True, 0.1, EPS)
            y.copy_(result)
            return mean, invstd

        call = self._compile(step, *self._wrap(data, "x", "gamma", "beta", "y"))

        def results(r: Any) -> Results:
            mean, invstd = (t.double().numpy().reshape(-1) for t in r)
            return {"y": data.y, "mean": mean, "var": invstd**-2 - EPS}

        return Prepared(call, results)

    def inference(self, data: Data) -> Prepared:
        f = self.torch.nn.functional.batch_norm

        def step(x: Any, mean: Any, var: Any, gamma: Any, beta: Any, y: Any) -> None:
            y.copy_(f(x, mean, var, gamma, beta, False, 0.1, EPS))

        call = self._compile(step, *self._wrap(data, "x", "mean", "var", "gamma", "beta", "y"))
        return Prepared(call, lambda _: {"y": data.y})

    def backward(self, data: Data) -> Prepared:
        f = self.torch.ops.aten.native_batch_norm_backward.default

        def step(dy: Any, x: Any, gamma: Any, mean: Any, invstd: Any, dx: Any) -> Any:
            mask = [True, True, True]
            result, dgamma, dbeta = f(dy, x, gamma, None, None, mean, invstd, True, EPS, mask)
            dx.copy_(result)
            return dgamma, dbeta

        names = ("dy", "x", "gamma", "mean", "invstd", "dx")
        call = self._compile(step, *self._wrap(data, *names))
        return Prepared(
            call, lambda r: {"dx": data.dx, "dgamma": r[0].numpy(), "dbeta": r[1].numpy()}
        )

    def moments(self, data: Data) -> Prepared:
        f, axes = self.torch.var_mean, data.axes
        call = self._compile(lambda x: f(x, axes, correction=0), *self._wrap(data, "x"))
        return Prepared(call, lambda r: {"mean": r[1].numpy(), "var": r[0].numpy()})


@contextmanager
def _deadline(seconds: int) -> Any:
    """Give up on a compilation that does not end. Main thread only, as signals are."""

    def give_up(*_: Any) -> None:
        raise Unavailable(f"not compiled within {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
