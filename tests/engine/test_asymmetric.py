"""Contractions of operands with a bias: the cross terms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import config
from aqt_engine.calibration import AbsMaxCalibration, ConstantCalibration, MinMaxCalibration
from aqt_engine.config import DotGeneral, DotGeneralRaw
from engine.contractions import assert_same_bits

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]

BATCHED = (((2,), (1,)), ((0,), (2,)))
PAIRS = [
    (MinMaxCalibration(), AbsMaxCalibration()),
    (AbsMaxCalibration(), MinMaxCalibration()),
    (MinMaxCalibration(), MinMaxCalibration()),
    (ConstantCalibration(4.0, -1.5), AbsMaxCalibration()),
    (ConstantCalibration(4.0, 0.25), ConstantCalibration(3.0, -0.5)),
]


def operands(dtype=np.float32):
    rng = np.random.default_rng(0)
    lhs = rng.normal(size=(3, 5, 16)) + 1.0
    rhs = np.maximum(rng.normal(size=(4, 16, 3)), 0)
    return jnp.asarray(lhs, dtype), jnp.asarray(rhs, dtype)


def asymmetric(lhs, rhs, bits=8):
    numerics = config.int_tensor(bits)
    return DotGeneral(
        fwd=config.raw(
            dataclasses.replace(numerics, calibration=lhs),
            dataclasses.replace(numerics, calibration=rhs),
        )
    )


def fake(c):
    sides = {
        side: dataclasses.replace(getattr(c.fwd, side), use_fake_quant=True)
        for side in ("lhs", "rhs")
    }
    return DotGeneral(fwd=DotGeneralRaw(**sides))


@pytest.mark.parametrize(("lhs_calibration", "rhs_calibration"), PAIRS)
def test_the_contraction_is_that_of_the_dequantized_operands(lhs_calibration, rhs_calibration):
    lhs, rhs = operands()
    c = asymmetric(lhs_calibration, rhs_calibration)
    exact = jax.jit(lambda a, b: fake(c)(a, b, BATCHED, jax.lax.Precision.HIGHEST))(lhs, rhs)
    found = jax.jit(lambda a, b: c(a, b, BATCHED))(lhs, rhs)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("lhs_calibration", "rhs_calibration"), PAIRS[:3])
def test_zero_points_are_corrected_in_integers(lhs_calibration, rhs_calibration):
    lhs, rhs = operands()
    c = asymmetric(lhs_calibration, rhs_calibration)
    left = jax.jit(lambda a: c.fwd.lhs.quantizer(None).quant(a, calibration_axes=2)[0])(lhs)
    right = jax.jit(lambda b: c.fwd.rhs.quantizer(None).quant(b, calibration_axes=1)[0])(rhs)

    def centered(q):
        zero = 0 if q.bias is None else np.round(np.asarray(q.bias) / np.asarray(q.scale))
        return np.asarray(q.qvalue, np.int64) - np.int64(zero)

    total = np.einsum("bmk,nkb->bmn", centered(left), centered(right)).astype(np.float32)
    left_scale = np.asarray(left.scale)
    right_scale = np.asarray(right.scale).transpose(2, 1, 0)
    expected = total * left_scale * right_scale
    if lhs_calibration == rhs_calibration:  # eager, each operation is compiled by itself
        assert_same_bits(c(lhs, rhs, BATCHED), expected)
    assert_same_bits(jax.jit(lambda a, b: c(a, b, BATCHED))(lhs, rhs), expected)


def test_asymmetric_is_closer_for_values_of_one_sign():
    rng = np.random.default_rng(1)
    lhs = jnp.asarray(np.abs(rng.normal(size=(64, 256))), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(256, 32)), jnp.float32)
    matmul = (((1,), (0,)), ((), ()))
    error = {
        calibration: float(
            jnp.abs(
                asymmetric(calibration, AbsMaxCalibration(), 4)(lhs, rhs, matmul) - lhs @ rhs
            ).mean()
        )
        for calibration in (AbsMaxCalibration(), MinMaxCalibration())
    }
    assert error[MinMaxCalibration()] < 0.8 * error[AbsMaxCalibration()]


def test_gradients_pass_straight_through():
    lhs, rhs = operands()
    c = asymmetric(MinMaxCalibration(), MinMaxCalibration())
    out, vjp = jax.vjp(lambda a, b: c(a, b, BATCHED), lhs, rhs)
    _, exact = jax.vjp(lambda a, b: jax.lax.dot_general(a, b, BATCHED), lhs, rhs)
    for found, expected in zip(vjp(jnp.cos(out)), exact(jnp.cos(out)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_forwards_integers_are_refused_backward_without_their_bias():
    forward = asymmetric(MinMaxCalibration(), MinMaxCalibration())
    c = DotGeneral(fwd=forward.fwd, dlhs=config.fully_quantized(8, 8, True, False).dlhs)
    lhs, rhs = operands()
    with pytest.raises(ValueError, match="without their bias"):
        jax.grad(lambda a: c(a, rhs, BATCHED).sum())(lhs)


def test_the_accumulator_counts_the_zero_points_range():
    c = asymmetric(MinMaxCalibration(), MinMaxCalibration())
    with pytest.raises(ValueError, match="overflow"):
        jax.eval_shape(
            lambda a, b: c(a, b, (((0,), (0,)), ((), ()))),
            jax.ShapeDtypeStruct((40_000,), np.float32),
            jax.ShapeDtypeStruct((40_000,), np.float32),
        )
