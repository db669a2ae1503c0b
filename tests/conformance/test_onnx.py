"""ONNX's own test data for normalization, and its reference evaluator, beside fastbn.

The data are those of the installed package: made by its node cases, and on disk what PyTorch once
exported. `onnx_backend` reads the attributes from the models.
"""

from __future__ import annotations

import importlib
import pkgutil
import unittest
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from tolerances import TORCH, TORCH_FLOAT32

import fastbn

pytest.importorskip("onnx", reason="ONNX is not installed; it is an oracle only")

import onnx
from conformance.onnx_backend import (
    OPERATORS,
    FastbnBackend,
    Prepared,
    attributes_of,
)
from onnx import helper, numpy_helper, version_converter
from onnx.backend.test import BackendTest
from onnx.backend.test import __file__ as tests_of_onnx
from onnx.backend.test.case import node as node_cases
from onnx.reference import ReferenceEvaluator

DATA = Path(tests_of_onnx).parent / "data"
# Both sides round to float32, ONNX's in its sums too, and relative to the largest value.
CLOSE = {np.dtype(np.float32): TORCH_FLOAT32, np.dtype(np.float64): TORCH}


def close(actual, expected, what):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    bound = CLOSE[expected.dtype] * max(1, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound, err_msg=what)


def node_tests():
    """{name: case} of the operators above that are not spelled out in others."""
    for module in pkgutil.iter_modules(node_cases.__path__):
        if "norm" in module.name and module.name not in ("stringnormalizer", "lpnormalization"):
            importlib.import_module(f"{node_cases.__name__}.{module.name}")
    found = {case.name: case for case in node_cases._NodeTestCases}
    return {
        name: case
        for name, case in found.items()
        if [n.op_type in OPERATORS for n in case.model.graph.node] == [True]
    }


def on_disk():
    """{name: folder} of the models with a single operator."""
    found = {}
    for path in sorted(DATA.glob("pytorch-*/*/model.onnx")):
        nodes = onnx.load(path).graph.node
        if [n.op_type in OPERATORS for n in nodes] == [True]:
            found[path.parent.name] = path.parent
    return found


NODE_TESTS, ON_DISK = node_tests(), on_disk()
BATCH_NORM = {
    name for name, c in NODE_TESTS.items() if c.model.graph.node[0].op_type == "BatchNormalization"
}


def test_the_cases_are_there():
    for kind in ("example", "epsilon"):
        assert {f"test_batchnorm_{kind}", f"test_batchnorm_{kind}_training_mode"} <= BATCH_NORM
    operators = {c.model.graph.node[0].op_type for c in NODE_TESTS.values()}
    assert operators == set(OPERATORS)
    assert len(NODE_TESTS) >= 28
    assert len([name for name in ON_DISK if "BatchNorm" in name]) >= 5


@pytest.mark.parametrize("name", NODE_TESTS)
def test_node_cases(name, implementation):
    case = NODE_TESTS[name]
    prepared = Prepared(case.model, implementation)
    for inputs, expected in case.data_sets:
        actual = prepared.run(inputs)
        assert len(actual) == len(expected)
        for k, pair in enumerate(zip(actual, expected)):
            close(*pair, f"output {k}")


@pytest.mark.parametrize("name", ON_DISK)
def test_exported_by_pytorch(name, implementation):
    prepared = Prepared(onnx.load(ON_DISK[name] / "model.onnx"), implementation)
    folders = list(ON_DISK[name].glob("test_data_set_*"))
    assert folders
    for folder in folders:
        inputs, expected = (
            [
                numpy_helper.to_array(onnx.load_tensor(path))
                for path in sorted(folder.glob(f"{kind}_*.pb"))
            ]
            for kind in ("input", "output")
        )
        [actual] = prepared.run(inputs)
        close(actual, expected[0], folder.name)


@pytest.mark.parametrize("name", sorted(BATCH_NORM))
def test_the_layer_of_the_onnx_convention(name, simd):
    """With its defaults where the model gives no value."""
    case = NODE_TESTS[name]
    given = attributes_of(case.model.graph.node[0])
    options = {new: given[old] for old, new in NAMES.items() if old in given}
    for (x, *state), expected in case.data_sets:
        layer = fastbn.BatchNorm(x.shape[1], convention="onnx", **options)
        layer.load_state_dict(dict(zip(("scale", "B", "input_mean", "input_var"), state)))
        layer.train(given.get("training_mode", 0))
        close(layer(x), expected[0], "y")
        after = layer.state_dict()
        for key, value in zip(("input_mean", "input_var"), expected[1:] or state[2:]):
            close(after[key].astype(value.dtype), value, key)


NAMES = {"epsilon": "eps", "momentum": "momentum"}


# Random models, beside ONNX's evaluator. That gets the data as float64, since its sums are of the
# data's own dtype. Before opset 14 it computes another thing than the operator's description says
# (it normalises with the averages that come out of a batch), so that such models are brought to
# opset 15 first.

SHAPES = [(7, 3), (1, 3), (5, 4, 6), (2, 3, 4, 5), (1, 2, 1, 3), (3, 2, 2, 3, 4), (300, 17),
          (2, 1, 9)]  # fmt: skip
NAMES_OF = (
    ["x", "scale", "bias", "mean", "var"],
    ["y", "new_mean", "new_var", "saved_mean", "saved_var"],
)


