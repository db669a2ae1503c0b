"""Keras's BatchNormalization beside ``convention="keras"``: batches, masks, gradients, averages.

Where a mask leaves out, Keras normalises too; here y is 0, and nothing is compared.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers import run_python
from tolerances import TORCH

import fastbn

for needed in ("keras", "torch"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed; it is an oracle only", allow_module_level=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras")
    script = Path(__file__).with_name("keras_results.py")
    code = (
        f"import runpy, sys; sys.argv[1:] = [{str(folder / 'results')!r}];"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    settings = {"KERAS_HOME": str(folder), "KERAS_BACKEND": "torch"}
    done = run_python(code, "-W", "ignore", timeout=600, **settings)
    assert done.returncode == 0, done.stderr
    return pickle.loads((folder / "results").read_bytes())


def test_there_are_enough(results):
    assert [sum(r["masked"] == masked for r in results) for masked in (False, True)] == [30, 16]


def close(actual, expected, what):
    assert actual.shape == expected.shape, what
    bound = TORCH * max(1, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound, err_msg=str(what))


def layer_of(result):
    names = {"momentum": "momentum", "epsilon": "eps"}
    layer = fastbn.BatchNorm(
        result["shape"][result["axis"]],
        axis=result["axis"],
        convention="keras",
        affine=result["options"].get("center", True),
        dtype=np.float64,
        **{names[key]: value for key, value in result["options"].items() if key in names},
    )
    state = dict(zip(("gamma", "beta"), result["trainable"]))
    layer.load_state_dict(state | dict(zip(("moving_mean", "moving_variance"), result["start"])))
    return layer


def test_the_layer(results, simd):
    for k, result in enumerate(results):
        layer = layer_of(result)
        for number, step in enumerate(result["steps"]):
            what = f"case {k}, step {number}: {result['shape']} axis {result['axis']}"
            kept = True if step["mask"] is None else step["mask"][..., np.newaxis]
            y = layer.train(step["training"])(step["x"], where=step["mask"])
            close(y, np.where(kept, step["y"], 0), what)
            dx = layer.backward(step["dy"])
            close(dx, np.where(kept, step["dx"], 0), what)
            for name in ("dgamma", "dbeta"):
                for expected in step[name]:  # one, or none
                    close(getattr(layer, f"grad_{name[1:]}"), expected, what)
            close(layer.running.mean, step["after"][0], what)
            close(layer.running.var, step["after"][1], what)


def test_the_functions(results, implementation):
    """The same on arrays, one batch after the other."""
    for k, result in enumerate(results):
        parameters = result["trainable"] or [None, None]
        eps = result["options"].get("epsilon", 1e-3)
        before = result["start"]
        for number, step in enumerate(result["steps"]):
            what = f"case {k}, step {number}: {result['shape']} axis {result['axis']}"
            kept = True if step["mask"] is None else step["mask"][..., np.newaxis]
            given = {"axis": result["axis"], "eps": eps, "where": step["mask"]}
            if step["training"]:
                y, stats = implementation.batch_norm(step["x"], *parameters, **given)
            else:
                stats = tuple(before)
                y = implementation.normalize(step["x"], stats, *parameters, **given)
            close(y, np.where(kept, step["y"], 0), what)
            dx, dgamma, dbeta = implementation.batch_norm_backward(
                step["dy"], step["x"], stats, *parameters, training=step["training"], **given
            )
            close(dx, np.where(kept, step["dx"], 0), what)
            for actual, name in ((dgamma, "dgamma"), (dbeta, "dbeta")):
                for expected in step[name]:
                    close(actual, expected, what)
            before = step["after"]
