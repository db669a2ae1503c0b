"""A multilayer perceptron in NumPy that reads handwritten digits, with and without batch norm.

Each hidden layer computes

    z = h W          a linear map (without batch norm: + b),
    u = BN(z)        each feature of the batch to mean 0 and variance 1, then * gamma + beta,
    h = max(u, 0)    ReLU,

and a last linear map gives one logit per class. Batch norm subtracts the mean, so a bias before
it would have no effect: beta takes its place.

The data are the 1797 images of 8 x 8 pixels that come with scikit-learn. Run it with

    pip install 'fastbn[demo]'
    python examples/digits_mlp.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

import fastbn

Array = NDArray[Any]


class MLP:
    """Multilayer perceptron: ``len(sizes) - 2`` hidden layers, each with batch norm if asked.

    Parameters
    ----------
    sizes : widths of input, hidden layers and output, such as ``(64, 100, 100, 10)``
    batch_norm : normalise before each activation
    scale : factor on He's initial weights, whose standard deviation is sqrt(2 / inputs)
    residual : add the input of a hidden layer to its output where the widths agree
    dtype : float32 or float64
    seed : of the initial weights
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        batch_norm: bool,
        scale: float = 1.0,
        residual: bool = False,
        dtype: DTypeLike = np.float32,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.residual = residual
        self.weights: list[Array] = [
            (rng.standard_normal((m, n)) * scale * np.sqrt(2 / m)).astype(dtype)
            for m, n in pairwise(sizes)
        ]
        # A run that diverges shall show it in its loss, as it does without batch norm.
        self.norms = [
            fastbn.BatchNorm(n, dtype=dtype, nonfinite="propagate")
            for n in sizes[1:-1]
            if batch_norm
        ]
        # One bias for each linear map that has no batch norm behind it.
        biased = sizes[-1:] if batch_norm else sizes[1:]
        self.biases: list[Array] = [np.zeros(n, dtype) for n in biased]

    def train(self) -> None:
        """Normalise with the statistics of the batch from now on."""
        for bn in self.norms:
            bn.train()

    def eval(self) -> None:
        """Normalise with the running statistics from now on."""
        for bn in self.norms:
            bn.eval()

    def forward(self, x: Array) -> Array:
        """Logits, shape (N, classes), of a batch of shape (N, features)."""
        self.inputs = [x]  # of each linear map
        self.active: list[Array] = []  # where each ReLU passes its input on
        for i, w in enumerate(self.weights[:-1]):
            h = self.inputs[-1]
            z = h @ w
            u = self.norms[i](z) if self.norms else z + self.biases[i]
            self.active.append(u > 0)
            a = np.maximum(u, 0)
            self.inputs.append(h + a if self._skips(w) else a)
        return self.inputs[-1] @ self.weights[-1] + self.biases[-1]

    def backward(self, dlogits: Array) -> list[tuple[Array, Array]]:
        """Chain rule, last layer first: every parameter with the gradient of the loss by it."""
        pairs = [
            (self.weights[-1], self.inputs[-1].T @ dlogits),
            (self.biases[-1], dlogits.sum(axis=0)),
        ]
        dh = dlogits @ self.weights[-1].T
        for i in reversed(range(len(self.weights) - 1)):
            w = self.weights[i]
            du = dh * self.active[i]
            if self.norms:
                bn = self.norms[i]
                dz = bn.backward(du)
                pairs += [(bn.gamma, bn.grad_gamma), (bn.beta, bn.grad_beta)]
            else:
                dz = du
                pairs += [(self.biases[i], du.sum(axis=0))]
            pairs += [(w, self.inputs[i].T @ dz)]
            if i > 0:
                dh = dz @ w.T + dh if self._skips(w) else dz @ w.T
        return pairs

    def _skips(self, w: Array) -> bool:
        return self.residual and w.shape[0] == w.shape[1]


class Digits(NamedTuple):
    """Images, shape (N, 64), float32 in [-1, 1], and their labels 0..9."""

    x: Array
    labels: Array


def load_digits() -> Digits:
    """All 1797 images of scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)  # pixels are 0..16
    return Digits((pixels / 8 - 1).astype(np.float32), labels)


def split(digits: Digits, seed: int = 0) -> tuple[Digits, Digits, Digits]:
    """Shuffle, then cut into 60 % to train with, 20 % to validate and 20 % to test."""
    order = np.random.default_rng(seed).permutation(len(digits.x))
    a, b = int(0.6 * len(order)), int(0.8 * len(order))
    parts = order[:a], order[a:b], order[b:]
    one, two, three = (Digits(digits.x[part], digits.labels[part]) for part in parts)
    return one, two, three


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Mean of -log softmax(logits)[label] over the batch, and its gradient by the logits."""
    n = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)  # softmax is the same, exp is safe
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    dlogits = np.exp(log_p)
    dlogits[n, labels] -= 1
    return float(-log_p[n, labels].mean()), dlogits / len(labels)


def accuracy(net: MLP, digits: Digits) -> float:
    """Share of images that the network names correctly, in percent."""
    net.eval()
    return 100 * float((net.forward(digits.x).argmax(axis=1) == digits.labels).mean())


def train(net: MLP, digits: Digits, *, rate: float, batch: int, seed: int = 0) -> Iterator[float]:
    """Plain stochastic gradient descent without end; yields the loss of each batch.

    Every epoch goes through the images once, in an order of its own that `seed` determines; what
    does not fill the last batch waits for another epoch. Between batches the caller may do with
    the network as it likes.
    """
    rng = np.random.default_rng(seed)
    batch = min(batch, len(digits.x))
    while True:
        order = rng.permutation(len(digits.x))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            net.train()
            loss, dlogits = cross_entropy(net.forward(digits.x[chosen]), digits.labels[chosen])
            for parameter, gradient in net.backward(dlogits):
                parameter -= rate * gradient
            yield loss


def main() -> None:
    """Train one network without batch norm and one with it, and print how they fare."""
    training, _, test = split(load_digits())
    batch = 50
    epoch = len(training.x) // batch  # steps
    for batch_norm in (False, True):
        net = MLP((64, 100, 100, 100, 10), batch_norm=batch_norm)
        print("with batch norm" if batch_norm else "without batch norm")
        losses = []
        for loss in train(net, training, rate=0.25, batch=batch):
            losses.append(loss)
            if len(losses) in (epoch, 2 * epoch, 5 * epoch, 10 * epoch):
                print(
                    f"  epoch {len(losses) // epoch:2d}"
                    f"   loss {np.mean(losses[-epoch:]):.4f}"
                    f"   test accuracy {accuracy(net, test):.1f} %"
                )
            if len(losses) == 10 * epoch:
                break


if __name__ == "__main__":
    main()