def model_of(values, opset, outputs, attributes):
    node = helper.make_node("BatchNormalization", NAMES_OF[0], NAMES_OF[1][:outputs], **attributes)

    def infos(names, arrays):
        return [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape if a.ndim else [None]
            )
            for name, a in zip(names, arrays)
        ]

    results = [values[0], *values[3:], *values[3:]][:outputs]
    graph = helper.make_graph(
        [node], "random", infos(NAMES_OF[0], values), infos(NAMES_OF[1], results)
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    onnx.checker.check_model(model, full_check=True)
    return model


def random_model(seed, opset):
    """Values and attributes. From opset 15 on three dtypes may differ."""
    rng = np.random.default_rng(seed)
    shape = SHAPES[rng.integers(len(SHAPES))]
    dtypes = rng.choice([np.float32, np.float64], 3 if opset >= 15 else 1)
    of_x, of_scale, of_mean = np.broadcast_to(dtypes, 3)
    x = (rng.normal(size=shape) * 3 + rng.normal() * 10).astype(of_x)
    scale, bias = rng.normal(size=(2, shape[1])).astype(of_scale)
    mean, var = rng.normal(size=(2, shape[1])).astype(of_mean)
    attributes = {}
    if rng.random() < 0.7:
        attributes["epsilon"] = float(rng.choice([1e-5, 1e-3, 1e-2, 0.5]))
    if rng.random() < 0.7:
        # The evaluator works out 1 - momentum in float32, which is exact for these and for 0.9.
        attributes["momentum"] = float(rng.choice([0, 1 / 8, 1 / 2, 63 / 64, 1]))
    return [x, scale, bias, mean, var**2 + of_mean(0.1)], attributes


def evaluated(model, values):
    names = [v.name for v in model.graph.input]
    wide = [v.astype(np.float64) for v in values]
    return ReferenceEvaluator(model).run(None, dict(zip(names, wide, strict=True)))


def compare(actual, expected, values, what):
    assert len(actual) == len(expected)
    for k, (a, b) in enumerate(zip(actual, expected)):
        close(a, b.astype(values[3 if k else 0].dtype), f"{what}, output {k}")


@lru_cache(None)  # for all implementations
def models(opset, training):
    """[(model, values, expected)]."""
    made = []
    for seed in range(60 if opset >= 14 else 20):
        values, attributes = random_model(seed, opset)
        newest = attributes | ({"training_mode": 1} if training else {})
        if opset >= 14:
            new = model = model_of(values, opset, 3 if training else 1, newest)
        elif training:  # which ONNX does not convert
            model = model_of(values, opset, 5, attributes)
            new = model_of(values, 15, 3, newest)
        else:
            testing = {"is_test": 1} if opset == 6 else {}
            model = model_of(values, opset, 1, attributes | testing)
            new = version_converter.convert_version(model, 15)
            assert new.opset_import[0].version == 15
        made.append((model, values, evaluated(new, values)))
    return made


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("opset", [6, 7, 9, 14, 15])
def test_random_models(opset, training, implementation):
    for k, (model, values, expected) in enumerate(models(opset, training)):
        actual = Prepared(model, implementation).run(values)
        assert len(actual) == len(model.graph.node[0].output)
        compare(actual[: len(expected)], expected, values, f"model {k}")


def test_a_feature_for_each_place(implementation):
    """``spatial=0``, which opset 9 gave up."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (5, 2, 3, 4))
    scale, bias, mean, var = rng.uniform(0.5, 2, (4, 2, 3, 4))
    node = helper.make_node("BatchNormalization", NAMES_OF[0], ["y"], spatial=0)
    graph = helper.make_graph([node], "places", [], [])
    prepared = Prepared(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 7)]), implementation
    )
    prepared.free = NAMES_OF[0]
    [y] = prepared.run([x, scale, bias, mean, var])
    close(y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, "y")


def test_a_single_dimension_is_one_feature(implementation):
    """As ONNX has it: the size is N, and C is 1."""
    values = [np.arange(6.0), *(np.array([v]) for v in (2.0, 1.0, 3.0, 4.0))]
    model = model_of(values, 15, 1, {})
    compare(Prepared(model, implementation).run(values), evaluated(model, values), values, "1-D")


def test_one_value_per_feature_is_allowed_in_training(simd):
    """Its variance is 0."""
    values = [np.array(v, np.float32) for v in ([[3, -8]], [2, 1], [0, 1], [5, 6], [1, 2])]
    model = model_of(values, 14, 3, {"training_mode": 1})
    expected = evaluated(model, values)
    compare(Prepared(model).run(values), expected, values, "functions")
    layer = fastbn.BatchNorm(2, convention="onnx")
    layer.load_state_dict(dict(zip(("scale", "B", "input_mean", "input_var"), values[1:])))
    results = layer(values[0]), layer.running.mean, layer.running.var
    compare([a.astype(np.float32) for a in results], expected, values, "layer")


@pytest.mark.slow
def test_onnx_runs_its_own_tests():
    """Its runner makes the cases of all operators, and skips those that the backend cannot run."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of other operators' cases
        runner = BackendTest(FastbnBackend, __name__)
        for name in (*NODE_TESTS, *ON_DISK):
            runner.include(f"^{name}_cpu$")
        result = unittest.TextTestRunner(verbosity=0).run(runner.test_suite)
    assert result.wasSuccessful(), (result.failures, result.errors)
    assert result.testsRun - len(result.skipped) == len(NODE_TESTS) + len(ON_DISK)
