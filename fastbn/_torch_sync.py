"""`SyncBatchNorm`: one batch norm over the batches of several processes, on the CPU.

Each process reads its own shard once. What crosses between processes is `Moments` in the forward
and two sums per feature in the backward, both float64; every process gathers those of all and adds
them up in the order of ranks, so that all have the same bits.

It is no subclass of torch.nn.SyncBatchNorm, which DistributedDataParallel refuses on the CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from fastbn._layout import Array
from fastbn._torch_ops import _array, limited, update
from fastbn.functional import batch_norm_backward, moments, normalize
from fastbn.statistics import Moments

# The forward's first message has one length, whatever the number of features, so that processes
# that do not agree on that number can tell each other: gloo ends a process that receives more than
# it expects. Further features go in a second message, whose length is agreed by then.
FLAGS = 3
FIRST = 256  # features in the first message

STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are those of the batches of all processes together.

    What `torch.nn.SyncBatchNorm` does on GPUs, for CPU tensors and any backend of
    `torch.distributed` that gathers these (gloo, MPI): forward, backward and running statistics
    are those of one process with the whole batch. Arguments, buffers, state_dict and modes are
    PyTorch's, and so is this: the gradients of weight and bias are the process's own part, which
    `torch.nn.parallel.DistributedDataParallel` reduces as it does all others.

    Parameters
    ----------
    num_features : int
        C.
    eps : float, default 1e-5
    momentum : float or None, default 0.1
        Weight of the new batch in the running statistics; None for the average of all batches.
    affine, track_running_stats, bias : bool, default True
    process_group : optional
        The processes that share statistics; None for all.
    device, dtype : optional
        Of parameters and buffers.

    Notes
    -----
    The input has shape (N, C, ...), dtype float32 or float64, and any memory format, which the
    output has too. N may differ between processes, and be 0. Anything else is a `ValueError` or
    `TypeError` that names the input, in the process that got it, and a `RuntimeError` that names
    the process in all others; a single value per feature in all processes together is a
    `ValueError` in each. Then no process has changed its running statistics.

    Statistics are exchanged in training mode if a process group of two or more is initialised.
    Each process must then call its layers in the same order, in training mode, and run the same
    backward: as with any collective, the others wait for one that does not until the group's
    timeout. In evaluation nothing is exchanged.

    Under `torch.compile` the layer is a graph break. It can be differentiated once.

    Examples
    --------
    >>> import torch
    >>> from fastbn.torch import SyncBatchNorm
    >>> bn = SyncBatchNorm(2, affine=False)     # alone: the statistics of its own batch
    >>> bn(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).round(decimals=3)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    >>> bn.running_mean
    tensor([0.2000, 2.0000])
    """

    process_group: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:  # which PyTorch's own base class has not always known
            self.register_parameter("bias", None)
        self.process_group = process_group

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """y, of the input's shape, dtype and memory format."""
        group = self._group()
        from_data = self.training or (self.running_mean is None and self.running_var is None)
        stats: Moments | tuple[Array, Array]
        if synced := group is not None:
            stats, exchange = self._gathered(input, group)
            group = group if exchange else None
        elif from_data:
            stats = limited(moments, self._checked(input), axis=1)
        else:
            self._checked(input)
            # Copies: the buffers may have changed by the time of the backward.
            stats = _doubles(self.running_mean), _doubles(self.running_var)
        if isinstance(stats, Moments) and (stats.count == 1).any():
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{input.size()}" + (", with the other processes' inputs" if synced else "")
            )
        y = _Normalize.apply(input, self.weight, self.bias, stats, self.eps, group)
        if self.training and self.track_running_stats:
            assert isinstance(stats, Moments)
            self._update(stats)
        return y

    def _group(self) -> Any:
        """The processes to exchange statistics with; None if there are none."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input: expected at least 2D input (got {input.dim()}D input)")

    def _checked(self, input: Tensor) -> Array:
        """The input as an array, without a copy."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
        if input.device.type != "cpu":
            raise ValueError(f"input: expected a tensor on the CPU, got one on {input.device}")
        if input.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"input: expected float32 or float64, got {input.dtype}")
        self._check_input_dim(input)
        if input.size(1) != self.num_features:
            raise ValueError(
                f"input: expected {self.num_features} features on axis 1, got {input.size(1)}"
            )
        if self.num_features == 0:
            raise ValueError("input: expected a number of features that is not 0")
        return _array(input)

    def _gathered(self, input: Tensor, group: Any) -> tuple[Moments, bool]:
        """The moments of all processes' inputs, and whether any of them needs its gradient.

        A process whose input is refused says so, since the others wait for it.
        """
        local, refusal = None, None
        try:
            local = limited(moments, self._checked(input), axis=1)
        except Exception as error:
            refusal = error
        features = self.num_features
        table = np.zeros((4, features)) if local is None else local._table
        first = min(features, FIRST)
        message = np.zeros(FLAGS + 4 * FIRST)
        wants_gradient = local is not None and torch.is_grad_enabled() and input.requires_grad
        message[:FLAGS] = local is None, features, wants_gradient
        message[FLAGS : FLAGS + 4 * first] = table[:, :first].ravel()
        messages = _all_gather(message, group)
        if refusal is not None:
            raise refusal
        refused, sizes, gradients = messages[:, :FLAGS].T
        if refused.any():
            raise RuntimeError(
                f"input: refused by process {np.flatnonzero(refused)[0]} of the group, whose error "
                "tells why"
            )
        if (sizes != features).any():
            raise ValueError(
                "num_features: expected the same in all processes of the group, got "
                f"{sizes.astype(int).tolist()}"
            )
        tables = messages[:, FLAGS : FLAGS + 4 * first].reshape(-1, 4, first)
        if first < features:
            rest = _all_gather(table[:, first:].ravel(), group)
            tables = np.concatenate((tables, rest.reshape(len(rest), 4, -1)), axis=2)
        parts = [Moments._wrap(np.ascontiguousarray(t)) for t in tables]
        return functools.reduce(Moments.merge, parts), bool(gradients.any())

    def _update(self, batch: Moments) -> None:
        """The running statistics after the batch: PyTorch's formula, in float64.

        As there, an empty batch counts among the batches and changes nothing else, and what is
        not finite is taken.
        """
        factor = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(self.num_batches_tracked)
        if not batch.count.any():
            return
        if self.running_mean is not None and self.running_var is not None:
            update(self.running_mean, self.running_var, batch, 0.0 if factor is None else factor)

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: Any = None
    ) -> torch.nn.Module:
        """Replace every batch norm in `module` by one over all processes.

        Parameters
        ----------
        module : torch.nn.Module
            Changed in place. Batch norms of any class are replaced: PyTorch's, its SyncBatchNorm,
            fastbn's. A lazy one that has not seen data yet is a `ValueError`.
        process_group : optional
            As for the layer.

        Returns
        -------
        torch.nn.Module
            `module`; if that is a batch norm itself, a new layer. Parameters and buffers are the
            same objects, training mode and children are kept, and hooks are not, as PyTorch has it.

        Examples
        --------
        >>> import torch
        >>> from fastbn.torch import SyncBatchNorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        >>> [type(layer).__name__ for layer in SyncBatchNorm.convert_sync_batchnorm(net)]
        ['Linear', 'SyncBatchNorm']
        """
        return cls._converted(module, process_group, {})

    @classmethod
    def _converted(
        cls, module: torch.nn.Module, process_group: Any, done: dict[torch.nn.Module, Any]
    ) -> torch.nn.Module:
        """`done` has what became of modules seen before: one used twice stays one."""
        if module in done:
            return done[module]
        result = module
        if isinstance(module, _BatchNorm):
            if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
                raise ValueError(
                    f"module: expected batch norms that know their size, got {module}; run the "
                    "model once before converting it"
                )
            result = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_group,
            )
            for name in STATE:
                setattr(result, name, getattr(module, name))
            result.training = module.training
            if hasattr(module, "qconfig"):
                result.qconfig = module.qconfig
        done[module] = result
        for name, child in list(module._modules.items()):
            if child is not None:
                result.add_module(name, cls._converted(child, process_group, done))
        return result


