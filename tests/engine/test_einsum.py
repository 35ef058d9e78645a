"""`einsum`: equations of two operands against NumPy's, values and gradients."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import DotGeneral, config, einsum
from engine.contractions import assert_same_bits, value_and_gradients

pytestmark = pytest.mark.in_haste


@functools.partial(jax.jit, static_argnums=0, static_argnames="config")
def compiled(equation, a, b, config):
    """Compiled whole: eager, each operation is compiled by itself."""
    return einsum(equation, a, b, config=config)


EQUATIONS = [
    ("ab,bc->ac", (3, 4), (4, 5)),
    ("ab,bc->ca", (3, 4), (4, 5)),
    ("ab,cb->ac", (3, 4), (5, 4)),
    ("ab,bc", (3, 4), (4, 5)),
    ("bac,bcd->bad", (2, 3, 4), (2, 4, 5)),
    ("btnh,bsnh->bnts", (2, 3, 4, 5), (2, 6, 4, 5)),
    ("bnts,bsnh->btnh", (2, 4, 3, 6), (2, 6, 4, 5)),
    ("...d,df->...f", (2, 3, 4), (4, 5)),
    ("...ij,...jk->...ik", (2, 3, 4), (2, 4, 5)),
    ("a,b->ab", (3,), (4,)),
    ("ab,ab->ab", (3, 4), (3, 4)),
    ("ab,ab->", (3, 4), (3, 4)),
    ("ab,bc->a", (3, 4), (4, 5)),
    ("ab,bc->c", (3, 4), (4, 5)),
    ("aab,bc->ac", (3, 3, 4), (4, 5)),
    ("abc,cdd->abd", (2, 3, 4), (4, 5, 5)),
    (" a b , b c -> a c ", (3, 4), (4, 5)),
]


def operands(lhs, rhs, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s), np.float32) for s in (lhs, rhs))


@pytest.mark.parametrize(
    ("equation", "lhs", "rhs"),
    [*EQUATIONS[6:10], *(pytest.param(*e, marks=pytest.mark.slow) for e in EQUATIONS)],
)
def test_in_float_it_is_numpys(equation, lhs, rhs):
    a, b = operands(lhs, rhs)
    found = jax.jit(lambda a, b: einsum(equation, a, b, config=DotGeneral()))(a, b)
    expected = np.einsum(equation, a, b)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("equation", "lhs", "rhs"),
    [EQUATIONS[1], EQUATIONS[14], *(pytest.param(*e, marks=pytest.mark.slow) for e in EQUATIONS)],
)
def test_quantized_it_is_near_and_its_gradients_pass_straight_through(equation, lhs, rhs):
    a, b = operands(lhs, rhs)
    c = config.config_v4(8, None, None)
    exact = np.einsum(equation, a, b)
    out, *gradients = jax.jit(
        functools.partial(value_and_gradients, functools.partial(einsum, equation, config=c))
    )(a, b, np.cos(exact))
    _, *straight = jax.jit(
        functools.partial(value_and_gradients, functools.partial(jnp.einsum, equation))
    )(a, b, np.cos(exact))
    # A sum whose terms cancel is small, and its error is not: it is that of the terms.
    terms = np.linalg.norm(np.einsum(equation, np.abs(a), np.abs(b)))
    assert 0 < np.linalg.norm(out - exact) < 0.02 * terms
    for found, expected in zip(gradients, straight, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@st.composite
def equations(draw):
    """Any equation: repeated letters, ellipses of unlike lengths, outputs given and implied."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=5, max_size=5))
    size = dict(zip("abcdE", sizes, strict=True))
    broadcast = draw(st.lists(st.integers(1, 3), max_size=2))

    def side():
        labels = draw(st.text("abcdE", max_size=3))
        shape = [size[c] for c in labels]
        if draw(st.booleans()):
            at = draw(st.integers(0, len(labels)))
            labels = f"{labels[:at]}...{labels[at:]}"
            shape[at:at] = broadcast[draw(st.integers(0, len(broadcast))) :]
        return labels, tuple(shape)

    (left, lhs), (right, rhs) = side(), side()
    if draw(st.booleans()):
        return f"{left},{right}", lhs, rhs
    letters = sorted(set(left + right) - {"."})
    out = "".join(draw(st.permutations(letters))[: draw(st.integers(0, len(letters)))])
    if "..." in left + right:
        at = draw(st.integers(0, len(out)))
        out = f"{out[:at]}...{out[at:]}"
    return f"{left},{right}->{out}", lhs, rhs


