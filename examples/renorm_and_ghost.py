"""Two relatives of batch norm, as recipes of fastbn's functions.

**Ghost batches** (Hoffer, Hubara & Soudry 2017): a large batch is normalised in parts, each with
its own statistics, which keeps the noise that training with small batches has. With a layer it is
one loop, which updates the running statistics part by part:

    y = np.empty_like(x)
    for i in range(0, len(x), size):
        bn(x[i : i + size], out=y[i : i + size])

**Batch renormalization** (Ioffe 2017): y is what inference would give, also in training,

    y = (xhat r + d) gamma + beta    xhat = (x - m.mean) / std_m    std = sqrt(var + eps)
    r = std_m / std_running          d = (m.mean - running.mean) / std_running

with r kept within [1 / r_max, r_max] and d within [-d_max, d_max], and both taken for constants
by the backward. That is batch norm with other parameters, gamma r and beta + gamma d.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn

Array = NDArray[Any]


def ghost_batch_norm(
    x: Array, gamma: Array, beta: Array, *, size: int, eps: float = 1e-5
) -> tuple[Array, list[fastbn.Moments]]:
    """Normalise each `size` samples of x, shape (N, C, ...), by themselves.

    Returns y and the moments of each part; their sum is that of the whole batch.
    """
    y, parts = np.empty_like(x), []
    for i in range(0, len(x), size):
        part = slice(i, i + size)
        parts.append(fastbn.batch_norm(x[part], gamma, beta, eps=eps, out=y[part])[1])
    return y, parts


def ghost_batch_norm_backward(
    dy: Array, x: Array, parts: list[fastbn.Moments], gamma: Array, *, size: int, eps: float = 1e-5
) -> tuple[Array, Array, Array]:
    """dx, dgamma and dbeta: gradients go through each part's own statistics."""
    dx, dgamma, dbeta = np.empty_like(x), np.zeros(len(gamma)), np.zeros(len(gamma))
    for i, m in zip(range(0, len(x), size), parts):
        part = slice(i, i + size)
        _, dg, db = fastbn.batch_norm_backward(dy[part], x[part], m, gamma, eps=eps, out=dx[part])
        dgamma, dbeta = dgamma + dg, dbeta + db
    return dx, dgamma, dbeta


def renorm_parameters(
    m: fastbn.Moments,
    running: fastbn.RunningMoments,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """r and d, shape (C,), of a batch with moments m. ``r_max=1, d_max=0`` is batch norm."""
    mean, var = running.mean_and_var
    std = np.sqrt(var + eps)
    r = np.clip(np.sqrt(m.var + eps) / std, 1 / r_max, r_max)
    return r, np.clip((m.mean - mean) / std, -d_max, d_max)


def renorm(
    x: Array,
    m: fastbn.Moments,
    gamma: Array,
    beta: Array,
    r: Array,
    d: Array,
    *,
    eps: float = 1e-5,
) -> Array:
    """y of a batch x with moments m."""
    return fastbn.normalize(x, m, gamma * r, beta + gamma * d, eps=eps)


def renorm_backward(
    dy: Array,
    x: Array,
    m: fastbn.Moments,
    gamma: Array,
    r: Array,
    d: Array,
    *,
    eps: float = 1e-5,
) -> tuple[Array, Array, Array]:
    """dx, dgamma and dbeta with r and d held constant."""
    dx, dscale, dbeta = fastbn.batch_norm_backward(dy, x, m, gamma * r, eps=eps)
    return dx, r * dscale + d * dbeta, dbeta  # gamma scales xhat r and d alike


def main() -> None:
    """How far training is from inference, with a batch whose mean is off."""
    rng = np.random.default_rng(0)
    x = rng.normal([0.0, 5.0], [1.0, 2.0], (1024, 2))
    gamma, beta = np.ones(2), np.zeros(2)
    running = fastbn.RunningMoments(2, momentum=1.0)
    running.update(fastbn.moments(x))

    batch = x[:64] + [0.5, -1.0]
    inference = fastbn.normalize(batch, running, gamma, beta)
    m = fastbn.moments(batch)
    r, d = renorm_parameters(m, running)
    ghosts, _ = ghost_batch_norm(batch, gamma, beta, size=16)
    for name, y in (
        ("batch norm", fastbn.batch_norm(batch, gamma, beta)[0]),
        ("ghost batches of 16", ghosts),
        ("batch renormalization", renorm(batch, m, gamma, beta, r, d)),
    ):
        print(f"{name:22} differs from inference by up to {np.abs(y - inference).max():.3f}")


if __name__ == "__main__":
    main()
