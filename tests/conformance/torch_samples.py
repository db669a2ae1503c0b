"""PyTorch's own samples of normalization, written to a file; to be run in a process of its own.

The modules of `torch.testing._internal` change settings of whoever imports them: those of
hypothesis, and PyTorch's flags. What is saved is tensors, numbers, tuples and dicts alone.
"""

from __future__ import annotations

import sys

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.jit_metaprogramming_utils import get_nn_functional_tests

BATCH_NORMS = ("nn.functional.batch_norm", "native_batch_norm", "_native_batch_norm_legit",
               "_batch_norm_with_update")  # fmt: skip
OTHERS = ("nn.functional.instance_norm", "nn.functional.group_norm", "nn.functional.layer_norm")
LAYERS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def parts_of(sample):
    return sample.input, tuple(sample.args), dict(sample.kwargs)


def samples():
    """{name: [(input, args, kwargs)]}; those with a hole between elements follow."""
    found = {name: [] for name in BATCH_NORMS + OTHERS}
    for op in op_db:
        if op.name in found and not op.variant_test_name:
            for dtype in DTYPES:
                for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
                    found[op.name] += [parts_of(sample), parts_of(sample.noncontiguous())]
    return found


def functional_tests():
    """The arguments of those for scripts, {name: [(shape, args)]}."""
    found = {"batch_norm": []}
    for name, shape, args, *_ in get_nn_functional_tests():
        if name in found:
            # Tensors without gradient are wrapped.
            found[name].append((shape, tuple(getattr(a, "tensor", a) for a in args)))
    return found


def call_of(module_input):
    a, b = module_input.constructor_input, module_input.forward_input
    return (tuple(a.args), dict(a.kwargs)), (tuple(b.args), dict(b.kwargs))


def layers(function):
    """{class: [(training, (args, kwargs) of the layer, (args, kwargs) of the call)]}."""
    found = {}
    for info in module_db:
        if info.module_cls in LAYERS:
            found[info.module_cls.__name__] = calls = []
            for training in (True, False):
                for dtype in (torch.float64, torch.float32):
                    made = getattr(info, function)(
                        info, device="cpu", dtype=dtype, requires_grad=True, training=training
                    )
                    inputs = [getattr(m, "module_error_input", m) for m in made]
                    calls += [(training, *call_of(m)) for m in inputs]
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.save(
        {
            "operators": samples(),
            "functional": functional_tests(),
            "layers": layers("module_inputs_func"),
            "layers' errors": layers("module_error_inputs_func"),
        },
        sys.argv[1],
    )
