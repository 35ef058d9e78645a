"""Changes of configurations against those that `aqtp` makes, and in what they keep."""

import dataclasses

import jax.numpy as jnp
import pytest

from aqt_engine import config
from aqt_engine.calibration import AbsMaxCalibration, ConstantCalibration
from aqt_engine.numerics import Centered, FloatNumerics, IntNumerics, Uniform

pytestmark = pytest.mark.in_haste

V4 = config.config_v4()


def numerics(c):
    return [
        getattr(getattr(c, contraction), side).numerics
        for contraction in ("fwd", "dlhs", "drhs")
        for side in ("lhs", "rhs")
    ]


def test_with_bits():
    c = config.with_bits(V4, 8, 4, 2, None, 16, 1)
    assert [getattr(n, "bits", None) for n in numerics(c)] == [8, 4, 2, None, 16, 1]
    assert all(getattr(n, "noise_fn", None) is None for n in numerics(c))
    assert c.fwd.dg_accumulator_dtype == jnp.int32
    assert c.dlhs.dg_accumulator_dtype is None
    assert c.drhs.dg_accumulator_dtype is None
    assert config.with_bits(c, *[None] * 6) == config.DotGeneral()
    sharded = config.config_v4(dlhs_local_aqt=config.LocalAqt(2))
    assert config.with_bits(sharded, 8, 8, 8, 8, None, None).dlhs.local_aqt == config.LocalAqt(2)


def test_with_stochastic_rounding():
    c = config.with_stochastic_rounding(config.fully_quantized(), True, False, Centered())
    drawn = [n.noise_fn for n in numerics(c) if isinstance(n, IntNumerics)]
    assert drawn == [None, None, Centered(), None, Centered(), None]
    nearest = config.with_stochastic_rounding(c, False, False)
    assert nearest == config.fully_quantized(use_stochastic_rounding=False)
    assert config.with_stochastic_rounding(nearest, True, True) == config.fully_quantized()
    small = FloatNumerics(exponent_bits=2, mantissa_bits=1, dtype=jnp.bfloat16)
    c = config.update(config.DotGeneral(), "dlhs.*", numerics=small)
    c = config.with_stochastic_rounding(c, True, False)
    assert c.dlhs.lhs.numerics == dataclasses.replace(small, stochastic_rounding=True)
    assert c.dlhs.rhs.numerics == small
    assert V4.dlhs.lhs.numerics.noise_fn == Uniform()


def test_with_absmax_calib_scale():
    c = config.with_absmax_calib_scale(V4, 0.9)
    assert c.fwd.lhs.calibration == AbsMaxCalibration(0.9)
    assert all(n.clip_gradient for n in numerics(c) if isinstance(n, IntNumerics))
    assert c.drhs == V4.drhs
    wider = config.with_absmax_calib_scale(V4, 1.2)
    assert not any(n.clip_gradient for n in numerics(wider) if isinstance(n, IntNumerics))
    constant = config.update(V4, "fwd.lhs", calibration=ConstantCalibration(1.0))
    with pytest.raises(ValueError, match="must have an AbsMaxCalibration"):
        config.with_absmax_calib_scale(constant, 0.9)


def test_with_int_numerics_preserve_zero():
    c = config.with_int_numerics_preserve_zero(V4, False)
    found = [n for n in numerics(c) if isinstance(n, IntNumerics)]
    assert len(found) == 4
    assert not any(n.preserve_zero for n in found)
    assert {n.dtype for n in found} == {None}
    assert c.fwd.dg_accumulator_dtype is None
    assert config.with_int_numerics_preserve_zero(c, True) == V4
