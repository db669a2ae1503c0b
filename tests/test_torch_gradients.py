"""fastbn.torch's derivatives of any order, and what autograd has to know of writes in place."""

from __future__ import annotations

import pytest
from test_torch import close, randn

torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")

import fastbn.torch  # noqa: E402

# PyTorch compiles a decomposition of its own at the first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")

F64, SHAPE, C = torch.float64, (4, 3, 2, 5), 3
MEAN, VAR = randn(C, seed=5), randn(C, seed=6).square() + 0.5
OPS = torch.ops.fastbn


def leaves(memory_format=torch.contiguous_format, affine=True, shape=SHAPE):
    x = randn(*shape).to(memory_format=memory_format)
    parameters = [randn(C, seed=k) + 1 for k in (1, 2)] if affine else []
    return [t.requires_grad_() for t in (x, *parameters)]


def eager(training):
    def f(x, weight=None, bias=None):
        return fastbn.torch.batch_norm(x, MEAN.clone(), VAR.clone(), weight, bias, training)

    return f


def operator(training):
    def f(x, weight=None, bias=None):
        if training:
            return OPS.batch_norm(x, weight, bias, 1e-5)[0]
        return OPS.normalize(x, MEAN, VAR, weight, bias, 1e-5)

    return f


def formula(training):
    """Batch norm in PyTorch's operations, which knows all derivatives."""

    def f(x, weight=None, bias=None):
        dims = [k for k in range(x.dim()) if k != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        if training:
            var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        else:
            mean, var = MEAN.reshape(shape), VAR.reshape(shape)
        y = (x - mean) / (var + 1e-5).sqrt()
        y = y if weight is None else y * weight.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)

    return f


ways = pytest.mark.parametrize("way", [eager, operator])
trainings = pytest.mark.parametrize("training", [True, False])
affines = pytest.mark.parametrize("affine", [True, False])


@ways
@trainings
@affines
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_numerically(memory_format, affine, training, way):
    inputs = leaves(memory_format, affine)
    assert torch.autograd.gradcheck(way(training), inputs)
    assert torch.autograd.gradgradcheck(way(training), inputs)


@ways
@trainings
@affines
@pytest.mark.parametrize("shape", [(7, C), (4, C, 5), SHAPE, (2, C, 2, 3, 2)])
def test_first_to_third_derivatives(shape, affine, training, way):
    """Every tensor of every order, beside autograd through the formula."""
    results = []
    for f in (way(training), formula(training)):
        inputs = leaves(affine=affine, shape=shape)
        value, derivatives = f(*inputs).sin().sum(), []
        for order in range(3):
            grads = torch.autograd.grad(
                value, inputs, create_graph=order < 2, materialize_grads=True
            )
            derivatives += grads
            value = sum((g * randn(*g.shape, seed=9 + order)).sin().sum() for g in grads)
        results.append(derivatives)
    for k, (mine, expected) in enumerate(zip(*results)):
        close(mine, expected, f"derivative {k}")


@ways
@trainings
def test_parts_of_what_has_gradients(training, way):
    """Any subset of x, weight, bias and dy."""
    for wanted in range(1, 8):
        results = []
        for f in (way(training), formula(training)):
            inputs = [t.detach().requires_grad_(bool(wanted >> k & 1)) for k, t in
                      enumerate(leaves())]  # fmt: skip
            dy = randn(*SHAPE, seed=8).requires_grad_()
            of = [t for t in inputs if t.requires_grad]
            first = torch.autograd.grad(f(*inputs), of, dy, create_graph=True)
            second = torch.autograd.grad(
                sum((g * g.detach().cos()).sum() for g in first), [*of, dy], materialize_grads=True
            )
            results.append([*first, *second])
        for k, (mine, expected) in enumerate(zip(*results)):
            close(mine, expected, f"{wanted}: {k}")


