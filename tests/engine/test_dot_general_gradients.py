"""Gradients of `dot_general`: over every kind of axis, under transformations, and beside NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import Context, config
from engine.contractions import (
    CONTRACTIONS,
    MATMUL,
    assert_same_bits,
    equation,
    output_shape,
    values,
)

pytestmark = pytest.mark.in_haste

INT8 = config.config_v4(8, None, None)
SHARED = config.update(INT8, "d*.rhs", use_fwd_quant=True)
QUANTIZED = config.fully_quantized(8, 8, use_stochastic_rounding=False)
STOCHASTIC = config.fully_quantized(8, 8)
LHS, RHS, AXES = MATMUL
OUT = output_shape(*MATMUL)


def gradients(c, dimension_numbers, lhs, rhs, g, key=None):
    contraction = functools.partial(
        c, dimension_numbers=dimension_numbers, context=Context(key=key)
    )
    return jax.vjp(contraction, lhs, rhs)[1](g)


def matmul_gradients(c):
    """Not compiled, or each operation by itself."""
    return functools.partial(gradients, c, AXES)


@functools.cache
def compiled_gradients(c):
    return jax.jit(matmul_gradients(c))


def arguments(seed=0, batch=()):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.normal(size=(*batch, *shape)), jnp.float32) for shape in (LHS, RHS, OUT)
    ]


def dequantized(x, axes):
    """`x` rounded to its buckets, by NumPy in float32."""
    absmax = np.abs(x).max(axis=axes, keepdims=True)
    scale = np.where(absmax == 0, np.float32(1), absmax) * np.float32(1 / 127.5)
    return np.rint(np.clip(x * (1 / scale), -127, 127)) * scale


def marked(i, shared):
    """The first fast; each slow with one of the two, in turn, and in the long form with both."""
    if i == 0:
        return ()
    return pytest.mark.slow if (i + shared) % 2 else [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    ("contraction", "shared"),
    [
        pytest.param(contraction, shared, marks=marked(i, shared))
        for i, contraction in enumerate(CONTRACTIONS)
        for shared in (True, False)
    ],
)
def test_a_float_backward_pass_is_that_of_the_operands_it_takes(contraction, shared):
    lhs, rhs, dimension_numbers = contraction
    run = jax.jit(functools.partial(gradients, SHARED if shared else INT8, dimension_numbers))
    left, right, out = equation(dimension_numbers, len(lhs), len(rhs))
    (lc, rc), _ = dimension_numbers
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x, y, g = (values(rng, s) for s in (lhs, rhs, output_shape(*contraction)))
        found = run(x, y, g)
        if shared:
            x, y = dequantized(x, tuple(lc)), dequantized(y, tuple(rc))
        x, y, g = (a.astype(np.float64) for a in (x, y, g))
        for mine, operand, letters, result in (
            (found[0], y, right, left),
            (found[1], x, left, right),
        ):
            expected = np.einsum(f"{out},{letters}->{result}", g, operand)
            # A sum whose terms cancel is small, and its rounding error is not: that is the terms'.
            terms = np.einsum(f"{out},{letters}->{result}", np.abs(g), np.abs(operand))
            assert np.all(np.abs(mine - expected) <= 2e-5 * terms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("c", "run"),
    [
        pytest.param(QUANTIZED, lambda f: f, marks=pytest.mark.long, id="nearest, eager"),
        pytest.param(STOCHASTIC, lambda f: f, marks=pytest.mark.long, id="stochastic, eager"),
        pytest.param(STOCHASTIC, jax.jit, id="stochastic"),
    ],
)
def test_compiled_mapped_scanned_and_rematerialized_gradients_have_the_same_bits(c, run):
    batched = arguments(batch=(3,))
    key = jax.random.key(1)
    gradient = functools.partial(matmul_gradients(c), key=key)
    jitted = jax.jit(gradient)
    alone = jitted if run is jax.jit else gradient
    each = [alone(*[a[i] for a in batched]) for i in range(3)]
    expected = [np.stack(parts) for parts in zip(*each, strict=True)]

    def contraction(lhs, rhs):
        return c(lhs, rhs, AXES, context=Context(key=key))

    def rematerialized(lhs, rhs, g):
        return jax.vjp(jax.checkpoint(contraction), lhs, rhs)[1](g)

    def scanned(*stacked):
        return jax.lax.scan(lambda carry, case: (carry, gradient(*case)), 0, stacked)[1]

    found = {
        "jit": [
            np.stack(parts)
            for parts in zip(*[jitted(*[a[i] for a in batched]) for i in range(3)], strict=True)
        ],
        "vmap": run(jax.vmap(gradient))(*batched),
        "scan": run(scanned)(*batched),
        "remat": jax.jit(jax.vmap(rematerialized))(*batched),
    }
    for results in found.values():
        for mine, other in zip(results, expected, strict=True):
            assert_same_bits(mine, other)


def test_the_gradient_of_a_weight_is_summed_from_int8_and_not_widened_first():
    lhs, rhs = jnp.ones((64, 48)), jnp.ones((48, 40))
    gradient = jax.grad(lambda w: QUANTIZED(lhs, w, AXES).sum())
    compiled = jax.jit(gradient).lower(rhs).compile().as_text()
    # Where XLA:CPU has no fast integer contraction for a layout, it converts the operands first.
    assert "s8[48,64]" in compiled or "s8[40,64]" in compiled
    assert not any(f"s32[{shape}]" in compiled for shape in ("64,48", "64,40", "48,64", "40,64"))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_the_gradient_spoils_the_row_and_column_of_its_scales(bad):
    lhs, rhs, g = arguments()
    clean = compiled_gradients(QUANTIZED)(lhs, rhs, g)
    dlhs, drhs = compiled_gradients(QUANTIZED)(lhs, rhs, g.at[2, 1].set(bad))
    assert np.isnan(dlhs[2]).all()
    assert np.isnan(drhs[:, 1]).all()
    assert_same_bits(np.delete(dlhs, 2, 0), np.delete(clean[0], 2, 0))
    assert_same_bits(np.delete(drhs, 1, 1), np.delete(clean[1], 1, 1))


@pytest.mark.slow
def test_a_nan_in_an_operand_spoils_the_other_sides_gradient_and_not_its_own():
    lhs, rhs, g = arguments()
    clean = compiled_gradients(QUANTIZED)(lhs, rhs, g)
    # The row's scale is NaN, and is multiplied into the gradient that all columns sum over.
    dlhs, drhs = compiled_gradients(QUANTIZED)(lhs.at[2, 3].set(np.nan), rhs, g)
    assert_same_bits(dlhs, clean[0])
    assert np.isnan(drhs).all()


def test_a_nan_on_the_right_spoils_its_column():
    lhs, rhs, _ = arguments()
    run = jax.jit(functools.partial(INT8, dimension_numbers=AXES))
    clean = run(lhs, rhs)
    w = np.array(rhs)
    w[4, 1] = np.nan
    spoiled = np.asarray(run(lhs, w))
    assert np.isnan(spoiled[:, 1]).all()
    assert_same_bits(np.delete(spoiled, 1, 1), np.delete(clean, 1, 1))


@pytest.mark.slow
def test_zero_gradients_are_zeros():
    lhs, rhs, g = arguments()
    for found in compiled_gradients(QUANTIZED)(lhs, rhs, jnp.zeros_like(g)):
        assert not np.asarray(found).any()


def test_a_stored_side_may_be_an_argument_of_a_compiled_and_of_a_mapped_function():
    lhs, rhs, _ = arguments(batch=(3,))
    quantizer = INT8.fwd.rhs.quantizer(None)
    stored = jax.jit(jax.vmap(lambda y: quantizer.quant(y, calibration_axes=0)[0]))(rhs)
    run = jax.jit(functools.partial(INT8, dimension_numbers=AXES))
    expected = np.stack([run(x, y) for x, y in zip(np.asarray(lhs), np.asarray(rhs), strict=True)])
    mapped = jax.jit(jax.vmap(lambda x, q: INT8(x, q, AXES)))
    assert_same_bits(mapped(lhs, stored), expected)
    with pytest.raises(TypeError, match="stored QTensor has no gradient"):
        jax.eval_shape(
            jax.grad(lambda x, q: INT8(x, q, AXES).sum()),
            *jax.tree.map(lambda leaf: np.asarray(leaf)[0], (lhs, stored)),
        )
