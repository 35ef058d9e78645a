"""Integer numerics and the quantizer, against a NumPy oracle and by their properties."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from aqt_engine import Context
from aqt_engine.calibration import AbsMaxCalibration
from aqt_engine.numerics import IntNumerics, NoNumerics, Uniform
from aqt_engine.qtensor import Scale
from aqt_engine.quantizer import Quantizer
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.in_haste

SHAPE = (6, 8)  # one for all cases: each operation is compiled once
dtypes = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(np.float32, id="float32"),
        pytest.param(ml_dtypes.bfloat16, id="bfloat16", marks=pytest.mark.slow),
        pytest.param(np.float16, id="float16", marks=pytest.mark.slow),
    ],
)
# Bits, preserve_zero, preserve_max_val.
KINDS = [
    (1, False, False),
    (2, True, False),
    (4, True, True),
    (4, False, False),
    (8, True, False),
    (8, True, True),
    (8, False, True),
]
WIDE = [(9, True, False), (16, True, True), (22, True, False), (22, False, False)]


def numerics(bits, preserve_zero=None, preserve_max_val=False, **changes):
    settings = dict(clip=True, clip_gradient=False, round=True)
    return IntNumerics(
        bits=bits,
        preserve_zero=bits > 1 if preserve_zero is None else preserve_zero,
        preserve_max_val=preserve_max_val,
        **(settings | changes),
    )


def quantizer(*kind, **changes):
    return Quantizer(numerics=numerics(*kind), **changes)


@functools.cache
def compiled(*kind, **changes):
    """The jitted quantizer of rows."""
    return compiled_rows(quantizer(*kind, **changes))


def compiled_rows(quantizer):
    return jax.jit(lambda x: quantizer.quant(x, calibration_axes=-1)[0])


@functools.cache
def compiled_gradient(quantizer):
    """What the rows are quantized to, and the gradient for a cotangent."""

    def run(x, cotangent):
        found, gradient = quantizer.quant(x, calibration_axes=-1)
        return found, gradient(cotangent)

    return jax.jit(run)


def quant(x, *kind, **changes):
    """As float64, which holds every bucket exactly."""
    q = compiled(*kind, **changes)(x)
    return np.asarray(q.qvalue, np.float64), np.asarray(q.scale, np.float64)


def last_bucket(bits, preserve_zero):
    return 2.0 ** (bits - 1) - (1.0 if preserve_zero else 0.5)


def oracle(x, scale, bits, preserve_zero):
    """The buckets of `x`, each operation rounded to the dtype of `x`."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = (np.ones_like(scale) / scale).astype(x.dtype)
        inverse = np.where(np.isinf(inverse), np.ones_like(scale), inverse)
        scaled = (x * inverse).astype(x.dtype).astype(np.float64)
    last = last_bucket(bits, preserve_zero)
    scaled = np.clip(scaled, -last, last)
    return np.rint(scaled) if preserve_zero else np.floor(scaled) + 0.5


def groups(dtype=np.float32):
    """Rows of values of very different sizes; no quotient is subnormal, which XLA flushes."""
    if dtype == np.float16:
        elements = st.floats(-6e4, 6e4, width=16)
    else:
        magnitudes = st.floats(2.0**-50, 2.0**50, width=32)
        elements = st.one_of(
            st.just(0.0), magnitudes, magnitudes.map(lambda v: -v), st.floats(-2, 2, width=16)
        )
    arrays = hnp.arrays(np.float32, SHAPE, elements=elements, fill=st.nothing())
    return arrays.map(lambda x: x.astype(dtype))


