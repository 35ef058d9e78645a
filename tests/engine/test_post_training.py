"""Quantization after training, in three ways: dynamic, static and of the weights only."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import QuantMode, bundle, config
from aqt_engine.convert import calibrate, convert
from aqt_engine.execution import Program
from aqt_engine.flax import quantize
from aqt_engine.rules import Rule, Rules
from aqt_engine.statistics import MeanOfAbsMaxCalibration
from engine.contractions import assert_same_bits

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]

TILE = 4
DYNAMIC = config.DotGeneral(fwd=config.raw(config.int_tensor(8), config.int_tensor(8)))
STATIC = config.update(
    DYNAMIC, "fwd.lhs", calibration=MeanOfAbsMaxCalibration(), calib_shared_axes="per_tensor"
)
WEIGHT_ONLY = config.weight_only(8)
X = np.random.default_rng(0).normal(size=(32, 12)).astype(np.float32)


class Float(nn.Module):
    """A model that knows nothing of quantization."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(7, (3,))(x[..., None]))
        return nn.Dense(5)(nn.relu(nn.Dense(16)(x.reshape(len(x), 84))))


@dataclasses.dataclass(frozen=True)
class Converted:
    params: dict
    loaded: bundle.Bundle

    @property
    def hlo(self):
        """The graph at the tile, as it was exported."""
        return self.loaded.graph.mlir_module()

    @property
    def compiled(self):
        """The same, compiled: what the constants are folded into."""
        spec = self.loaded.manifest.inputs[0].with_rows(TILE)
        weights = [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in self.loaded.weights]
        call = jax.jit(lambda weights, x: self.loaded.graph.call(weights, [x]))
        return call.lower(weights, spec).compile().as_text()

    def error(self):
        """Of what is served, relative to the float model."""
        truth = jax.jit(Float().apply)(self.params, X)
        served = Program(self.loaded, max_rows=8)({"x": X})["output"]
        return float(jnp.linalg.norm(served - truth) / jnp.linalg.norm(truth))


def converted(tmp_path, configuration):
    model = quantize(Float(), Rules((Rule(modules=".+", config=configuration),)))
    params = jax.jit(Float().init)(jax.random.key(0), X)
    variables = params
    if configuration == STATIC:
        variables = calibrate(model, params, [{"x": X}])
    convert(model, variables, {"x": X}, tmp_path / "m" / "1", tile=TILE)
    loaded = bundle.load(tmp_path / "m" / "1")
    trains = jax.jit(model(QuantMode.TRAIN).apply)(variables, X[:TILE])
    served = Program(loaded, max_rows=TILE)({"x": X[:TILE]})["output"]
    assert_same_bits(served, trains)
    return Converted(params, loaded)


def integers(loaded):
    return {w.name.split("/")[1]: w for w in loaded.manifest.weights if w.role == "qvalue"}


def test_dynamic(tmp_path):
    found = converted(tmp_path, DYNAMIC)
    assert {w.dtype for w in integers(found.loaded).values()} == {"int8"}
    assert found.hlo.count("stablehlo.reduce") >= 3  # a scale for each row, of each contraction
    assert found.error() < 0.02


def test_static_scales_are_frozen_and_nothing_is_reduced_when_it_serves(tmp_path):
    """A small batch is not delayed by a pass over its activations, and a row knows no other."""
    found = converted(tmp_path, STATIC)
    assert "stablehlo.reduce" not in found.hlo
    assert found.hlo.count("stablehlo.dot_general") + found.hlo.count("stablehlo.conv") >= 3
    scales = [w for w in found.loaded.manifest.weights if w.name.endswith("qlhs/scale")]
    assert len(scales) == 3
    assert found.error() < 0.05


def test_weights_only_stay_int8_until_they_are_contracted(tmp_path):
    found = converted(tmp_path, WEIGHT_ONLY)
    weights = integers(found.loaded)
    assert {name: w.dtype for name, w in weights.items()} == dict.fromkeys(weights, "int8")
    assert not any(
        w.role == "float" and w.name.endswith("kernel") for w in found.loaded.manifest.weights
    )
    for weight in weights.values():
        size = ",".join(map(str, weight.shape))
        assert re.search(rf"s8\[{size}\]\S* parameter", found.compiled)
        assert not re.search(rf"f32\[{size}\]\S* constant", found.compiled)
    assert found.loaded.manifest.nbytes < 0.4 * found.loaded.manifest.float_nbytes
    assert found.error() < 0.01
