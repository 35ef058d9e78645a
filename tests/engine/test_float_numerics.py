"""Small floats: every bfloat16 and float16 value against NumPy, ml_dtypes and `aqtp`."""

import dataclasses
import itertools
import math
import warnings

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from aqt_engine.numerics import FloatNumerics, FloatRounding, Fp8Numerics, IntNumerics, aqt_float
from engine.contractions import assert_same_bits, bits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the oracle's own, on today's JAX
    from aqt.jax.v2 import utils as aqtp_utils
    from aqt.jax.v2.numerics import fp8_numerics, fp_numerics

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]


SIZE = 2**16  # of every array that is rounded: one shape is one compilation


def rounded(n, x, key=None):
    """`x`, whatever its size, by `n`."""
    return np.asarray(n.quantize(jnp.asarray(np.resize(x, SIZE)), key))[: len(x)]


def every_number(dtype):
    """All values of a 16-bit float but NaN; some of them twice."""
    codes = np.arange(2**16, dtype=np.uint16)
    infinity = np.array(np.inf, dtype).view(np.uint16)
    return np.resize(codes[codes & 0x7FFF <= infinity].view(dtype), SIZE)


EVERY_BFLOAT16 = every_number(ml_dtypes.bfloat16)
EVERY_FLOAT16 = every_number(np.float16)

FP4 = ["e0m3", "e0m3_ocp", "e1m2", "e1m2_ocp", "e2m1", "e2m1_ocp", "e3m0", "e3m0_ocp"]
FP5 = ["e0m4_ocp", "e1m3_ocp", "e2m2_ocp", "e3m1_ocp", "e4m0_ocp"]
FP6 = ["e0m5_ocp", "e1m4_ocp", "e2m3_ocp", "e3m2_ocp", "e4m1_ocp", "e5m0_ocp"]
SHORT = (*FP4, "e1m0", "e2m2_ocp", "e3m2_ocp")
LONG = [pytest.param(name, marks=pytest.mark.long) for name in (*FP5, *FP6) if name not in SHORT]

HARDWARE = {
    "float4_e2m1fn": FloatNumerics(2, 1),
    "float6_e2m3fn": FloatNumerics(2, 3),
    "float6_e3m2fn": FloatNumerics(3, 2),
    "float8_e3m4": FloatNumerics(3, 4, max_value=15.5),
    "float8_e4m3": FloatNumerics(4, 3, max_value=240),
    "float8_e4m3fn": FloatNumerics(4, 3, max_value=448),
    "float8_e5m2": FloatNumerics(5, 2, max_value=57344),
}


def positive_values(n):
    """The positive values of a format and zero if it has one, from its codes, in their order."""
    lowest = n.min_exponent
    if lowest is None:
        ieee = 2 - 2 ** (n.exponent_bits - 1) if n.exponent_bits else 0
        lowest = max(ieee, n.mantissa_bits - 125)
    values = []
    for exponent, mantissa in itertools.product(
        range(2**n.exponent_bits), range(2**n.mantissa_bits)
    ):
        fraction = mantissa / 2**n.mantissa_bits
        if n.subnormals and exponent == 0:
            values.append(math.ldexp(fraction, lowest))
        else:
            values.append(math.ldexp(1 + fraction, exponent + lowest - bool(n.subnormals)))
    top = 2.0**128 if n.max_value is None else n.max_value
    return np.array([v for v in values if v <= top and v < 2.0**128])


def nearest(n, x):
    """IEEE's rounding of `x` to a format, by search, in float64."""
    values = positive_values(n)
    x = x.astype(np.float64)
    magnitude = np.minimum(np.abs(x), values[-1])
    above = np.minimum(np.searchsorted(values, magnitude), len(values) - 1)
    below = np.maximum(above - 1, 0)
    to_below, to_above = magnitude - values[below], values[above] - magnitude
    # A tie goes to the even code. Without mantissa bits both neighbors end in the same, odd digit
    # (but for zero), and IEEE takes the larger.
    even_below = (below % 2 == 0) if n.mantissa_bits else (values[below] == 0)
    take_below = (to_below < to_above) | ((to_below == to_above) & even_below)
    return np.where(
        np.isnan(x), x, np.copysign(np.where(take_below, values[below], values[above]), x)
    )


