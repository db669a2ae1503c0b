"""fastbn as a backend of ONNX models that consist of one normalization.

Backends are how ONNX's own tests are run. BatchNormalization is what fastbn is for; the other
operators are batch norms of an array that is looked at in another way: a feature is then a sample
(LayerNormalization), a channel of a sample (InstanceNormalization), a group of them
(GroupNormalization), or whatever is not averaged over (MeanVarianceNormalization).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.backend.base import Backend, BackendRep

import fastbn


def attributes_of(node):
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def with_defaults(node, opset):
    """Floats are float32 in models: 0.9 is 0.8999999761581421."""
    schema = onnx.defs.get_schema(node.op_type, opset).attributes
    defaults = [a.default_value for a in schema.values() if a.default_value.type]
    return {a.name: helper.get_attribute_value(a) for a in (*defaults, *node.attribute)}


def opset_of(model):
    return next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


def batch_normalization(
    bn, opset, outputs, x, scale, bias, mean, var,
    *, epsilon, momentum, spatial=1, is_test=0, training_mode=0,
):  # fmt: skip
    """Of opset 6 and later, which had three ways to ask for training."""
    training = training_mode if opset >= 14 else outputs > 1 and not is_test
    shape = x.shape
    if not spatial:  # until opset 8: a feature for each place in the image
        x = x.reshape(len(x), -1)
        scale, bias, mean, var = (p.ravel() for p in (scale, bias, mean, var))
    if not training:
        return [bn.normalize(x, (mean, var), scale, bias, eps=epsilon).reshape(shape)]
    y, m = bn.batch_norm(x, scale, bias, eps=epsilon)
    running = fastbn.RunningMoments(len(mean), momentum=1 - momentum, ddof=0)
    running.mean_and_var = mean, var
    running.update(m)
    statistics = [running.mean, running.var, m.mean, m.var]  # the last two until opset 13
    return [y.reshape(shape), *(a.astype(mean.dtype) for a in statistics)]


def per_channel(bn, x, scale, bias):
    return bn.normalize(x, (np.zeros(x.shape[1]), np.ones(x.shape[1])), scale, bias, eps=0)


def rows_normalized(bn, x, rows, eps):
    """x with each of `rows` equal parts normalised, and their moments."""
    y, m = bn.batch_norm(x.reshape(rows, -1), axis=0, eps=eps)
    return y.reshape(x.shape), m


def instance_normalization(bn, opset, outputs, x, scale, bias, *, epsilon):
    y, _ = rows_normalized(bn, x, x.shape[0] * x.shape[1], epsilon)
    return [per_channel(bn, y, scale, bias)]


def group_normalization(bn, opset, outputs, x, scale, bias, *, num_groups, epsilon, stash_type=1):
    y, _ = rows_normalized(bn, x, len(x) * num_groups, epsilon)
    if opset < 21:  # a scale for each group
        scale, bias = (np.repeat(p, x.shape[1] // num_groups) for p in (scale, bias))
    return [per_channel(bn, y, scale, bias)]


def layer_normalization(bn, opset, outputs, x, scale, bias=None, *, axis, epsilon, stash_type=1):
    each = x.shape[: axis % x.ndim]
    y, m = rows_normalized(bn, x, int(np.prod(each)), epsilon)
    y = y * scale if bias is None else y * scale + bias
    shape = each + (1,) * (x.ndim - len(each))
    inverse = 1 / np.sqrt(m.var + epsilon)
    return [y, *(a.astype(np.float32).reshape(shape) for a in (m.mean, inverse))]


def mean_variance_normalization(bn, opset, outputs, x, *, axes):
    """ONNX adds 1e-9 to the standard deviation, which no float32 shows."""
    kept = [k for k in range(x.ndim) if k not in axes]
    front = np.moveaxis(x, kept, range(len(kept)))
    y, _ = rows_normalized(bn, front, int(np.prod(front.shape[: len(kept)])), 0)
    return [np.moveaxis(y, range(len(kept)), kept)]


OPERATORS = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
}


class Prepared(BackendRep):
    def __init__(self, model, bn=fastbn):
        [self.node] = model.graph.node
        self.opset, self.bn = opset_of(model), bn
        self.attributes = with_defaults(self.node, self.opset)
        self.given = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.free = [v.name for v in model.graph.input if v.name not in self.given]

    def run(self, inputs, **kwargs):
        values = self.given | dict(zip(self.free, inputs, strict=True))
        arrays = [values[name] if name else None for name in self.node.input]
        count = len(self.node.output)
        operator = OPERATORS[self.node.op_type]
        results = operator(self.bn, self.opset, count, *arrays, **self.attributes)
        results[0] = results[0].astype(arrays[0].dtype)
        return results[:count]


class FastbnBackend(Backend):
    @classmethod
    def is_compatible(cls, model, device="CPU", **kwargs):
        return [n.op_type for n in model.graph.node if n.op_type not in OPERATORS] == []

    @classmethod
    def prepare(cls, model, device="CPU", **kwargs):
        onnx.checker.check_model(model)
        return Prepared(model)

    @classmethod
    def supports_device(cls, device):
        return device == "CPU"
