"""What the tests of SyncBatchNorm compare with: PyTorch in one process, and exact results."""

from __future__ import annotations

import numpy as np
import oracle
import tolerances
import torch
from helpers import by_feature, parameters, spread
from sync_cases import CASES, layer, steps
from tolerances import EPS, EPS64, TORCH

PYTORCHS = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d,
            5: torch.nn.BatchNorm3d}  # fmt: skip
# PyTorch itself is off by more than rounding where the mean is large, and takes eps > 0 alone.
FOR_PYTORCH = [n for n, c in CASES.items() if not ({"kind", "dtype"} & c.keys())]


def assert_close(actual, expected, what):
    assert set(actual) == set(expected), what
    for key, value in expected.items():
        value = np.asarray(value)
        bound = TORCH * max(1, np.abs(value).max(initial=0))
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=bound, err_msg=f"{what}: {key}")


def one_process(case):
    """PyTorch's layer on the whole batch, in float64."""
    case = {**case, "dtype": "float64"}
    return steps(layer(PYTORCHS[len(case["shape"])], case), case)


class Exact:
    """What one process with the whole batch should get, in a wider float than the data's."""

    def __init__(self, x, dy, case):
        affine = case.get("options", {}).get("affine", True)
        gamma, beta = parameters(x.shape, 1) if affine else (None, None)
        if case.get("options", {}).get("bias") is False:
            beta = None
        gamma, beta = (None if p is None else p.astype(x.dtype) for p in (gamma, beta))
        self.n = x.size // x.shape[1]
        mean, m2 = oracle.moments(x)
        eps = case.get("eps", 1e-5)
        var = m2.exact / self.n
        given = oracle.Given(x, mean.exact, var, gamma, beta, eps=eps)
        std = np.sqrt((var + eps).astype(np.float64))
        far = 1 + np.divide(np.abs(mean.exact), std, where=std > 0, out=0 * std)
        self.of_statistics = tolerances.STATISTICS_SYNC * EPS64 * far.astype(np.float64)
        self.y, (self.dgamma, self.dbeta) = given.forward(), given.sums(dy)
        self.dx = given.gradient(dy, (self.dgamma, self.dbeta))
        self.slack = np.abs(by_feature(dy, 1)).sum(axis=1) * self.of_statistics
        self.unit = EPS[x.dtype]
        self.dtype = x.dtype

    def check(self, got, what):
        far = spread(self.of_statistics, got["y"].ndim, 1)
        for key, value, allowed in (
            ("y", self.y, tolerances.Y[self.dtype]),
            ("dx", self.dx, tolerances.DX[self.dtype]),
        ):
            limit = value.limit * (1 + far / (allowed * self.unit))
            oracle.Value(value.exact, limit).check(got[key], f"{key}, {what}")
        for key, value in (("weight.grad", self.dgamma), ("bias.grad", self.dbeta)):
            if key in got:  # parts of the parameters' dtype
                limit = value.limit + self.slack + self.unit * value.limit / EPS64
                oracle.Value(value.exact, limit).check(got[key], f"{key}, {what}")
