"""The bits of the training forward with the int8 kernel and without, float operations around it."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from aqt_engine import QuantMode, bundle, config, convert
from aqt_engine.execution import Program
from aqt_engine.flax import AqtDotGeneral, AqtEinsum
from aqt_engine.kernels import library
from aqt_engine.kernels.substitution import substituted
from aqt_engine.statistics import MeanOfAbsMaxCalibration
from compiled_kernel import why_no_kernel
from engine.contractions import assert_same_bits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_no_kernel()), reason="there is no kernel to compare with"),
]
TILE, ROWS = 8, 256
INT8 = config.fully_quantized()


class Mixer(nn.Module):
    """Layer norms before a contraction along the middle axis: what once had other bits."""

    mode: QuantMode = QuantMode.TRAIN

    @nn.compact
    def __call__(self, x):
        dense = AqtDotGeneral(INT8, rhs_quant_mode=self.mode)
        y = nn.LayerNorm()(nn.Dense(96, dot_general=dense)(x))
        weight = self.param("mixing", nn.initializers.lecun_normal(), (16, 16))
        einsum = AqtEinsum(INT8, lhs_quant_mode=self.mode)
        x = y + nn.gelu(einsum("qp,npc->nqc", weight, y))
        return nn.Dense(33, dot_general=dense)(nn.LayerNorm()(x).mean(axis=1))


class Blocks(nn.Module):
    """Residual blocks: each layer norm goes to three layers that quantize it, and to a sum."""

    mode: QuantMode = QuantMode.TRAIN

    @nn.compact
    def __call__(self, x):
        dense = AqtDotGeneral(INT8, rhs_quant_mode=self.mode)
        x = nn.Dense(96, dot_general=dense)(x)
        for _ in range(3):
            y = nn.LayerNorm()(x)
            q, k, v = (nn.Dense(96, dot_general=dense)(y) for _ in range(3))
            x = y + nn.Dense(96, dot_general=dense)(nn.gelu(q) * nn.softmax(k) + v)
        return x


@pytest.mark.parametrize(("model", "quantized"), [(Mixer, 2), (Blocks, 13)])
def test_answers_are_those_of_training(tmp_path, model, quantized):
    x = np.random.default_rng(0).normal(size=(ROWS, 16, 4)).astype(np.float32)
    variables = jax.jit(model().init)(jax.random.key(0), x[:TILE])
    convert.convert(model, variables, {"x": x[:TILE]}, tmp_path / "m" / "1", tile=TILE)
    loaded = bundle.load(tmp_path / "m" / "1")
    (graph,) = loaded.graphs.values()
    text = substituted(graph, len(loaded.weights)).graph.mlir_module()
    assert text.count(library.QUANTIZE_TARGET) == quantized
    trained = jax.jit(model().apply)
    expected = np.concatenate([trained(variables, x[i : i + TILE]) for i in range(0, ROWS, TILE)])
    for kernel in (True, False):
        program = Program(loaded, max_rows=ROWS, kernel=kernel)
        assert bool(program.kernel) == kernel
        assert_same_bits(program({"x": x})["output"], expected)


STATIC = config.update(
    INT8,
    "fwd.lhs",
    calibration=MeanOfAbsMaxCalibration(),
    calibration_mode=config.CalibrationMode.ALL_AXES,
)


class Layers(nn.Module):
    """Layers with a bias and an activation between them, whose scales are learned and stored."""

    mode: QuantMode = QuantMode.TRAIN

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            dense = AqtDotGeneral(STATIC, lhs_quant_mode=self.mode, rhs_quant_mode=self.mode)
            x = nn.relu(nn.Dense(64, dot_general=dense)(x))
        return x


def test_between_layers_of_stored_scales_nothing_is_float_in_memory(tmp_path):
    """From the sums of one layer to the integers of the next it is one loop."""
    x = np.random.default_rng(0).normal(size=(TILE, 64)).astype(np.float32)
    variables = Layers().init(jax.random.key(0), x)
    variables = convert.calibrate(Layers, variables, [{"x": x}])
    convert.convert(Layers, variables, {"x": x}, tmp_path / "m" / "1", tile=TILE)
    program = Program(bundle.load(tmp_path / "m" / "1"), max_rows=TILE)
    program.compile(1)
    (compiled,) = program._executables.values()
    entry = compiled.as_text().partition("\nENTRY ")[2]
    shape = rf"\[(?:1,)?{TILE},64\]"
    # The input and the output; what is multiplied, and its sums.
    assert len(re.findall(rf"= f32{shape}", entry)) == 2
    assert len(re.findall(rf"= s8{shape}", entry)) == 3
    assert len(re.findall(rf"= s32{shape}", entry)) == 3
