"""What PyTorch's test_nn.py expects of batch norm, on fastbn.torch: which of it holds, and where.

test_nn.py is not installed with PyTorch, and none of it is here: these are tests of our own of the
same behaviour.

====================================================  ============================================
test_nn.py                                            fastbn.torch
====================================================  ============================================
raises_error_if_less_than_one_value_per_channel       holds; test_torch_convert.py
raises_error_if_{running_mean, running_var, weight,   a ValueError for RuntimeError; here
  bias}_is_not_same_size_as_input
raises_error_if_running_{var, mean}_have_forward_grad any forward gradient is refused;
                                                      test_torch_gradients.py
buffer_update_when_stats_are_not_tracked              holds; test_torch.py
nhwc_cpu, with mixed dtypes                           holds; here
non_contig_cpu                                        holds; here
half_overflow                                         holds; here
load_state_dict (partial, onto meta)                  holds; here
batch_norm_update_stats of an empty batch             no such function
eval, affine, simple_average, grad (device tests)     hold; here
BatchNorm_empty                                       holds; test_torch.py, test_torch_gradients.py
large_batch                                           holds; here
fusion with convolution and linear layers             holds; here
those of CUDA, cuDNN and MIOpen                       the CPU alone
====================================================  ============================================
"""

from __future__ import annotations

import io
from collections import OrderedDict

import pytest
from test_torch import F64, close, pair, randn, same_state
from tolerances import TORCH, TORCH_FLOAT32

torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")

import fastbn.torch  # noqa: E402

HALVES = [torch.bfloat16, torch.float16]
LAST = torch.channels_last


@pytest.mark.parametrize("size", [9, 11])
@pytest.mark.parametrize("position", [1, 2, 3, 4])
@pytest.mark.parametrize("training", [True, False])
def test_wrong_sizes(training, position, size):
    name = ("running_mean", "running_var", "weight", "bias")[position - 1]
    arguments = [torch.rand(2, 10), *torch.rand(4, 10)]
    arguments[position] = torch.rand(size)
    with pytest.raises(RuntimeError):
        torch.nn.functional.batch_norm(*arguments, training=training)
    with pytest.raises(ValueError, match=rf"^{name}: expected shape \(10,\), got \({size},\)"):
        fastbn.torch.batch_norm(*arguments, training=training)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(4, 8, 10, 10), (4, 1, 9, 9), (4, 9, 1, 1)])
def test_channels_last(shape, dtype, mixed):
    """The values are those of the contiguous tensor, with parameters of either dtype."""
    results = []
    for memory_format in (LAST, torch.contiguous_format):
        _, bn = pair(shape, torch.float32 if mixed else dtype)
        x = randn(*shape, dtype=dtype).to(memory_format=memory_format).requires_grad_()
        y = bn(x)
        y.backward(randn(*shape, dtype=dtype, seed=1).to(memory_format=memory_format))
        assert y.dtype == x.grad.dtype == dtype
        assert y.is_contiguous(memory_format=memory_format)
        assert x.grad.is_contiguous(memory_format=memory_format)
        results.append([y, x.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var])
    atol = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2e-6}[dtype]
    for a, b in zip(*results):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=atol, atol=atol * max(1, b.abs().max().item()))


def test_a_gradient_of_a_permuted_order():
    """Its strides are those of channels-last, which PyTorch does not see in such shapes."""
    theirs, mine = pair((2, 8, 8, 1))
    results = []
    for bn in (theirs, mine):
        x = randn(2, 8, 8, 1).to(memory_format=LAST).requires_grad_()
        bn(x).backward(randn(2, 8, 8, 1, seed=1).permute(0, 2, 1, 3))
        results.append([x.grad, bn.weight.grad, bn.bias.grad])
    for a, b in zip(*reversed(results)):
        close(a, b, "gradient")


def test_a_permuted_input():
    x = torch.arange(6, dtype=F64).reshape(1, 3, 2, 1).permute(0, 2, 1, 3)
    theirs, mine = pair((1, 2, 3, 1))
    y = mine.eval()(x)
    assert y.is_contiguous(memory_format=LAST)
    close(y, theirs.eval()(x.contiguous()), "y")


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format], ids=str)
def test_halves_whose_sums_overflow(memory_format, mixed):
    """And whose squares do."""
    x = (randn(4, 8, 32, 32).clamp(-4, 4) * 9000 + 29000).half().to(memory_format=memory_format)
    bn = fastbn.torch.BatchNorm2d(8, dtype=torch.float32 if mixed else torch.float16)
    y = bn(x)
    assert torch.isfinite(y).all()
    expected = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)
    assert torch.isfinite(bn.running_mean).all()
    assert torch.isfinite(bn.running_var).all() == mixed  # a half cannot hold it


def test_loading_a_part_of_a_state():
    bn = fastbn.torch.BatchNorm2d(3)
    bn.num_batches_tracked = torch.tensor(10)
    bn.load_state_dict(OrderedDict(), strict=False)
    assert bn.state_dict()["num_batches_tracked"] == 10
    with torch.device("meta"):
        bare = fastbn.torch.BatchNorm2d(3)
    assert bare.num_batches_tracked.is_meta
    bare.load_state_dict(OrderedDict(), assign=True, strict=False)
    assert torch.equal(bare.num_batches_tracked, torch.tensor(0))
    bare.load_state_dict(bn.state_dict(), assign=True)
    x = torch.rand(4, 3, 2, 2)
    assert torch.equal(bare(x), bn(x))