def telling(n):
    """float32: values of a format, the middles between them, and what lies just beside those."""
    values = positive_values(n)
    with np.errstate(over="ignore"):
        points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    points = np.unique(points)
    beside = [np.nextafter(points, np.float32(to)) for to in (0, np.inf)]
    points = np.concatenate([points, *beside, np.float32([np.inf])])
    points = points[(points == 0) | (points >= 2.0**-126)]
    return np.concatenate([points, -points])


def assert_same_values_or_nan(found, expected):
    """The same bits, where NaN are as good as each other."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nan)
    np.testing.assert_array_equal(bits(found)[~nan], bits(expected)[~nan])


@st.composite
def formats(draw):
    exponent_bits = draw(st.integers(0, 8))
    mantissa_bits = draw(st.integers(0, 10))
    subnormals = draw(st.booleans())
    hypothesis.assume(exponent_bits + mantissa_bits > 0 or not subnormals)
    min_exponent = draw(st.none() | st.integers(mantissa_bits - 125, 20))
    unlimited = FloatNumerics(exponent_bits, mantissa_bits, subnormals, min_exponent)
    values = positive_values(unlimited)
    max_value = draw(st.none() | st.sampled_from(values[len(values) // 2 :]).filter(bool))
    return FloatNumerics(exponent_bits, mantissa_bits, subnormals, min_exponent, max_value)


@hypothesis.example(n=FloatNumerics(8, 0), x=np.float32([3e38, 1, 0]))
@hypothesis.example(n=FloatNumerics(8, 10), x=np.float32([3e38, 2**-125, 0]))
@hypothesis.example(n=FloatNumerics(0, 0, subnormals=False), x=np.float32([0.0, -0.0, 2]))
@hypothesis.given(n=formats(), x=hnp.arrays(np.float32, 64, elements=st.floats(width=32)))
def test_any_format_rounds_as_its_list_of_values_does(n, x):
    assert n.quant_bound() == positive_values(n)[-1]
    x[np.abs(x) < 2.0**-126] = 0  # XLA takes subnormal float32 for zero
    spread = telling(n)
    spread = spread[np.linspace(0, len(spread) - 1, 192).astype(int)]
    x = np.concatenate([x, spread])
    found = rounded(n, x)
    assert_same_values_or_nan(found, nearest(n, x).astype(np.float32))
    assert_same_values_or_nan(rounded(n, found), found)
    assert_same_values_or_nan(rounded(n, -x), -found)
    ordered = found[np.argsort(x)]
    assert np.all(np.diff(ordered[~np.isnan(ordered)]) >= 0)


@pytest.mark.parametrize("name", HARDWARE)
def test_a_format_that_exists_has_the_values_of_its_dtype(name):
    """The deterministic rounding of every value, saturated: ml_dtypes' cast of the clipped one."""
    n, dtype = HARDWARE[name], np.dtype(getattr(ml_dtypes, name))
    top = float(ml_dtypes.finfo(dtype).max)
    assert n.quant_bound() == top
    for every in (EVERY_BFLOAT16, EVERY_FLOAT16, telling(n)):
        wide = every.astype(np.float32)
        expected = np.clip(wide, -top, top).astype(dtype).astype(every.dtype)
        assert_same_bits(rounded(n, every), expected)


@pytest.mark.parametrize("name", ["float4_e2m1fn", "float8_e4m3fn", "float8_e3m4", "float16"])
def test_values_can_be_stored_in_the_dtype_that_has_them(name):
    n = HARDWARE.get(name, HARDWARE["float8_e5m2"])
    x = telling(n)
    storing = FloatNumerics(
        n.exponent_bits, n.mantissa_bits, max_value=n.max_value, dtype=getattr(jnp, name)
    )
    stored = rounded(storing, x)
    assert stored.dtype == getattr(jnp, name)
    assert_same_bits(stored.astype(np.float32), rounded(n, x))


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", [*SHORT, *LONG])
def test_aqt_formats_have_aqtps_bits(name, stochastic):
    theirs = fp_numerics.FpNumerics(cfg=getattr(fp_numerics, name), stochastic_rounding=stochastic)
    ours = aqt_float(name, stochastic_rounding=stochastic)
    assert ours.quant_bound() == theirs.get_quant_bound()
    x, nan = jnp.asarray(EVERY_BFLOAT16), jnp.full(SIZE, jnp.nan, jnp.bfloat16)
    key = jax.random.PRNGKey(len(name))
    expected = theirs.vjp_fwd(x, aqtp_utils.Context(key=key, train_step=None))[0]
    assert_same_bits(ours.quantize(x, key if stochastic else None), expected)
    assert np.all(np.isnan(ours.quantize(nan, key)))


