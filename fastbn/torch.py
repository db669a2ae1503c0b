"""PyTorch on the CPU: batch norm layers and functions that compute with fastbn's kernels.

Tensors go in and come out without a copy. `convert` swaps the layers of a model, `revert` swaps
them back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError("fastbn.torch needs PyTorch: pip install 'fastbn[torch]'") from error

from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from fastbn import _torch_ops

if TYPE_CHECKING:
    from fastbn._torch_sync import SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "batch_norm",
    "convert",
    "revert",
]

FLOATS = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, computed by fastbn: same arguments, same meaning.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...), on the CPU
        float32 or float64, of any memory order; float16 and bfloat16, which the other tensors may
        have then as well, are computed in float32.
    running_mean, running_var : Tensor of shape (C,) or None
        What to normalise with; updated in place where `training`, the variance unbiased.
    weight, bias : Tensor of shape (C,) or None
        gamma and beta; None is 1 and 0.
    training : bool
        Whether to normalise with the statistics of `input`.
    momentum : float, or a tensor of one
        Weight of the new batch in the running statistics.
    eps : float
        Added to the variance.

    Returns
    -------
    Tensor
        Of `input`'s shape, dtype and memory format. Gradients of any order flow to `input`,
        `weight` and `bias`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument. A ValueError for one value per channel in training, as in PyTorch.

    Notes
    -----
    Statistics are float64 whatever `input` is (Ioffe & Szegedy 2015; Chan, Golub & LeVeque 1983).
    fastbn uses at most `torch.get_num_threads()` threads here, and no bit depends on how many. An
    empty batch leaves the running statistics as they were.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> x = torch.tensor([[2.0, 4.0], [3.0, 5.0], [4.0, 6.0]], requires_grad=True)
    >>> y = fastbn.torch.batch_norm(x, None, None, training=True, eps=0)
    >>> y.detach().numpy().round(4)
    array([[-1.2247, -1.2247],
           [ 0.    ,  0.    ],
           [ 1.2247,  1.2247]], dtype=float32)
    >>> y.square().sum().backward()
    """
    _check(input, running_mean, running_var, weight, bias, training)
    if input.dtype in HALVES:
        mean, var = _widen(running_mean), _widen(running_var)
        y = batch_norm(
            input.float(), mean, var, _widen(weight), _widen(bias), training, momentum, eps
        )
        for old, new in ((running_mean, mean), (running_var, var)):
            if training and old is not new and old is not None and new is not None:
                old.copy_(new)
        return y.to(input.dtype)
    arguments = input, running_mean, running_var, weight, bias, training, momentum, eps
    if torch._C._are_functorch_transforms_active():  # torch.func knows no operators of others
        return nn.functional.batch_norm(*arguments)  # type: ignore[arg-type]
    return _torch_ops.batch_norm(*arguments)


def _widen(t: Tensor | None) -> Tensor | None:
    return t.float() if t is not None and t.dtype in HALVES else t


def _check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    if input.device.type not in ("cpu", "meta") or input.layout != torch.strided:
        raise ValueError(
            f"input: expected a dense tensor on the CPU, got {input.layout} on {input.device}; "
            "fastbn.torch.revert(model) gives PyTorch's layers back"
        )
    if input.dtype not in FLOATS and input.dtype not in HALVES:
        raise TypeError(f"input: expected float32 or float64, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"input: expected at least 2 dimensions, got shape {tuple(input.shape)}")
    if is_tracing():  # sizes are tensors then, and none of them may become a constant
        return
    features = input.shape[1]
    for name, value in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(value).__name__}")
        if value.dtype not in FLOATS and not (value.dtype in HALVES and input.dtype in HALVES):
            raise TypeError(f"{name}: expected float32 or float64, got {value.dtype}")
        if value.shape != (features,):
            raise ValueError(f"{name}: expected shape ({features},), got {tuple(value.shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: expected both or neither")
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: there is no gradient, expected a tensor without")
    if running_mean is None and not training:
        raise ValueError("running_mean: expected a tensor where training=False, got None")
    if training and 0 < input.numel() == features:
        raise ValueError(
            f"input: expected more than 1 value per channel when training, "
            f"got shape {tuple(input.shape)}"
        )


class _Layer(nn.modules.batchnorm._BatchNorm):
    """What the layers have of their own: where they compute."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        update = self.training and self.track_running_stats
        if self.training and not update:
            mean = var = None
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.momentum is None and update and batches is not None:
            momentum = 1.0 / (batches + 1).double()  # the average of all batches so far
        y = batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            self.training or (mean is None and var is None),
            momentum,
            self.eps,
        )
        if update and batches is not None:
            batches.add_(1)
        return y


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, computed by fastbn: the same arguments, state and modes.

    An instance of PyTorch's class, with the same `state_dict`; see `fastbn.torch.batch_norm` for
    what is different. `fastbn.torch.convert` swaps the layers of a model.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> bn = fastbn.torch.BatchNorm1d(2)
    >>> y = bn(torch.tensor([[2.0, 4.0], [3.0, 5.0], [4.0, 6.0]]))
    >>> bn.running_mean, bn.running_var
    (tensor([0.3000, 0.5000]), tensor([1., 1.]))
    """


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, computed by fastbn: the same arguments, state and modes.

    Channels-last tensors come out channels-last.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> images = torch.ones(8, 3, 32, 32).to(memory_format=torch.channels_last)
    >>> y = fastbn.torch.BatchNorm2d(3)(images)
    >>> y.is_contiguous(memory_format=torch.channels_last)
    True
    """


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, computed by fastbn: the same arguments, state and modes.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> fastbn.torch.BatchNorm3d(3)(torch.ones(2, 3, 4, 5, 6)).shape
    torch.Size([2, 3, 4, 5, 6])
    """


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def __getattr__(name: str) -> type[nn.Module]:
    if name == "SyncBatchNorm":  # with it comes PyTorch's compiler, which takes a second
        from fastbn._torch_sync import SyncBatchNorm

        return SyncBatchNorm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


Module = TypeVar("Module", bound=nn.Module)


def convert(model: Module) -> Module:
    """Let fastbn compute the batch norm layers of a model; returns the model.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place: its layers of exactly the classes `torch.nn.BatchNorm1d`, `2d` and `3d`
        become those of `fastbn.torch`. They stay the same objects, with their parameters,
        buffers, hooks and modes, so that an optimizer and a `state_dict` go on as before.

    Notes
    -----
    Convert before `torch.compile`; `revert` before scripting, quantizing or saving the whole model
    for those who do not have fastbn.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    >>> type(fastbn.torch.convert(model)[1])
    <class 'fastbn.torch.BatchNorm1d'>
    >>> type(fastbn.torch.revert(model)[1])
    <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    return _swap(model, LAYERS)


def revert(model: Module) -> Module:
    """Undo `convert`: PyTorch computes the batch norm layers again; returns the model."""
    return _swap(model, {ours: theirs for theirs, ours in LAYERS.items()})


def _swap(model: Module, classes: dict[type[nn.Module], type[nn.Module]]) -> Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]  # they have the same attributes
    return model