def test_meta_layers_get_memory():
    with torch.device("meta"):
        bare = fastbn.torch.BatchNorm1d(3, dtype=F64)
    bare.to_empty(device="cpu").reset_parameters()
    theirs, _ = pair((5, 3))
    theirs.reset_parameters()
    same_state(bare, theirs)
    x = randn(5, 3)
    close(bare(x), theirs(x), "y")


@pytest.mark.parametrize("dtype", [F64, torch.float32, *HALVES], ids=str)
def test_evaluation_depends_on_no_other_sample(dtype):
    """After training; the gradient is the weight over the standard deviation."""
    _, bn = pair((8, 5, 3), dtype)
    bn(randn(8, 5, 3, dtype=dtype) * 3)
    bn.eval()
    x = randn(8, 5, 3, dtype=dtype, seed=2).requires_grad_()
    y = bn(x)
    alone = torch.cat([bn(x[k : k + 1]) for k in range(8)])
    assert torch.equal(y, alone)
    y.sum().backward()
    expected = (bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt())[None, :, None]
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad.double(), expected.expand(8, 5, 3), rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_plain_average_can_be_started_again(dtype):
    bn = fastbn.torch.BatchNorm1d(5, momentum=None, dtype=dtype)
    batches = [randn(7, 5, dtype=dtype, seed=k) * (k + 1) for k in range(2)]
    alone = []
    for x in batches:
        bn.reset_running_stats()
        assert (bn.running_mean == 0).all()
        assert (bn.running_var == 1).all()
        assert bn.num_batches_tracked == 0
        bn(x)
        alone.append((bn.running_mean.clone(), bn.running_var.clone()))
    bn.reset_running_stats()
    for x in batches:
        bn(x)
    close(bn.running_mean, (alone[0][0] + alone[1][0]) / 2, "mean")
    close(bn.running_var, (alone[0][1] + alone[1][1]) / 2, "variance")
    assert bn.num_batches_tracked == 2


@pytest.mark.parametrize("shape", [(70001, 2), (1100, 2, 63), (2, 1, 257, 255)])
def test_large_batches(shape):
    """More values per channel than 16 bits count."""
    results = []
    for dtype in (F64, torch.float32):
        _, bn = pair(shape, dtype)
        x = (randn(*shape) + 3).to(dtype).requires_grad_()
        y = bn(x)
        y.backward(randn(*shape, seed=1).to(dtype))
        results.append([y, x.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var])
    theirs, _ = pair(shape)
    x = (randn(*shape) + 3).requires_grad_()
    y = theirs(x)
    y.backward(randn(*shape, seed=1))
    expected = [y, x.grad, *(p.grad for p in theirs.parameters()), *list(theirs.buffers())[:2]]
    names = ("y", "dx", "weight", "bias", "mean", "variance")
    for found, tolerance in zip(results, (TORCH, TORCH_FLOAT32)):
        for name, a, b in zip(names, found, expected):
            # What sums cancel counts: the terms are as many as the values, and near 1.
            size = x.numel() if name in ("weight", "bias") else max(1, b.abs().max().item())
            error = (a.double() - b).abs().max().item()
            assert error <= tolerance * size, (name, error)


@pytest.mark.parametrize("kind", ["Conv2d", "Conv2d, not affine", "Linear"])
def test_fusion_with_the_layer_before(kind):
    """`torch.nn.utils.fusion` takes our layers for PyTorch's, which they are."""
    fusion = torch.nn.utils.fusion
    if kind == "Linear":
        layer, fuse, shape = torch.nn.Linear(3, 5), fusion.fuse_linear_bn_eval, (9, 3)
    else:
        layer, fuse, shape = torch.nn.Conv2d(3, 5, 2), fusion.fuse_conv_bn_eval, (2, 3, 6, 7)
    _, bn = pair((2, 5) if kind == "Linear" else (2, 5, 3, 3), affine="not" not in kind)
    layer, x = layer.double(), randn(*shape)
    bn(layer(x))
    layer.eval(), bn.eval()
    close(fuse(layer, bn)(x), bn(layer(x)), "y")


@pytest.mark.parametrize("swap", [False, True])
def test_changing_the_dtype_of_a_layer(swap):
    """By new tensors in the same objects, and by swapping them (PyTorch has both ways)."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        theirs, mine = pair((6, 5))
        for dtype in (torch.float32, torch.bfloat16, F64):
            theirs.to(dtype), mine.to(dtype)
            mine.load_state_dict(theirs.state_dict())  # halves were rounded
            x = randn(6, 5, dtype=dtype)
            close(mine(x), theirs(x), str(dtype))
            same_state(mine, theirs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_saved_and_loaded_by_pytorch():
    """A state_dict with ``weights_only``, into memory that was mapped or assigned."""
    _, bn = pair((6, 5))
    bn(randn(6, 5))
    file = io.BytesIO()
    torch.save(bn.state_dict(), file)
    file.seek(0)
    other = fastbn.torch.BatchNorm1d(5, dtype=F64)
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(other.eval()(randn(6, 5)), bn.eval()(randn(6, 5)))