class _Normalize(torch.autograd.Function):
    """y from given statistics, and gradients that flow through these if they are the batch's.

    stats are (mean, var), which do not depend on x; or the Moments of x; or, with a group, those
    of all its processes' x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Moments | tuple[Array, Array],
        eps: float,
        group: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.stats, ctx.eps, ctx.group = stats, eps, group
        y = torch.empty_like(x)
        gamma, beta = _doubles(weight), _doubles(bias)
        limited(normalize, _array(x), stats, gamma, beta, axis=1, eps=eps, out=y.numpy())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        want_dx, want_weight, want_bias = ctx.needs_input_grad[:3]
        gamma, a = _doubles(weight), _array(x)
        dx = torch.empty_like(x)
        out = dx.numpy()
        _, dgamma, dbeta = limited(
            batch_norm_backward,
            _array(dy),
            a,
            ctx.stats,
            gamma,
            axis=1,
            eps=ctx.eps,
            training=want_dx and ctx.group is None and isinstance(ctx.stats, Moments),
            out=out,
        )
        if ctx.group is not None:
            _through_statistics(out, a, ctx.stats, gamma, dgamma, dbeta, ctx.eps, ctx.group)
        return (
            dx if want_dx else None,
            torch.from_numpy(dgamma).to(weight.dtype) if want_weight else None,
            torch.from_numpy(dbeta).to(ctx.bias_dtype) if want_bias else None,
            None,
            None,
            None,
        )


def _through_statistics(
    dx: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None,
    dgamma: Array,
    dbeta: Array,
    eps: float,
    group: Any,
) -> None:
    """dx of frozen statistics -> dx of those of all processes, in place.

    With sums and n over all processes (Ioffe & Szegedy 2015)::

        dx = gamma / std * g - gamma / std * (sum(g) / n + xhat * sum(g * xhat) / n)

    dx has the first term, and the other is xhat with a scale and a shift.
    """
    total_gamma, total_beta = functools.reduce(
        np.add, _all_gather(np.concatenate((dgamma, dbeta)), group).reshape(-1, 2, len(dgamma))
    )
    std = np.sqrt(stats.var + eps)
    with np.errstate(all="ignore"):  # an empty batch, or data that are not finite
        slope = np.divide(
            1.0 if gamma is None else gamma, std, where=std != 0, out=np.zeros_like(std)
        )
        scale, shift = -slope * total_gamma / stats.count, -slope * total_beta / stats.count
    limited(normalize, x, stats, scale, shift, axis=1, eps=eps, out=dx, residual=dx)


def _all_gather(message: Array, group: Any) -> Array:
    """The float64 messages of all processes by rank, shape (processes, length)."""
    received = torch.empty(dist.get_world_size(group), len(message), dtype=torch.float64)
    dist.all_gather(list(received.unbind(0)), torch.from_numpy(message), group=group)
    return received.numpy()


def _doubles(t: Tensor | None) -> Any:
    """A copy in float64 of a parameter or buffer, or None for none."""
    return None if t is None else _array(t.detach().to(torch.float64, copy=True))