@dtypes
@hypothesis.given(data=st.data())
def test_equals_the_oracle(dtype, data):
    kind = data.draw(st.sampled_from(KINDS if dtype != np.float32 else KINDS + WIDE))
    x = data.draw(groups(dtype))
    bits, preserve_zero, preserve_max_val = kind
    found = compiled(*kind)(x)
    scale = np.asarray(found.scale)
    assert scale.dtype == np.asarray(found.qvalue).dtype == dtype

    # XLA divides by a constant as it likes: by its reciprocal, for instance.
    bound = last_bucket(bits, preserve_zero) + (0.0 if preserve_max_val else 0.5)
    absmax = np.max(np.abs(x.astype(np.float64)), axis=-1, keepdims=True)
    exact = np.where(absmax == 0, 1, absmax) / bound
    info = ml_dtypes.finfo(dtype)
    ulp = np.maximum(float(info.eps) * exact, float(info.smallest_subnormal))
    assert np.all(np.abs(scale.astype(np.float64) - exact) <= ulp)

    expected = oracle(x, scale, bits, preserve_zero)
    np.testing.assert_array_equal(np.asarray(found.qvalue, np.float64), expected)


@hypothesis.given(kind=st.sampled_from(KINDS + WIDE), x=groups())
def test_within_the_last_bucket_and_half_a_bucket_of_the_value(kind, x):
    q, scale = quant(x, *kind)
    last = last_bucket(*kind[:2])
    assert np.all(np.abs(q) <= last)
    assert np.all(np.mod(q, 1) == (0 if kind[1] else 0.5))
    # The float32 arithmetic of scale and product adds a few of its own roundings.
    absmax = np.max(np.abs(x), axis=-1, keepdims=True).astype(np.float64)
    allowed = scale / 2 + 4 * np.finfo(np.float32).eps * absmax
    assert np.all(np.abs(x - q * scale) <= allowed)


@hypothesis.given(x=groups(), kind=st.sampled_from(KINDS))
def test_idempotent(x, kind):
    once = compiled(*kind)(x)
    twice = _with_scale(*kind)(Scale(once.scale), once.dequant())
    assert_same_bits(once.qvalue, twice.qvalue)
    if kind[1]:  # the largest value is then in the last bucket, and calibrates as before
        again = compiled(*kind)(once.dequant())
        assert_same_bits(once.qvalue, again.qvalue)


@functools.cache
def _with_scale(*kind):
    return jax.jit(lambda scale, x: quantizer(*kind).quant_with(scale, x)[0])


@hypothesis.given(x=groups(), kind=st.sampled_from(KINDS + WIDE))
def test_monotone(x, kind):
    q, _ = quant(np.sort(x, axis=-1), *kind)
    assert np.all(np.diff(q, axis=-1) >= 0)


@hypothesis.given(x=groups(), kind=st.sampled_from([k for k in KINDS + WIDE if k[1]]))
def test_symmetric(x, kind):
    (q, scale), (negated, same) = quant(x, *kind), quant(-x, *kind)
    np.testing.assert_array_equal(negated, -q)
    np.testing.assert_array_equal(same, scale)


@dtypes
@hypothesis.given(data=st.data())
def test_jit_eager_and_vmap_agree_in_bits(dtype, data):
    kind = data.draw(st.sampled_from([(8, True, False), (1, False, False)]))
    x = jnp.asarray(data.draw(groups(dtype)))
    eager, _ = quantizer(*kind).quant(x, calibration_axes=-1)
    mapped = _mapped(*kind)(x)
    for other in (compiled(*kind)(x), mapped):
        assert_same_bits(eager.qvalue, other.qvalue)
        assert_same_bits(eager.scale, other.scale)


@functools.cache
def _mapped(*kind):
    return jax.jit(jax.vmap(lambda row: quantizer(*kind).quant(row, calibration_axes=-1)[0]))


@dtypes
def test_jit_and_eager_agree_in_bits_on_a_single_scale(dtype):
    x = np.random.default_rng(0).normal(size=(50, 1, 5)).astype(dtype)
    for row in x:
        eager = quantizer(8).calibrate(jnp.asarray(row), calibration_axes=-1)
        assert_same_bits(eager.scale, compiled(8)(row).scale)


