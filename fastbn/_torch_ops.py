"""What `fastbn.torch` computes with: an `autograd.Function` for eager mode, and operators.

Under `torch.compile`, `torch.export` and on fake and meta tensors a call goes through the
operators ``fastbn::batch_norm``, ``fastbn::normalize`` and ``fastbn::batch_norm_backward`` of
`torch.library`. Their way through PyTorch's dispatcher takes as long as a small batch norm, so that
eager mode goes straight to the function, which computes the same.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit import is_tracing  # type: ignore[attr-defined]

import fastbn
from fastbn._layout import Array

Stats = fastbn.Moments | tuple[Array, Array]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: Any,
    eps: float,
) -> Tensor:
    """`fastbn.torch.batch_norm`, of checked arguments."""
    if (
        torch.compiler.is_compiling()
        or type(input) is not Tensor  # a fake tensor, or another's
        or input.device.type == "meta"
        or is_tracing()  # which would take results for constants
        or torch._C._len_torch_dispatch_stack()  # neither does anybody who listens see NumPy
    ):
        if not training:
            return _normalize(input, running_mean, running_var, weight, bias, eps)
        y, mean, var = _batch_norm(input, weight, bias, eps)
        seen = is_tracing() or input.numel()
        if running_mean is not None and running_var is not None and seen:
            n = input.numel() // input.shape[1]
            for running, new in ((running_mean, mean), (running_var, var * n / (n - 1))):
                running.copy_((1 - momentum) * running.double() + momentum * new)
        return y
    arguments = input, running_mean, running_var, weight, bias, training, float(momentum), eps
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:  # which the function refuses
        return _BatchNorm.apply(*arguments)
    return _forward(*arguments)[0]


def _array(t: Tensor | None) -> Any:
    """The tensor's memory as a NumPy array; a kernel's arguments have no graph."""
    if t is None:
        return None
    return t.detach().numpy() if t.requires_grad else t.numpy()


def limited(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call with no more threads than PyTorch would use."""
    threads = torch.get_num_threads()
    if threads >= fastbn.get_num_threads():
        return function(*args, **kwargs)
    with fastbn.num_threads(threads):
        return function(*args, **kwargs)


def _forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Stats]:
    """y, and the statistics that it was normalised with."""
    y = torch.empty_like(x)
    arrays = _array(x), _array(weight), _array(bias)
    if not training:
        running = _array(running_mean), _array(running_var)
        limited(fastbn.normalize, arrays[0], running, *arrays[1:], eps=eps, out=y.numpy())
        return y, running
    _, m = limited(fastbn.batch_norm, *arrays, eps=eps, out=y.numpy())
    if running_mean is not None and running_var is not None and x.numel():
        update(running_mean, running_var, m, momentum)
    return y, m


def update(mean: Tensor, var: Tensor, batch: fastbn.Moments, momentum: float) -> None:
    """The running statistics after a batch that is not empty; the variance is unbiased."""
    unbiased = momentum / (batch.count - 1)
    with np.errstate(all="ignore"):  # float32 may overflow, as PyTorch's does
        for running, new, part in ((mean, batch.mean, momentum), (var, batch.m2, unbiased)):
            old = _array(running)
            kept = np.multiply(old, 1 - momentum, dtype=np.float64)
            old[...] = kept + part * new  # rounded once
    # They were written to behind autograd's back, which may have saved them in evaluation.
    torch.autograd.graph.increment_version(mean)
    torch.autograd.graph.increment_version(var)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Any, training: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and dgamma and dbeta in the weight's dtype."""
    dx = torch.empty_like(x)
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)  # with all threads; NumPy would copy with one
    arrays = _array(dy), _array(x), stats, _array(weight)
    _, *sums = limited(
        fastbn.batch_norm_backward, *arrays, eps=eps, training=training, out=dx.numpy()
    )
    dtype = (arrays[1] if weight is None else arrays[3]).dtype
    dgamma, dbeta = (torch.from_numpy(a.astype(dtype)) for a in sums)
    return dx, dgamma, dbeta