@pytest.mark.slow
@hypothesis.settings(max_examples=2 * hypothesis.settings.default.max_examples)
@hypothesis.given(case=equations())
def test_any_equation_is_numpys(case):
    equation, lhs, rhs = case
    a, b = operands(lhs, rhs)
    found = jax.jit(lambda a, b: einsum(equation, a, b, config=DotGeneral()))(a, b)
    expected = np.einsum(equation, a, b)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("equation", "lhs", "rhs", "lhs_axes", "rhs_axes"),
    [
        ("ab,bc->ac", (3, 4), (4, 5), 1, 0),
        ("ab,bc->ca", (3, 4), (4, 5), 1, 0),
        ("btnh,bsnh->bnts", (2, 3, 4, 5), (2, 6, 4, 5), 3, 3),
        ("abc,bdc->ad", (2, 3, 4), (3, 5, 4), (1, 2), (0, 2)),
        ("...d,df->...f", (2, 3, 4), (4, 5), 2, 0),
    ],
)
def test_scales_are_shared_along_the_letters_that_are_summed(
    equation, lhs, rhs, lhs_axes, rhs_axes
):
    def dequantized(x, axes):
        x = np.asarray(x)
        scale = np.abs(x).max(axis=axes, keepdims=True) * np.float32(1 / 127.5)
        rounded = np.rint(np.clip(x * (1 / scale), -127, 127))
        return rounded.astype(np.float64) * scale

    a, b = operands(lhs, rhs)
    c = config.config_v4(8, None, None)
    found = jax.jit(lambda a, b: einsum(equation, a, b, config=c))(a, b)
    left, right = dequantized(a, lhs_axes), dequantized(b, rhs_axes)
    # Exact integers, and three roundings to float32: of the sum, and of a product by each scale.
    expected = np.einsum(equation, left, right)
    np.testing.assert_allclose(found, expected, rtol=4 * 2.0**-24, atol=0)


@pytest.mark.slow
def test_each_side_keeps_its_own_configuration_when_the_operands_change_places():
    a, b = operands((3, 64), (64, 5))
    c = config.DotGeneral(fwd=config.raw(config.int_tensor(8), config.int_tensor(2)))
    straight = np.asarray(compiled("ab,bc->ac", a, b, config=c))
    swapped = np.asarray(compiled("ab,bc->ca", a, b, config=c))
    # The scales are multiplied in the order of the contraction, which changes the last bit.
    np.testing.assert_allclose(swapped.T, straight, rtol=1e-6)
    other = compiled("ab,bc->ac", a, b, config=c.swapped())
    assert np.abs(np.asarray(other) - straight).max() > 0.1


@pytest.mark.slow
def test_a_stored_operand_gives_the_same_bits():
    a, b = operands((3, 4), (4, 5))
    c = config.config_v4(8, None, None)
    stored = jax.jit(lambda b: c.fwd.rhs.quantizer(None).quant(b, calibration_axes=0)[0])(b)
    for equation in ("ab,bc->ac", "ab,bc->ca"):
        found = compiled(equation, a, stored, config=c)
        assert_same_bits(found, compiled(equation, a, b, config=c))
    with pytest.raises(ValueError, match="cannot be summed"):
        einsum("ab,bc->a", a, stored, config=c)


def test_without_a_configuration_it_is_the_einsum_of_numpy():
    a, b = operands((3, 4), (4, 5))
    assert_same_bits(einsum("ab,bc->ca", a, b, config=None), jnp.einsum("ab,bc->ca", a, b))
    side = config.config_v4(8, None, None).fwd.rhs
    stored = jax.jit(lambda b: side.quantizer(None).quant(b, 0)[0])(b)
    with pytest.raises(TypeError, match="`config` is None"):
        einsum("ab,bc->ac", a, stored, config=None)


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("ab,bc,cd->ad", "two operands"),
        ("ab->ba", "two operands"),
        ("ab,bc->ad", "must name letters of the operands"),
        ("ab,bc->aa", "each once"),
        ("abc,bc->a", "does not fit"),
        ("a.b,bc->ac", "dots|does not fit"),
        ("a1,bc->ac", "two operands"),
    ],
)
def test_other_equations_are_refused(equation, message):
    a, b = operands((3, 4), (4, 5))
    with pytest.raises(ValueError, match=message):
        einsum(equation, a, b, config=DotGeneral())