def test_halves_are_rounded_to_even():
    x = np.arange(-255, 256)[None] / 2  # 127.5 is the bound: the scale is 1
    q, scale = quant(x.astype(np.float32), 8)
    assert scale == 1
    np.testing.assert_array_equal(q, np.clip(np.rint(x), -127, 127))


def test_a_group_of_zeros_is_quantized_to_zeros():
    x = np.zeros(SHAPE, np.float32)
    x[1] = np.arange(8)
    q, scale = quant(x, 8)
    np.testing.assert_array_equal(q[[0, 2, 3, 4, 5]], 0)
    np.testing.assert_array_equal(scale[[0, 2, 3, 4, 5]], np.float32(1 / 127.5))
    np.testing.assert_array_equal(q[1], np.clip(np.rint(np.arange(8) * (127.5 / 7)), 0, 127))


@pytest.mark.parametrize("absmax", [1e-45, 1e-40, 1.2e-38, 1e-37, 1e-36])
def test_a_scale_too_small_to_invert_quantizes_to_zeros(absmax):
    x = np.full(SHAPE, 1.0, np.float32)
    x[2] = np.float32(absmax) * np.linspace(-1, 1, 8, dtype=np.float32)
    q = compiled(8)(x)
    qvalue = np.asarray(q.qvalue)
    np.testing.assert_array_equal(qvalue[2], 0)
    np.testing.assert_array_equal(np.asarray(q.dequant())[2], 0)
    np.testing.assert_array_equal(qvalue[0], 127)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_group_and_no_other(bad):
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    clean = compiled(8)(x)
    spoiled = x.copy()
    spoiled[2, 3] = bad
    q = compiled(8)(spoiled)
    for mine, other in ((q.qvalue, clean.qvalue), (q.scale, clean.scale)):
        assert_same_bits(np.delete(mine, 2, 0), np.delete(other, 2, 0))
    assert not np.isfinite(np.asarray(q.scale)[2]).any()
    assert np.isnan(np.asarray(q.dequant())[2]).all()