@trainings
def test_function_and_operators_give_the_same_bits(training):
    results = []
    for way in (eager, operator):
        inputs = leaves()
        y = way(training)(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, randn(*SHAPE, seed=8))])
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_without_parameters_there_are_no_gradients_of_them():
    x, weight, _ = leaves()
    y = fastbn.torch.batch_norm(x, None, None, weight, None, True)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, dx)
    assert weight.grad.shape == (C,)
    assert not fastbn.torch.batch_norm(x.detach(), None, None, training=True).requires_grad
    with torch.no_grad():
        assert not fastbn.torch.batch_norm(x, None, None, weight, training=True).requires_grad


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@ways
@trainings
def test_gradients_have_their_tensors_dtype(training, way, dtypes):
    x, weight, bias = (t.detach().to(d).requires_grad_() for t, d in zip(leaves(), dtypes + dtypes))
    y = way(training)(x, weight, bias)
    first = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y), create_graph=True)
    assert [g.dtype for g in first] == [x.dtype, weight.dtype, bias.dtype]
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    (expected,) = torch.autograd.grad(formula(training)(*exact).sum(), exact[1])
    close(first[1], expected.to(weight.dtype), "as exact as the dtype")
    second = torch.autograd.grad(first[0].sum() + first[1].sum(), (x, weight))
    assert [g.dtype for g in second] == [x.dtype, weight.dtype]


@trainings
def test_constant_features(training):
    """A variance of 0 with an eps of 0: xhat is 0, and so is its derivative."""
    x = torch.full((4, 2), 3.0, dtype=F64)
    x[:, 1] = torch.arange(4)
    x.requires_grad_()
    mean, var = torch.tensor([3.0, 1.5], dtype=F64), torch.tensor([0.0, 1.25], dtype=F64)
    y = fastbn.torch.batch_norm(x, mean, var, training=training, eps=0.0, momentum=0.0)
    assert y[:, 0].eq(0).all()
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert dx[:, 0].eq(0).all()
    assert x.grad[:, 0].eq(0).all()
    assert (x.grad[:, 1] != 0).any()


@ways
@trainings
@pytest.mark.parametrize("shape", [(0, C), (0, C, 4), (2, C, 0), (4, 0), (4, 0, 3)])
def test_nothing_at_all(shape, training, way, monkeypatch):
    """An empty batch, and no features: gradients of any order are sums of no terms."""
    for name in ("MEAN", "VAR"):
        monkeypatch.setitem(globals(), name, globals()[name][: shape[1]])
    x, dy = (torch.ones(shape, dtype=F64, requires_grad=True) for _ in range(2))
    leaves = [x, *(torch.ones(shape[1], dtype=F64, requires_grad=True) for _ in range(2))]
    grads = torch.autograd.grad(way(training)(*leaves), leaves, dy, create_graph=True)
    for order in (1, 2, 3):
        for leaf, grad in zip(leaves, grads):
            assert grad is None or grad.shape == leaf.shape, order
            assert grad is None or (grad == 0).all(), order
        total = sum((grad.sum() for grad in grads if grad is not None), 0 * x.sum())
        grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)


@trainings
def test_not_a_number_is_not_hidden_in_second_derivatives(training):
    x, weight, bias = leaves()
    mean, var = MEAN.clone(), VAR.clone()
    with torch.no_grad():
        x[0, 0, 0, 0] = var[0] = torch.nan
    y = fastbn.torch.batch_norm(x, mean, var, weight, bias, training)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (dxx,) = torch.autograd.grad(dx.square().sum(), x)
    assert dxx[:, 0].isnan().all()
    assert dxx[:, 1:].isfinite().all()


def test_a_variance_that_is_not_a_number():
    x, weight, bias = leaves()
    var = VAR.clone()
    var[0] = torch.nan
    dy = randn(*SHAPE).requires_grad_()
    dx, _ = torch.autograd.grad(
        fastbn.torch.batch_norm(x, MEAN, var, weight, bias), (x, weight), dy, create_graph=True
    )
    (ddy,) = torch.autograd.grad(dx.sum(), dy)
    assert ddy[:, 0].isnan().all()
    assert ddy[:, 1:].isfinite().all()


@trainings
def test_function_transforms_go_to_pytorch(training):
    x, weight, bias = (t.detach() for t in leaves())
    given = (None, None) if training else (MEAN, VAR)

    def loss(f):
        return lambda x: f(x, *given, weight, bias, training).pow(3).sum()

    mine, theirs = loss(fastbn.torch.batch_norm), loss(torch.nn.functional.batch_norm)
    close(torch.func.grad(mine)(x), torch.func.grad(theirs)(x), "grad")
    batches = randn(2, *SHAPE)
    close(torch.vmap(mine)(batches), torch.vmap(theirs)(batches), "vmap")
    (value, tangent), expected = (torch.func.jvp(f, (x,), (x,)) for f in (mine, theirs))
    close(value, expected[0], "value")
    close(tangent, expected[1], "jvp")


