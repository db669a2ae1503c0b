"""What Keras's BatchNormalization gives for random batches; to be run in a process of its own.

Keras learns its backend from the environment and writes to the home folder. Everything is in
float64, and its backend PyTorch knows the gradients of what Keras writes.
"""

from __future__ import annotations

import pickle
import sys

import keras
import numpy as np
import torch
from keras.src.backend.common import dtypes
from torch.utils._pytree import tree_map

torch.set_num_threads(1)

# Keras adds this to the number of samples that a mask keeps, 1e-7 by default.
keras.config.set_epsilon(0.0)
# It turns float64 into float32 before it computes, but for TensorFlow.
dtypes.BIT64_TO_BIT32_DTYPE.clear()

# Shape and axis. A mask is for the last axis alone, and not for a single feature.
SHAPES = [
    ((12, 3), -1), ((12, 3), 1), ((1, 3), -1), ((5, 1), 1), ((4, 3, 5), 1), ((4, 3, 5), -1),
    ((4, 3, 5), 2), ((2, 3, 4, 5), 1), ((2, 3, 4, 5), -1), ((2, 3, 4, 5), 2), ((5, 3), 0),
    ((2, 3, 2, 3, 4), 4), ((2, 3, 2, 3, 4), 1), ((700, 17), -1), ((9, 8, 33), -1),
]  # fmt: skip
OPTIONS = [
    {}, {"momentum": 0.9, "epsilon": 1e-5}, {"momentum": 0.0}, {"momentum": 1.0, "epsilon": 0.5},
    {"center": False, "scale": False}, {"center": False, "scale": False, "momentum": 0.5},
]  # fmt: skip


def result_of(shape, axis, options, masked, seed):
    """Two batches in training and one in inference."""
    rng = np.random.default_rng(seed)
    layer = keras.layers.BatchNormalization(axis=axis, dtype="float64", **options)
    layer.build(shape)
    c = shape[axis]
    trainable = [rng.uniform(0.5, 2, c), rng.normal(size=c)][: len(layer.trainable_variables)]
    start = [rng.normal(size=c), rng.uniform(0.5, 2, c)]
    layer.set_weights([*trainable, *start])
    steps = []
    for training in (True, True, False):
        x, dy = rng.normal(size=(2, *shape))
        x = 2 * x + rng.normal(size=[c if k == axis % len(shape) else 1 for k in range(len(shape))])
        mask = rng.random(shape[:-1]) < 0.7 if masked else None
        if masked:  # what is left out has no part in anybody's loss
            dy[~mask] = 0
        leaf = torch.tensor(x, requires_grad=True)
        given = None if mask is None else torch.tensor(mask)
        y = layer(leaf, training=training, mask=given)
        assert y.dtype == torch.float64
        of_parameters = [v.value for v in layer.trainable_variables]
        dx, *sums = torch.autograd.grad(y, [leaf, *of_parameters], torch.tensor(dy))
        found = {"y": y, "dx": dx, "dgamma": sums[:1], "dbeta": sums[1:]}
        found["after"] = [v.value for v in layer.non_trainable_variables]
        steps.append(tree_map(lambda t: t.detach().clone().numpy(), found))
        steps[-1] |= {"x": x, "dy": dy, "mask": mask, "training": training}
    return {
        "shape": shape, "axis": axis, "options": options, "masked": masked,
        "trainable": trainable, "start": start, "steps": steps,
    }  # fmt: skip


if __name__ == "__main__":
    assert keras.backend.backend() == "torch"
    cases = [
        (shape, axis, options, masked)
        for k, (shape, axis) in enumerate(SHAPES)
        for options in (OPTIONS[k % 6], OPTIONS[(k + 3) % 6])
        for masked in (False, True)
        if not masked or (axis % len(shape) == len(shape) - 1 and shape[0] > 1 < shape[axis])
    ]
    results = [result_of(*case, seed) for seed, case in enumerate(cases)]
    with open(sys.argv[1], "wb") as file:
        pickle.dump(results, file)
