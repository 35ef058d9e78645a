"""What each op gives for values that are not finite, for zeros, and for operands of no values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import config
from aqt_engine.calibration import AbsMaxCalibration, MinMaxCalibration, SnrCalibration
from aqt_engine.ops import (
    TileCount,
    Tiling,
    conv_general_dilated,
    dot_general,
    einsum,
    ragged_dot,
    tiled_dot_general,
)
from engine.contractions import compiled, value_and_gradients

INT8 = config.config_v4(8, 8, 8, use_stochastic_rounding=False)
MATMUL = (((1,), (0,)), ((), ()))
# Each takes (rows, 4) to (rows, 3); the second operand is made of (4, 3).
OPS = {
    "dot_general": lambda x, w: dot_general(x, w, MATMUL, config=INT8),
    "einsum": lambda x, w: einsum("ab,bc->ac", x, w, config=INT8),
    "tiled": lambda x, w: tiled_dot_general(
        x, w, MATMUL, config=INT8, tiling=Tiling(lhs=(TileCount(1, 2),))
    ),
    "ragged_dot": lambda x, w: ragged_dot(x, w[None], jnp.asarray([len(x)]), config=INT8),
    "conv": lambda x, w: conv_general_dilated(
        x[:, None], w[None], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), config=INT8
    )[:, 0],
}


def operands(rows=3):
    rng = np.random.default_rng(0)
    shapes = ((rows, 4), (4, 3))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


COMPILED = {name: jax.jit(op) for name, op in OPS.items()}


@pytest.fixture(params=OPS)
def op(request):
    return COMPILED[request.param]


def with_value(x, index, value):
    x = x.copy()
    x[index] = value
    return x


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_what_shares_its_scale_and_no_other(op, bad):
    lhs, rhs = operands()
    expected = np.asarray(op(lhs, rhs))
    found = np.asarray(op(with_value(lhs, (1, 2), bad), rhs))
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(np.delete(found, 1, 0), np.delete(expected, 1, 0))
    found = np.asarray(op(lhs, with_value(rhs, (0, 2), bad)))
    assert np.isnan(found[:, 2]).all()
    np.testing.assert_array_equal(found[:, :2], expected[:, :2])


CALIBRATIONS = [AbsMaxCalibration(), MinMaxCalibration(), SnrCalibration((0.9, 0.5))]


@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("depth", [33, 253, 1024])
def test_a_nan_makes_nan_of_its_row_wherever_it_stands(depth, calibration):
    """XLA:CPU's own maximum of a long row is that of its other values."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(21, depth)).astype(np.float32)
    x[np.arange(20), rng.integers(0, depth, 20)] = np.nan
    w = rng.normal(size=(depth, 2)).astype(np.float32)
    lhs = dataclasses.replace(INT8.fwd.lhs, calibration=calibration)
    c = dataclasses.replace(INT8, fwd=dataclasses.replace(INT8.fwd, lhs=lhs))
    found = np.asarray(jax.jit(lambda x: dot_general(x, w, MATMUL, config=c))(x))
    assert np.isnan(found[:20]).all()
    assert not np.isnan(found[20]).any()


def test_zeros_give_zeros(op):
    lhs, rhs = operands()
    assert not np.asarray(op(with_value(lhs, 1, 0), rhs))[1].any()
    assert not np.asarray(op(lhs, with_value(rhs, np.s_[:, 0], 0)))[:, 0].any()


def test_no_rows_give_no_rows_and_a_gradient_of_zeros(op):
    lhs, rhs = operands(0)
    out, dlhs, drhs = compiled(value_and_gradients, op)(lhs, rhs, np.zeros((0, 3), np.float32))
    assert out.shape == (0, 3)
    assert dlhs.shape == (0, 4)
    assert not np.asarray(drhs).any()


def test_integers_are_refused(op):
    lhs, rhs = operands()
    with pytest.raises(TypeError, match="`rhs` has dtype int32, and only floating-point"):
        op(lhs, rhs.astype(np.int32))


def test_noise_without_a_key_is_refused():
    lhs, rhs = operands()
    c = config.fully_quantized()
    for contraction in (
        functools.partial(tiled_dot_general, dimension_numbers=MATMUL, tiling=Tiling()),
        functools.partial(einsum, "ab,bc->ac"),
    ):
        with pytest.raises(ValueError, match="needs a PRNG key"):
            jax.eval_shape(jax.grad(lambda x, op=contraction: op(x, rhs, config=c).sum()), lhs)