def _double_backward(
    grads: tuple[Tensor, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    frozen: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients with respect to dy, x and weight of sum(u dx) + sum(v dgamma) + sum(w dbeta).

    With P(t) = t - <t> - xhat <t xhat>, where <> is the mean over a feature's samples, and
    s = 1 / sqrt(var + eps), the backward is dx = gamma s P(dy), dgamma = sum(dy xhat) and
    dbeta = sum(dy). P is symmetric, and s P is also the derivative of xhat with respect to x. For
    frozen statistics P is the identity. Written in PyTorch's operations on float64, it can be
    differentiated further.
    """
    dims = [k for k in range(x.dim()) if k != 1]
    n = math.prod(x.shape[k] for k in dims)

    def spread(t: Tensor) -> Tensor:
        return t.double().reshape(-1, *[1] * (x.dim() - 2))

    def mean(t: Tensor) -> Tensor:
        return t.sum(dims, keepdim=True) / max(n, 1)  # of an empty batch 0, as sums over it are

    def project(t: Tensor) -> Tensor:
        return t - mean(t) - xhat * mean(t * xhat) if frozen is None else t

    g, u, v, w = dy.double(), grads[0].double(), spread(grads[1]), spread(grads[2])
    gamma = 1.0 if weight is None else spread(weight)
    if frozen is not None:
        center, var = (spread(t) for t in frozen)
    elif x.numel():
        var, center = torch.var_mean(x.double(), dims, correction=0, keepdim=True)
    else:  # of no consequence, but for NaN
        center, var = mean(x.double()), mean(x.double().square())
    s = torch.where(var + eps == 0, torch.inf, var + eps).rsqrt()
    xhat = (x.double() - center) * s
    pu = project(u)
    pug = s * mean(pu * g)
    slope = v * g  # the derivative with respect to xhat
    if frozen is None:
        slope = slope - gamma * s * (u * mean(g * xhat) + g * mean(u * xhat))
    dx = s * project(slope)
    if frozen is None:
        dx = dx - s * xhat * gamma * pug  # through s
    ddy = gamma * s * pu + v * xhat + w
    dgamma = None
    if weight is not None:
        dgamma = (pug.flatten() * n).to(weight.dtype)
    return ddy.to(x.dtype), dx.to(x.dtype), dgamma


class _BatchNorm(torch.autograd.Function):
    """`batch_norm` in eager mode."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:  # those of _forward
        input, running_mean, running_var, weight, bias, training, _, eps = arguments
        y, stats = _forward(*arguments)
        ctx.stats = stats if training else None
        ctx.eps = eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        frozen = () if training else (running_mean, running_var)
        ctx.save_for_backward(input, weight, *frozen)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *frozen = ctx.saved_tensors
        arguments = dy, x, weight, ctx.stats, tuple(frozen) or None, ctx.eps
        if torch.is_grad_enabled():  # create_graph=True
            dx, dgamma, dbeta = _BatchNormBackward.apply(*arguments)
        else:
            dx, dgamma, dbeta = _BatchNormBackward.forward(None, *arguments)
        return (
            dx,
            None,
            None,
            None if weight is None else dgamma,
            None if ctx.bias_dtype is None else dbeta.to(ctx.bias_dtype),
            None,
            None,
            None,
        )


class _BatchNormBackward(torch.autograd.Function):
    """Its backward, where that is to be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        stats: fastbn.Moments | None,
        frozen: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if ctx is not None:
            ctx.save_for_backward(dy, x, weight, *(frozen or ()))
            ctx.eps = eps
        given = stats if frozen is None else (_array(frozen[0]), _array(frozen[1]))
        return _backward(dy, x, weight, given, frozen is None, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, weight, *frozen = ctx.saved_tensors
        ddy, dx, dgamma = _double_backward(grads, dy, x, weight, tuple(frozen) or None, ctx.eps)
        return ddy, dx, dgamma, None, None, None


# The same for PyTorch's compiler, exporter and function transforms, which see no further than
# the name of an operator, what it returns for fake tensors, and its derivative.


@torch.library.custom_op(
    "fastbn::batch_norm",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor input, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
)
def _batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the batch's mean and population variance in float64."""
    y, m = _forward(input, None, None, weight, bias, True, 0.0, eps)
    assert isinstance(m, fastbn.Moments)
    return y, torch.tensor(m.mean), torch.tensor(m.var)


@torch.library.custom_op(
    "fastbn::normalize",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps)"
    " -> Tensor",
)
def _normalize(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """y, with given statistics."""
    return _forward(input, mean, var, weight, bias, False, 0.0, eps)[0]


@torch.library.custom_op(
    "fastbn::batch_norm_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dy, Tensor input, Tensor mean, Tensor var, Tensor? weight, bool training,"
    " float eps) -> (Tensor, Tensor, Tensor)",
)
def _batch_norm_backward(
    dy: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgamma and dbeta."""
    return _backward(dy, input, weight, (_array(mean), _array(var)), training, eps)


def _register() -> None:
    """What the operators return for fake tensors, and their derivatives."""

    @_batch_norm.register_fake
    def _(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        mean = input.new_empty(input.shape[1], dtype=torch.float64)
        return torch.empty_like(input), mean, torch.empty_like(mean)

    @_normalize.register_fake
    def _(input: Tensor, *parameters: Any) -> Tensor:
        return torch.empty_like(input)

    @_batch_norm_backward.register_fake
    def _(
        dy: Tensor, input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        dtype = input.dtype if weight is None else weight.dtype
        dgamma = torch.empty_like(mean, dtype=dtype)
        return torch.empty_like(input), dgamma, torch.empty_like(dgamma)

    def save(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, inputs: tuple[Any, ...]) -> None:
        weight, bias, ctx.eps = inputs
        ctx.save_for_backward(x, mean, var, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    def save_batch_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        save(ctx, inputs[0], output[1], output[2], inputs[1:])
        ctx.mark_non_differentiable(*output[1:])

    def save_normalize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs[0], inputs[1], inputs[2], inputs[3:])

    def gradients(ctx: Any, dy: Tensor, training: bool) -> tuple[Tensor | None, ...]:
        x, mean, var, weight = ctx.saved_tensors
        dx, dgamma, dbeta = _batch_norm_backward(dy, x, mean, var, weight, training, ctx.eps)
        return (
            dx,
            None if weight is None else dgamma,
            None if ctx.bias_dtype is None else dbeta.to(ctx.bias_dtype),
        )

    def batch_norm_gradients(ctx: Any, dy: Tensor, *of_statistics: Tensor) -> tuple[Any, ...]:
        return *gradients(ctx, dy, True), None

    def normalize_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dx, dgamma, dbeta = gradients(ctx, dy, False)
        return dx, None, None, dgamma, dbeta, None

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.training, ctx.eps = inputs[5:]

    def backward_gradients(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dy, x, mean, var, weight = ctx.saved_tensors
        frozen = None if ctx.training else (mean, var)
        ddy, dx, dgamma = _double_backward(grads, dy, x, weight, frozen, ctx.eps)
        return ddy, dx, None, None, dgamma, None, None

    _batch_norm.register_autograd(batch_norm_gradients, setup_context=save_batch_norm)
    _normalize.register_autograd(normalize_gradients, setup_context=save_normalize)
    _batch_norm_backward.register_autograd(backward_gradients, setup_context=save_backward)


_register()
