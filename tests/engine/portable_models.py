"""A model that is the same on every processor, and one that cannot be."""

import hashlib

import flax.linen as nn
import jax
import numpy as np

from aqt_engine import QuantMode, bundle, config, ops
from aqt_engine.execution import Program
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral

INT8 = config.update(config.fully_quantized(), "fwd.*", po2_scale=True)
RNG = np.random.default_rng(0)


class ConvNet(nn.Module):
    """Convolutions, biases, ReLU and means, with every scale a power of two."""

    mode: object

    @nn.compact
    def __call__(self, x):
        conv = AqtConvGeneralDilated(INT8, rhs_quant_mode=self.mode)
        for features in (8, 16):
            bias = nn.initializers.normal()
            x = nn.relu(nn.Conv(features, (3, 3), bias_init=bias, conv_general_dilated=conv)(x))
        x = ops.ordered_mean(x.reshape(len(x), -1, x.shape[-1]), axis=1)
        return nn.Dense(3, dot_general=AqtDotGeneral(INT8, rhs_quant_mode=self.mode))(x)


class Transforming(nn.Module):
    """A softmax over the features of a row, and what else transformers have."""

    mode: object

    @nn.compact
    def __call__(self, x):
        dense = AqtDotGeneral(INT8, rhs_quant_mode=self.mode)
        with jax.named_scope("attention"):
            weights = jax.nn.softmax(nn.Dense(32, dot_general=dense)(x))
        return nn.LayerNorm()(nn.gelu(nn.Dense(16, dot_general=dense)(weights)))


def _made(cls, inputs):
    return cls, jax.jit(cls(QuantMode.TRAIN).init)(jax.random.key(0), inputs["x"]), inputs


def convnet():
    return _made(ConvNet, {"x": RNG.normal(size=(64, 6, 6, 2)).astype(np.float32)})


def transforming():
    return _made(Transforming, {"x": RNG.normal(size=(64, 24)).astype(np.float32)})


def digest(path):
    """The sha256 of a bundle's answers to 512 random rows."""
    loaded = bundle.load(path)
    spec = loaded.manifest.inputs[0]
    rows = np.random.default_rng(1).normal(size=(512, *spec.shape[1:])).astype(np.float32)
    answer = Program(loaded, max_rows=512)({"x": rows})["output"]
    return hashlib.sha256(np.ascontiguousarray(answer).tobytes()).hexdigest()
