"""Contractions of every dtype that values are stored and multiplied in, end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from aqt_engine import config, dot_general
from aqt_engine.numerics import FloatNumerics, Fp8Numerics
from aqt_engine.ops.dot_general import quantize_rhs
from engine.contractions import assert_same_bits, compiled, value_and_gradients

pytestmark = pytest.mark.in_haste

MATMUL = (((1,), (0,)), ((), ()))


def operands(dtype=jnp.float32, lhs=(4, 16), rhs=(16, 3), seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in (lhs, rhs)]


def run(c, lhs, rhs):
    return jax.jit(lambda a, b: dot_general(a, b, MATMUL, config=c))(lhs, rhs)


def stored_as(bits, dtype):
    """A side of `bits` bits whose values are stored in `dtype`."""
    numerics = dataclasses.replace(config.int_numerics(bits), dtype=dtype)
    return dataclasses.replace(config.int_tensor(bits), numerics=numerics)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "dtype"), [(2, jnp.int2), (4, jnp.int4), (3, jnp.int4)])
def test_a_narrow_weight_with_int8_activations(bits, dtype):
    lhs, rhs = operands()
    narrow = config.DotGeneral(fwd=config.raw(config.int_tensor(8), stored_as(bits, dtype)))
    wide = config.DotGeneral(fwd=config.raw(config.int_tensor(8), stored_as(bits, jnp.int8)))
    stored = jax.jit(lambda w: quantize_rhs(w, 2, MATMUL, config=narrow))(rhs)
    assert stored.qvalue.dtype == dtype
    expected = run(wide, lhs, rhs)
    assert_same_bits(run(narrow, lhs, rhs), expected)
    assert_same_bits(run(narrow, lhs, stored), expected)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("bits", "dtype"), [(2, jnp.int2), (4, jnp.int4)])
def test_narrow_integers_are_multiplied_as_they_are(bits, dtype, platform):
    # XLA:CPU multiplies none narrower than int8: lowered here, and not run.
    side = stored_as(bits, dtype)
    c = config.DotGeneral(fwd=config.DotGeneralRaw(side, side, dtype, jnp.int32))
    run = jax.jit(lambda a, b: dot_general(a, b, MATMUL, config=c))
    text = export.export(run, platforms=[platform])(*operands()).mlir_module()
    line = next(line for line in text.splitlines() if "dot_general" in line and "tensor<" in line)
    assert f"(tensor<4x16xi{bits}>, tensor<16x3xi{bits}>) -> tensor<4x3xi32>" in line


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_fp8_is_multiplied_as_it_is_and_summed_in_float32(dtype):
    lhs, rhs = operands(jnp.bfloat16)
    side = config.Tensor(numerics=Fp8Numerics(dtype))
    c = config.DotGeneral(fwd=config.raw(side, side))
    text = jax.jit(lambda a, b: dot_general(a, b, MATMUL, config=c)).lower(lhs, rhs).as_text()
    line = next(line for line in text.splitlines() if "dot_general" in line)
    assert "f8E" in line
    assert line.rstrip().endswith("xf32>")
    exact = np.asarray(lhs, np.float64) @ np.asarray(rhs, np.float64)
    np.testing.assert_allclose(np.asarray(run(c, lhs, rhs), np.float64), exact, atol=0.6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_integers_may_be_multiplied_in_a_float_that_holds_them(dtype):
    lhs, rhs = operands()
    in_int8 = config.config_v4(8, None, None)
    in_float = config.update(in_int8, "fwd", dg_in_dtype=dtype, dg_accumulator_dtype=jnp.float32)
    # 16 products of up to 127 x 127 are exact in float32.
    assert_same_bits(run(in_float, lhs, rhs), run(in_int8, lhs, rhs))


def test_binary_contractions_and_gradients():
    lhs, rhs = operands()
    side = config.int_tensor(1)
    c = config.DotGeneral(fwd=config.raw(side, side))
    out, dlhs, drhs = compiled(
        value_and_gradients, lambda a, b: dot_general(a, b, MATMUL, config=c)
    )(lhs, rhs, np.ones((4, 3), np.float32))
    x, w = np.asarray(lhs), np.asarray(rhs)
    x_scale, w_scale = np.abs(x).max(1, keepdims=True), np.abs(w).max(0, keepdims=True)
    signs = np.where(x < 0, -0.5, 0.5) @ np.where(w < 0, -0.5, 0.5)
    np.testing.assert_allclose(out, signs * x_scale * w_scale, rtol=1e-6)
    np.testing.assert_allclose(dlhs, np.ones_like(out) @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(drhs, x.T @ np.ones_like(out), rtol=1e-5, atol=1e-5)


def test_a_float4_weight():
    lhs, rhs = operands(jnp.bfloat16)
    fp4 = FloatNumerics(exponent_bits=2, mantissa_bits=1, dtype=jnp.float4_e2m1fn)
    c = config.DotGeneral(fwd=config.raw(config.Tensor(), config.Tensor(numerics=fp4)))
    wide = dataclasses.replace(fp4, dtype=jnp.float32)
    expected = run(config.update(c, "fwd.rhs", numerics=wide), lhs, rhs)
    stored = jax.eval_shape(lambda w: quantize_rhs(w, 2, MATMUL, config=c), rhs)
    assert stored.qvalue.dtype == jnp.float4_e2m1fn
    assert_same_bits(run(c, lhs, rhs), expected)


@pytest.mark.parametrize("bits", [17, 22])
def test_integers_beyond_the_range_of_float16_are_refused(bits):
    lhs, rhs = operands(jnp.float16)
    c = config.config_v4(bits, None, None)
    with pytest.raises(ValueError, match=rf"{bits}-bit integers reach .* float16 ends at 65504"):
        jax.eval_shape(lambda a, b: dot_general(a, b, MATMUL, config=c), lhs, rhs)
    q = jax.jit(lambda x: config.int_tensor(16).quantizer(None).quant(x, 1)[0])(lhs)
    assert np.isfinite(np.asarray(q.qvalue)).all()