def test_one_bit_is_the_sign():
    x = np.asarray([[-3, -1e-9, 0.0, -0.0, 1e-9, 2, 3, 1]], np.float32)
    q, scale = quant(x, 1, False)
    np.testing.assert_array_equal(q, [[-0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    assert scale == 3


def test_without_clip_values_leave_the_last_bucket_and_without_round_their_centre():
    x = np.asarray([[127.5, -60.3, 1.2, 0.0]], np.float32)
    half = AbsMaxCalibration(clipping_scale=0.5)

    def buckets(**changes):
        q = Quantizer(numerics=numerics(8, **changes), calibration=half)
        return np.asarray(compiled_rows(q)(x).qvalue)[0]

    np.testing.assert_array_equal(buckets(), [127, -121, 2, 0])
    np.testing.assert_array_equal(buckets(clip=False), [255, -121, 2, 0])
    np.testing.assert_allclose(buckets(round=False), [127.5, -120.6, 2.4, 0], rtol=1e-6)


@pytest.mark.slow
@hypothesis.given(x=groups(), clipping_scale=st.sampled_from([0.25, 1.0]))
def test_clip_gradient_stops_the_gradient_where_a_value_is_clipped(x, clipping_scale):
    calibration = AbsMaxCalibration(clipping_scale)
    clipping = Quantizer(numerics=numerics(8, clip_gradient=True), calibration=calibration)
    cotangent = np.arange(1, 1 + x.size, dtype=np.float32).reshape(x.shape)
    found, gradient = compiled_gradient(clipping)(x, cotangent)
    inside = np.abs(x * (1 / np.asarray(found.scale))) <= 127
    np.testing.assert_array_equal(gradient, np.where(inside, cotangent, 0))
    _, straight = compiled_gradient(quantizer(8))(x, cotangent)
    np.testing.assert_array_equal(straight, cotangent)


def test_the_gradient_passes_at_the_last_centre_and_stops_beyond():
    x = np.float32([[127.5, 127.25, 127, 126.5, 0, -127, -127.25, -127.5]])  # the scale is 1
    q = Quantizer(numerics=numerics(8, clip_gradient=True))
    _, gradient = compiled_gradient(q)(x, np.ones_like(x))
    np.testing.assert_array_equal(gradient, [[0, 0, 1, 1, 1, 1, 0, 0]])


def test_scale_stop_grad():
    def total(x, stop):
        q = quantizer(8, scale_stop_grad=stop)
        return sum(jnp.sum(v) for v in jax.tree.leaves(q.calibrate(x, calibration_axes=-1)))

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    x = np.float32([[1.0, -3.0, 2.0]])
    np.testing.assert_array_equal(gradient(x, True), [[0, 0, 0]])
    np.testing.assert_allclose(gradient(x, False), [[0, -1 / 127.5, 0]], rtol=1e-6)


@pytest.mark.slow
def test_stochastic_rounding_is_unbiased():
    values = np.float32([-126.4, -3.0, -0.75, -0.01, 0.0, 0.5, 1.25, 20.9, 126.49])
    count = 20_000
    stochastic = numerics(8, noise_fn=Uniform())
    each = jax.vmap(lambda key: stochastic.quantize(jnp.asarray(values), key))
    draw = jax.jit(lambda key: each(jax.random.split(key, count)))
    draws = np.asarray(draw(jax.random.key(0)), np.float64)
    x = np.asarray(values, np.float64)
    assert np.all((draws == np.floor(x)) | (draws == np.ceil(x)))
    share = x - np.floor(x)
    deviation = np.sqrt(share * (1 - share) / count)
    assert np.all(np.abs(draws.mean(axis=0) - x) <= 4 * deviation + 1e-6)
    # Each value is rounded by noise of its own.
    half = draws[:, 5] - 0.5
    assert abs(np.mean(half * (draws[:, 6] - 1.25))) < 4 * np.sqrt(0.25 * 0.1875 / count)


def test_stochastic_rounding_repeats_with_its_key_and_stays_in_the_last_bucket():
    x = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))

    @jax.jit
    def draw(seed):
        context = Context(key=jax.random.key(seed))
        q = Quantizer(numerics=numerics(8, noise_fn=Uniform()), context=context)
        return q.quant(x, calibration_axes=-1)[0].qvalue

    draws = [np.asarray(draw(seed)) for seed in range(10)]
    assert_same_bits(draws[1], draw(1))
    assert np.any(draws[1] != draws[2])
    assert max(np.abs(x).max() for x in draws) == 127


def test_stochastic_rounding_needs_a_key():
    q = Quantizer(numerics=numerics(8, noise_fn=Uniform()))
    with pytest.raises(ValueError, match="needs a PRNG key and got none"):
        q.quant(jnp.ones(SHAPE), calibration_axes=-1)


@pytest.mark.parametrize(
    ("bits", "changes", "message"),
    [
        (0, {}, "`bits` must be from 1 to 22, got 0"),
        (-8, {}, "`bits` must be from 1 to 22, got -8"),
        (23, {}, "`bits` must be from 1 to 22, got 23"),
        (1, {"preserve_zero": True}, "one bit has no bucket left beside zero"),
        (9, {"dtype": jnp.int8}, "`dtype=int8` cannot hold 9-bit buckets"),
        (5, {"dtype": jnp.int4}, "`dtype=int4` cannot hold 5-bit buckets"),
        (8, {"dtype": jnp.int8, "preserve_zero": False}, "holds whole numbers only"),
        (8, {"dtype": jnp.int8, "round": False}, "holds whole numbers only"),
        (8, {"dtype": jnp.int8, "clip": False}, "holds whole numbers only"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(bits, changes, message):
    with pytest.raises(ValueError, match=message):
        numerics(bits, **changes)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bool_, jnp.float8_e4m3fn])
def test_a_dtype_that_cannot_hold_the_buckets_is_refused(dtype):
    with pytest.raises(ValueError, match="cannot hold"):
        numerics(8, dtype=dtype)


def test_bits_are_whole():
    with pytest.raises((TypeError, ValueError), match="`bits`"):
        numerics(8.5)


@pytest.mark.parametrize(("bits", "dtype"), [(2, jnp.int4), (4, jnp.int4), (8, jnp.int8)])
def test_stored_dtype_changes_no_value(bits, dtype):
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    stored = compiled_rows(Quantizer(numerics=numerics(bits, dtype=dtype)))(x)
    floats = compiled(bits)(x)
    assert stored.qvalue.dtype == dtype
    np.testing.assert_array_equal(np.asarray(stored.qvalue).astype(np.float32), floats.qvalue)
    # Not in bits: integers have one zero, floats two.
    np.testing.assert_array_equal(stored.dequant(), floats.dequant())


@hypothesis.given(x=groups())
def test_po2_scales_are_rounded_up_to_powers_of_two(x):
    _, plain = quant(x, 8)
    q, scale = quant(x, 8, po2_scale=True)
    mantissa, _ = np.frexp(scale)
    assert np.all(mantissa == 0.5)
    assert np.all((plain <= scale) & (scale <= 2 * plain))
    # x * (1 / scale) is then exact.
    np.testing.assert_array_equal(q, np.clip(np.rint(np.float64(x) / scale), -127, 127))


def test_po2_keeps_a_scale_that_is_a_power_of_two():
    exponents = np.arange(-60, 60)
    x = np.ldexp(np.float32(127.5), exponents)[:, None].astype(np.float32)
    _, scale = quant(x, 8, po2_scale=True)
    np.testing.assert_array_equal(scale[:, 0], np.ldexp(1.0, exponents))


@pytest.mark.parametrize(
    ("own", "given", "shape"),
    [
        (None, 1, (2, 1, 4)),
        (None, (0, -1), (1, 3, 1)),
        (0, 1, (1, 3, 4)),
        ((-1, 0), 1, (1, 3, 1)),
        ("per_tensor", 1, (1, 1, 1)),
        ((), 1, (2, 3, 4)),
    ],
)
def test_axes_that_share_a_scale(own, given, shape):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    rows = quantizer(8, calib_shared_axes=own)
    found = jax.jit(functools.partial(rows.calibrate, calibration_axes=given))(x)
    axes = tuple(i for i, size in enumerate(shape) if size == 1)
    assert found.scale.shape == shape
    absmax = np.max(np.abs(x), axis=axes, keepdims=True)
    np.testing.assert_allclose(found.scale, absmax / 127.5, rtol=2e-7)


@pytest.mark.parametrize("axes", [2, -3, (0, 5)])
def test_axes_out_of_range_are_refused(axes):
    with pytest.raises(ValueError, match="do not fit a tensor of 2 dimensions"):
        quantizer(8).quant(jnp.ones(SHAPE), calibration_axes=axes)


def test_an_unknown_name_of_axes_is_refused():
    with pytest.raises(ValueError, match="axes or \"per_tensor\", got 'per_channel'"):
        quantizer(8, calib_shared_axes="per_channel").quant(jnp.ones(SHAPE), calibration_axes=0)


def test_no_numerics_leaves_the_tensor_as_it_is():
    x = jnp.asarray([1.5, -2.25])
    found, gradient = Quantizer(numerics=NoNumerics()).quant(x, calibration_axes=0)
    assert found.scale is None
    assert_same_bits(found.dequant(), x)
    assert_same_bits(gradient(x), x)
    with pytest.raises(ValueError, match="no scale"):
        Quantizer(numerics=NoNumerics()).calibrate(x, calibration_axes=0)
