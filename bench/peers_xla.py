"""XLA on the CPU through jax.jit.

The output of the previous call is donated to the next, so that XLA writes into the same memory
again. JAX arrays have no strides: channels-last is given as the (N, H, W, C) array that it is in
memory. The size of XLA's thread pool is read from NPROC when the first array is made (see
`environment`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from arrays import EPS, Array, Data
from expected import Results
from peers import Peer, Prepared, Tolerance, require
from shapes import LAST


class XLA(Peer):
    name = "xla"
    tolerance = Tolerance(
        (1e-5, 1e-11), (1e-5, 1e-11), "float32 sums in blocks: some units in the last place"
    )

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.jax, self.version = require("jax")
        self.jnp, _ = require("jax.numpy", "jax")
        self.jax.config.update("jax_platforms", "cpu")
        self.jax.config.update("jax_enable_x64", True)  # or float64 arrays become float32

    def _device(self, array: Array) -> Any:
        """Without a copy, for arrays aligned to 64 bytes."""
        return self.jax.device_put(np.ascontiguousarray(array))

    def _axes(self, data: Data) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(the axes to average over, the shape of a per-feature array beside x)."""
        ndim = len(data.case.shape)
        feature = ndim - 1 if data.case.layout == LAST else 1
        shape = [1] * ndim
        shape[feature] = -1
        return tuple(a for a in range(ndim) if a != feature), tuple(shape)

    def _loop(
        self, step: Callable[..., Any], inputs: list[Any], output: Array
    ) -> Callable[[], Any]:
        """A call that runs ``step(*inputs, out)`` into the memory of its previous result.

        `step` returns (array like output, ...); its last argument is unused and donated.
        """
        donated = len(inputs)
        compiled = self.jax.jit(step, donate_argnums=(donated,), keep_unused=True)
        arguments = [self._device(a) for a in inputs]
        state = [self.jax.device_put(np.array(output))]  # a copy: XLA must own what is donated
        wait = self.jax.block_until_ready

        def call() -> Any:
            result = wait(compiled(*arguments, state[0]))
            state[0] = result[0]
            return result

        return call

    def forward(self, data: Data) -> Prepared:
        jnp, rsqrt = self.jnp, self.jax.lax.rsqrt
        axes, shape = self._axes(data)

        def step(x: Any, gamma: Any, beta: Any, _: Any) -> Any:
            mean = jnp.mean(x, axis=axes, keepdims=True)
            var = jnp.mean(jnp.square(x - mean), axis=axes, keepdims=True)
            y = (x - mean) * (rsqrt(var + EPS) * gamma.reshape(shape)) + beta.reshape(shape)
            return y, mean, var

        inputs = [data.physical(data.x), data.gamma, data.beta]
        call = self._loop(step, inputs, data.physical(data.y))

        def results(r: Any) -> Results:
            y, mean, var = (np.asarray(a) for a in r)
            return {"y": data.logical(y), "mean": mean.reshape(-1), "var": var.reshape(-1)}

        return Prepared(call, results)

    def inference(self, data: Data) -> Prepared:
        rsqrt = self.jax.lax.rsqrt
        _, shape = self._axes(data)

        def step(x: Any, mean: Any, var: Any, gamma: Any, beta: Any, _: Any) -> Any:
            mean, var, gamma, beta = (a.reshape(shape) for a in (mean, var, gamma, beta))
            return ((x - mean) * (rsqrt(var + EPS) * gamma) + beta,)

        inputs = [data.physical(data.x), data.mean, data.var, data.gamma, data.beta]
        call = self._loop(step, inputs, data.physical(data.y))
        return Prepared(call, lambda r: {"y": data.logical(np.asarray(r[0]))})

    def backward(self, data: Data) -> Prepared:
        jnp, count = self.jnp, data.case.samples
        axes, shape = self._axes(data)

        def step(dy: Any, x: Any, mean: Any, invstd: Any, gamma: Any, _: Any) -> Any:
            mean, invstd, gamma = (a.reshape(shape) for a in (mean, invstd, gamma))
            xhat = (x - mean) * invstd
            dbeta = jnp.sum(dy, axis=axes, keepdims=True)
            dgamma = jnp.sum(dy * xhat, axis=axes, keepdims=True)
            dx = gamma * invstd * (dy - dbeta / count - xhat * (dgamma / count))
            return dx, dgamma, dbeta

        inputs = [data.physical(data.dy), data.physical(data.x)]
        inputs += [data.mean, data.invstd, data.gamma]
        call = self._loop(step, inputs, data.physical(data.dx))

        def results(r: Any) -> Results:
            dx, dgamma, dbeta = (np.asarray(a) for a in r)
            return {
                "dx": data.logical(dx),
                "dgamma": dgamma.reshape(-1),
                "dbeta": dbeta.reshape(-1),
            }

        return Prepared(call, results)

    def moments(self, data: Data) -> Prepared:
        jnp = self.jnp
        axes, _ = self._axes(data)
        compiled = self.jax.jit(lambda x: (jnp.mean(x, axis=axes), jnp.var(x, axis=axes)))
        x, wait = self._device(data.physical(data.x)), self.jax.block_until_ready
        return Prepared(
            lambda: wait(compiled(x)),
            lambda r: {"mean": np.asarray(r[0]), "var": np.asarray(r[1])},
        )
