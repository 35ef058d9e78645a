"""The numbers that AQT's own documentation prints, and the names that it uses."""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_engine
from aqt_engine import calibration, config, numerics
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.quantizer import Quantizer

pytestmark = pytest.mark.in_haste

# Printed with eight digits, on another processor: the last ones are the float contraction's.
CLOSE = dict(rtol=2e-6, atol=0)


def gen_matrix(rows, columns, seed=0):
    np.random.seed(seed)
    return np.random.normal(size=(rows, columns))


class MlpBlock(nn.Module):
    config: config.DotGeneral | None

    @nn.compact
    def __call__(self, inputs):
        dot_general = AqtDotGeneral(self.config)
        x = nn.Dense(4 * inputs.shape[-1], dot_general=dot_general)(inputs)
        return nn.Dense(inputs.shape[-1], dot_general=dot_general)(nn.relu(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partitionable", "quantized", "first_row"),
    [
        (False, False, [0.720744, 1.5375545, -2.6456933, -1.7605033]),
        (False, True, [0.7030779, 1.5099456, -2.6334763, -1.7550919]),
        pytest.param(
            *(True, True, [-0.4893394, 1.5974203, 1.4867443, -0.83422923]), marks=pytest.mark.slow
        ),
    ],
)
def test_mlp_block(partitionable, quantized, first_row):
    inputs = gen_matrix(3, 4)
    with jax.threefry_partitionable(partitionable):
        key = jax.random.PRNGKey(0)
        variables = jax.jit(MlpBlock(None).init)(key, inputs)
        model = MlpBlock(config.fully_quantized(fwd_bits=8, bwd_bits=8) if quantized else None)
        found = jax.jit(lambda v, x, key: model.apply(v, x, rngs={"params": key}))(
            variables, inputs, key
        )
    np.testing.assert_allclose(np.asarray(found)[0], first_row, **CLOSE)


def test_int8_matmul():
    tensor = config.Tensor(
        numerics=numerics.IntNumerics(
            bits=8,
            preserve_zero=True,
            preserve_max_val=True,
            clip=True,
            clip_gradient=True,
            round=True,
            dtype=jnp.int8,
        )
    )
    matmul = config.DotGeneral(fwd=config.raw(tensor, tensor))
    lhs, rhs = (jnp.asarray(m, jnp.float32) for m in (gen_matrix(3, 4), gen_matrix(4, 5)))
    found = jax.jit(lambda a, b: matmul(a, b, (((1,), (0,)), ((), ()))))(lhs, rhs)
    np.testing.assert_allclose(
        np.asarray(found)[0], [3.5998788, 5.8562713, 1.9385538, 4.7426414, 1.9792401], **CLOSE
    )


def test_four_bit_quantizer():
    quantizer = Quantizer(
        numerics=numerics.IntNumerics(
            bits=4,
            preserve_zero=True,
            preserve_max_val=True,
            clip=True,
            clip_gradient=True,
            round=True,
            noise_fn=None,
        ),
        calib_shared_axes=-1,
        scale_stop_grad=True,
        calibration=calibration.AbsMaxCalibration(),
    )
    x = jnp.linspace(-10, 10, 10)
    found = jax.jit(lambda x: quantizer.quant(x, calibration_axes=-1)[0])(x)
    np.testing.assert_array_equal(found.qvalue, [-7, -5, -4, -2, -1, 1, 2, 4, 5, 7])
    assert found.scale is not None
    np.testing.assert_array_equal(
        np.asarray(found.dequant()) / np.asarray(found.qvalue),
        np.broadcast_to(found.scale, x.shape),
    )


@pytest.mark.parametrize("module", ["config", "flax", "quantizer", "calibration", "numerics"])
def test_the_modules_that_users_import(module):
    importlib.import_module(f"aqt_engine.{module}")


def test_modes_and_context():
    assert [m.name for m in aqt_engine.QuantMode] == ["TRAIN", "CALIBRATE", "CONVERT", "SERVE"]
    assert aqt_engine.Context(key=None, train_step=3).train_step == 3