def test_function_transforms_of_layers():
    """Their state has to be an argument, as PyTorch's have it."""
    x = randn(9, 3)
    for momentum in (0.1, None):
        results = []
        for layers in (torch.nn, fastbn.torch):
            bn = layers.BatchNorm1d(3, momentum=momentum, dtype=F64)

            def loss(x, state, bn=bn):
                state = {key: value.clone() for key, value in state.items()}
                return torch.func.functional_call(bn, state, (x,)).pow(3).sum(), state

            results.append(torch.func.grad(loss, has_aux=True)(x, bn.state_dict()))
        (theirs, expected), (mine, state) = results
        close(mine, theirs, "grad")
        for key, value in expected.items():
            close(state[key], value, key)


@trainings
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("of", ["x", "weight"])
def test_forward_mode_is_refused(of, grad, training):
    """Not only where gradients are on: the tangent would be lost."""
    x, weight, bias = (t.detach() for t in leaves())
    mean, var = MEAN.clone(), VAR.clone()
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad):
        if of == "x":
            x = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        else:
            weight = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            fastbn.torch.batch_norm(x, mean, var, weight, bias, training)


INPLACE = "modified by an inplace operation"


def test_a_training_step_between_evaluation_and_its_backward_is_noticed():
    x = leaves()[0]
    for between in (lambda bn: bn.train()(x), lambda bn: bn.running_var.mul_(2)):
        bn = fastbn.torch.BatchNorm2d(C, dtype=F64).eval()
        y = bn(x)
        between(bn)
        with pytest.raises(RuntimeError, match=INPLACE):
            y.sum().backward()


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_both_buffers_count_as_written_to(buffer):
    bn = fastbn.torch.BatchNorm2d(C, dtype=F64)
    x = leaves()[0]
    for grad in (True, False):
        before = getattr(bn, buffer)._version
        with torch.set_grad_enabled(grad):
            bn(x)
        assert getattr(bn, buffer)._version > before


@trainings
@pytest.mark.parametrize("what", ["x", "weight"])
def test_changed_arguments_are_noticed(what, training):
    x, weight, bias = leaves()
    x = x * 1
    y = eager(training)(x, weight, bias)
    with torch.no_grad():
        (x if what == "x" else weight).mul_(2)
    with pytest.raises(RuntimeError, match=INPLACE):
        y.sum().backward()


def test_changed_buffers_are_noticed_by_second_derivatives():
    x, weight, bias = leaves()
    dy = randn(*SHAPE, seed=8).requires_grad_()
    for change in (0, 1):
        buffers = MEAN.clone(), VAR.clone()
        y = fastbn.torch.batch_norm(x, *buffers, weight, bias)
        (dweight,) = torch.autograd.grad(y, weight, dy, create_graph=True)
        buffers[change].mul_(2)
        with pytest.raises(RuntimeError, match=INPLACE):
            torch.autograd.grad(dweight.sum(), dy)


def test_y_may_be_changed():
    results = []
    for f in (eager(True), formula(True)):
        x, weight, bias = leaves()
        f(x, weight, bias).relu_().pow(3).sum().backward()
        results.append(x.grad)
    close(*results, "dx")


def test_checkpoints():
    from torch.utils.checkpoint import checkpoint

    x, results = leaves(torch.channels_last)[0], []
    for layers in (torch.nn, fastbn.torch):
        bn = layers.BatchNorm2d(C, dtype=F64)
        y = checkpoint(bn, x, use_reentrant=False)
        results.append((*torch.autograd.grad(y.pow(3).sum(), [x, bn.weight]), bn.running_mean))
    for theirs, mine in zip(*results):
        close(mine, theirs, "checkpoint")


def operator_arguments(name, memory_format, affine, grad):
    # In float32, where statistics in float64 have a dtype of their own.
    x, weight, bias = (t.detach().float() for t in leaves(memory_format))
    dy = randn(*SHAPE, seed=8).float()
    if not affine:
        weight = bias = None
    for t in (x, weight, bias, dy):
        if t is not None:
            t.requires_grad_(grad)
    return {
        "batch_norm": (x, weight, bias, 1e-5),
        "normalize": (x, MEAN, VAR, weight, bias, 1e-5),
        "batch_norm_backward": (dy, x, MEAN, VAR, weight, False, 1e-5),
    }[name]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["batch_norm", "normalize", "batch_norm_backward"])
def test_operators_are_what_pytorch_expects(name, memory_format, affine, grad):
    arguments = operator_arguments(name, memory_format, affine, grad)
    result = torch.library.opcheck(getattr(OPS, name).default, arguments)
    assert set(result.values()) == {"SUCCESS"}
    assert len(result) == 4