def test_aqt_formats_round_float32_by_way_of_bfloat16_as_aqtp_does():
    theirs = fp_numerics.FpNumerics(cfg=fp_numerics.e2m1_ocp)
    x = np.concatenate([telling(aqt_float("e2m1_ocp")), np.float32([1.2499, -2.4999, 4.999])])
    x = np.resize(x, SIZE)
    context = aqtp_utils.Context(key=None, train_step=None)
    expected = theirs.vjp_fwd(jnp.asarray(x), context)[0]
    assert_same_bits(jax.jit(aqt_float("e2m1_ocp").quantize)(jnp.asarray(x), None), expected)


def test_the_two_roundings_differ_in_ties():
    x = np.float32([1.25, 5.0, 0.25, 0.75])
    assert rounded(FloatNumerics(2, 1), x).tolist() == [1.0, 4.0, 0.0, 1.0]
    assert rounded(aqt_float("e2m1_ocp"), x).tolist() == [1.5, 6.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fp8_has_aqtps_bits_under_jit_and_without(name, dtype):
    fp8, info = getattr(jnp, name), ml_dtypes.finfo(name)
    ours = Fp8Numerics(dtype=fp8)
    theirs = fp8_numerics.Fp8Numerics(dtype=fp8, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    assert ours.quant_bound() == float(theirs.get_quant_bound()) == float(info.max)
    x = {
        "bfloat16": EVERY_BFLOAT16,
        "float16": EVERY_FLOAT16,
        "float32": np.resize(telling(HARDWARE[name]), SIZE),
    }[dtype]
    x = jnp.asarray(x)
    expected = theirs.vjp_fwd(x, aqtp_utils.Context(key=None, train_step=None))[0]
    assert_same_bits(ours.quantize(x, None), expected)
    # Cast back at once: XLA may then fold the pair of casts away, and must not fold the rounding.
    and_back = jax.jit(lambda x: ours.quantize(x, None).astype(jnp.float32))
    assert_same_bits(and_back(x), np.asarray(expected).astype(np.float32))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_of_infinity_is_the_largest_value_and_nan_stays(name):
    n = Fp8Numerics(dtype=getattr(jnp, name))
    x = np.float32([np.inf, -np.inf, 3e38, -3e38, np.nan])
    for numerics, key in (
        (n, None),
        (Fp8Numerics(n.dtype, stochastic_rounding=True), jax.random.PRNGKey(0)),
    ):
        found = rounded(numerics, x, key).astype(np.float32)
        np.testing.assert_array_equal(found, n.quant_bound() * np.float32([1, -1, 1, -1, np.nan]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "n", [Fp8Numerics(), FloatNumerics(3, 2), FloatNumerics(2, 1, subnormals=False)], ids=repr
)
def test_jit_eager_and_vmap_agree_in_bits(n, dtype):
    # The product comes first because a compiler that fuses it may skip its rounding.
    x, factor = jnp.asarray(np.random.default_rng(0).normal(size=(2, SIZE)), dtype)

    def f(x, factor):
        return n.quantize(x * factor, None)

    eager = f(x, factor)
    assert_same_bits(jax.jit(f)(x, factor), eager)
    assert_same_bits(jax.jit(jax.vmap(f))(x, factor), eager)


STOCHASTIC = {
    "fp8": (Fp8Numerics(stochastic_rounding=True), HARDWARE["float8_e4m3fn"]),
    "e3m2": (FloatNumerics(3, 2, stochastic_rounding=True), FloatNumerics(3, 2)),
    "no zero": (
        FloatNumerics(2, 1, subnormals=False, stochastic_rounding=True),
        FloatNumerics(2, 1, subnormals=False),
    ),
    "e0m3": (FloatNumerics(0, 3, stochastic_rounding=True), FloatNumerics(0, 3)),
    "aqt e2m1": (aqt_float("e2m1", stochastic_rounding=True), FloatNumerics(2, 1, False, 0)),
    "aqt e2m1_ocp": (aqt_float("e2m1_ocp", stochastic_rounding=True), FloatNumerics(2, 1)),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_rounding_ends_at_one_of_the_two_neighbors(name):
    n, listed = STOCHASTIC[name]
    values = positive_values(listed)
    values = np.unique(np.concatenate([-values, values]))
    x = EVERY_BFLOAT16.astype(np.float64)
    inside = np.clip(x, values[0], values[-1])
    above = values[np.minimum(np.searchsorted(values, inside), len(values) - 1)]
    below = values[np.searchsorted(values, inside, side="right") - 1]
    lower, upper = np.zeros(x.shape, bool), np.zeros(x.shape, bool)
    for seed in range(4):
        found = np.asarray(n.quantize(jnp.asarray(EVERY_BFLOAT16), jax.random.PRNGKey(seed)))
        found = found.astype(np.float64)
        assert np.all((found == above) | (found == below))
        lower |= (found == below) & (below < above)
        upper |= (found == above) & (below < above)
    assert np.any(lower)
    assert np.any(upper)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_rounding_is_unbiased(name):
    n, listed = STOCHASTIC[name]
    values = positive_values(listed)
    values = np.unique(np.concatenate([-values, values]))
    for x in (0.0078125, -0.3125, 0.71875, 1.0078125, -1.4921875):
        if abs(x) > values[-1]:
            continue
        key = jax.random.PRNGKey(7)
        found = np.asarray(n.quantize(jnp.full(SIZE, x, jnp.bfloat16), key)).astype(np.float64)
        index = np.searchsorted(values, x)
        low, high = (x, x) if values[index] == x else values[index - 1 : index + 1]
        # Five standard errors of the mean of so many draws of one of two values.
        assert abs(found.mean() - x) <= 5 * np.sqrt((high - x) * (x - low) / found.size)


def test_stochastic_rounding_leaves_values_of_the_format_alone():
    # So many mantissa bits that a value plus nearly a whole step would round to the next value.
    n = FloatNumerics(2, 10, stochastic_rounding=True)
    values = positive_values(n).astype(np.float32)
    x = np.resize(np.concatenate([values, -values]), SIZE)
    for seed in range(4):
        assert_same_bits(rounded(n, x, jax.random.PRNGKey(seed)), x)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_rounding_needs_a_key_and_follows_it(name):
    n, _ = STOCHASTIC[name]
    x = jnp.asarray(np.linspace(-0.9, 0.9, SIZE), jnp.float32)
    assert n.needs_key()
    with pytest.raises(ValueError, match="needs a PRNG key and got none"):
        n.quantize(x, None)
    one, two = jax.random.split(jax.random.PRNGKey(0))
    assert_same_bits(jax.jit(n.quantize)(x, one), n.quantize(x, one))
    assert np.any(bits(n.quantize(x, one)) != bits(n.quantize(x, two)))


def test_float64_is_rounded_once():
    # In float32 this would be the middle between 1 and 1.25, and go to the even 1.
    just_above = 1.125 + 2.0**-40
    with jax.enable_x64(True):
        x = jnp.asarray([just_above, -just_above, np.inf, np.nan, 0.0], jnp.float64)
        found = FloatNumerics(2, 2).quantize(x, None)
        assert found.dtype == jnp.float64
        np.testing.assert_array_equal(found, [1.25, -1.25, 7, np.nan, 0])
        drawn = FloatNumerics(2, 2, stochastic_rounding=True).quantize(x, jax.random.PRNGKey(0))
        assert np.all(np.isin(drawn[:2], [1, 1.25, -1, -1.25]))


@pytest.mark.parametrize(
    ("make", "top"),
    [
        (Fp8Numerics, 448),
        (lambda **kw: Fp8Numerics(jnp.float8_e5m2, **kw), 57344),
        (lambda **kw: FloatNumerics(2, 1, **kw), 6),
        (lambda **kw: aqt_float("e2m1", **kw), 12),
    ],
)
def test_gradients_stop_where_values_were_clipped_if_asked_to(make, top):
    x = jnp.asarray([0, top, np.nextafter(np.float32(top), np.inf), -2 * top, np.inf], jnp.float32)
    assert make().gradient_mask(x) is None
    assert make(clip_gradient=True).gradient_mask(x).tolist() == [True, True, False, False, False]


def test_equal_numerics_are_equal_and_hash_alike():
    spellings = [jnp.float8_e5m2, "float8_e5m2", np.dtype(ml_dtypes.float8_e5m2)]
    assert len({Fp8Numerics(dtype=d) for d in spellings}) == 1
    assert len({FloatNumerics(2, 1, dtype=d) for d in (jnp.bfloat16, "bfloat16")}) == 1
    different = [
        *(Fp8Numerics(), Fp8Numerics(jnp.float8_e5m2), Fp8Numerics(stochastic_rounding=True)),
        *(FloatNumerics(2, 1), FloatNumerics(2, 2), FloatNumerics(2, 1, clip_gradient=True)),
        *(aqt_float("e2m1_ocp"), aqt_float("e2m1")),
    ]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fp8Numerics(jnp.float16), "must be float8_e4m3fn or float8_e5m2, got float16"),
        (lambda: FloatNumerics(9, 2), "`exponent_bits` must be from 0 to 8, got 9"),
        (lambda: FloatNumerics(-1, 2), "`exponent_bits` must be from 0 to 8, got -1"),
        (lambda: FloatNumerics(2, 11), "`mantissa_bits` must be from 0 to 10, got 11"),
        (lambda: FloatNumerics(0, 0), "leave no value but zero"),
        (lambda: FloatNumerics(2, 1, min_exponent=-125), "`min_exponent` must be from -124 to 127"),
        (lambda: FloatNumerics(2, 1, min_exponent=128), "`min_exponent` must be from -124 to 127"),
        (lambda: FloatNumerics(2, 1, max_value=5), "`max_value` must be a value of the format"),
        (lambda: FloatNumerics(2, 1, max_value=8), "at most 6.0, got 8"),
        (lambda: FloatNumerics(2, 1, max_value=0), "`max_value` must be a value of the format"),
        (lambda: FloatNumerics(2, 1, False, 0, 0.5), "`max_value` must be a value of the format"),
        (lambda: FloatNumerics(2, 8, dtype=jnp.bfloat16), "`dtype=bfloat16` cannot hold"),
        (lambda: FloatNumerics(6, 2, dtype=jnp.float16), "`dtype=float16` cannot hold"),
        (lambda: FloatNumerics(2, 1, dtype=jnp.int8), "`dtype=int8` cannot hold"),
        (lambda: FloatNumerics(2, 0, dtype=jnp.float8_e8m0fnu), "`dtype=float8_e8m0fnu` cannot"),
        (lambda: FloatNumerics(2, 8, rounding=FloatRounding.AQT), "rounds to bfloat16 first"),
        (lambda: aqt_float("fp4"), '`name` must look like "e2m1"'),
        (lambda: aqt_float("e2m9"), "rounds to bfloat16 first"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_input_that_cannot_hold_the_values_is_refused():
    with pytest.raises(ValueError, match="`dtype=bfloat16` cannot hold the values"):
        FloatNumerics(2, 8).quantize(jnp.zeros(3, jnp.bfloat16), None)


@pytest.mark.parametrize(("size", "dtype"), [(2, jnp.int2), (3, jnp.int4), (4, jnp.int4)])
def test_integers_fit_the_narrow_integer_dtypes(size, dtype):
    floats = IntNumerics(size, True, False, clip=True, clip_gradient=False, round=True)
    x = jnp.linspace(-9, 9, 145)
    found = jax.jit(dataclasses.replace(floats, dtype=dtype).quantize)(x, None)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found).astype(np.float32), floats.quantize(x, None))
