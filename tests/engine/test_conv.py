"""Quantized convolution: its integers against NumPy, its gradients against those in float."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from aqt_engine import Context, DotGeneral, config
from aqt_engine.calibration import MinMaxCalibration
from aqt_engine.config import Tensor
from aqt_engine.ops import conv_general_dilated
from aqt_engine.ops.conv import quantize_rhs
from aqt_engine.ops.windows import ConvAxes
from engine.contractions import assert_same_bits

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]

INT8 = config.config_v4(8, None, None)
NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
CASES = {
    "plain": ((2, 7, 6, 3), (3, 2, 3, 4), {"window_strides": (1, 1), "padding": "VALID"}),
    "same": ((2, 7, 6, 3), (3, 3, 3, 4), {"window_strides": (2, 1), "padding": "SAME"}),
    "explicit": (
        (2, 7, 6, 3),
        (3, 2, 3, 4),
        {"window_strides": (2, 3), "padding": ((2, 1), (0, 3))},
    ),
    "negative": (
        (2, 7, 6, 3),
        (2, 2, 3, 4),
        {"window_strides": (1, 1), "padding": ((-1, 0), (0, -1))},
    ),
    "dilated": (
        (2, 9, 8, 3),
        (3, 2, 3, 4),
        {"window_strides": (2, 1), "padding": ((1, 1), (0, 0)), "rhs_dilation": (2, 3)},
    ),
    "transposed": (
        (2, 5, 4, 3),
        (3, 3, 3, 4),
        {"window_strides": (1, 1), "padding": ((1, 1), (2, 1)), "lhs_dilation": (2, 3)},
    ),
    "groups": (
        (2, 6, 5, 6),
        (3, 2, 2, 9),
        {"window_strides": (1, 2), "padding": "SAME", "feature_group_count": 3},
    ),
    "depthwise": (
        (2, 6, 5, 4),
        (3, 3, 1, 8),
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4},
    ),
    "batch groups": (
        (6, 5, 4, 3),
        (3, 2, 3, 4),
        {"window_strides": (1, 2), "padding": "SAME", "batch_group_count": 2},
    ),
    "pointwise": ((2, 4, 4, 5), (1, 1, 5, 3), {"window_strides": (1, 1), "padding": "VALID"}),
}


def operands(lhs, rhs, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s), np.float32) for s in (lhs, rhs))


def in_float(lhs, rhs, numbers=NHWC, **arguments):
    return lax.conv_general_dilated(
        lhs, rhs, dimension_numbers=numbers, precision=lax.Precision.HIGHEST, **arguments
    )


def quantized(x, axes):
    absmax = np.abs(np.asarray(x)).max(axis=axes, keepdims=True)
    scale = absmax * np.float32(1 / 127.5)
    return np.round(np.clip(np.asarray(x) * (np.float32(1) / scale), -127, 127)), scale


@pytest.fixture
def case(request):
    lhs, rhs, arguments = CASES[request.param]
    return *operands(lhs, rhs), arguments


def of_cases(*short):
    """These of the cases; the others in the long form alone."""
    marked = [pytest.param(c, marks=() if c in short else pytest.mark.long) for c in CASES]
    return pytest.mark.parametrize("case", marked, indirect=True)


@of_cases(*CASES)
def test_forward_is_the_integer_convolution_times_both_scales(case):
    lhs, rhs, arguments = case
    (ql, sl), (qr, sr) = quantized(lhs, (1, 2, 3)), quantized(rhs, (0, 1, 2))
    if arguments.get("batch_group_count", 1) > 1:
        # A group of output channels sums a group of examples.
        sl = np.repeat(np.concatenate(np.split(sl, 2), axis=-1), 2, axis=-1)
    # Sums this small are exact in float32.
    total = np.asarray(in_float(jnp.asarray(ql), jnp.asarray(qr), **arguments))
    assert np.abs(total).max() < 2**24
    convolve = functools.partial(
        conv_general_dilated, dimension_numbers=NHWC, config=INT8, **arguments
    )
    assert_same_bits(jax.jit(convolve)(lhs, rhs), total * sl * sr)
    if arguments == CASES["groups"][2]:
        assert_same_bits(convolve(lhs, rhs), total * sl * sr)


@pytest.mark.parametrize("layout", ["NCHW", pytest.param("HWNC", marks=pytest.mark.long)])
def test_layouts(layout):
    lhs, rhs = operands((2, 7, 6, 3), (3, 2, 3, 4))
    arguments = {"window_strides": (2, 1), "padding": "SAME"}
    convolve = functools.partial(conv_general_dilated, config=INT8, **arguments)
    expected = jax.jit(functools.partial(convolve, dimension_numbers=NHWC))(lhs, rhs)
    order = ["NHWC".index(c) for c in layout]
    in_layout = functools.partial(convolve, dimension_numbers=(layout, "OIHW", layout))
    found = jax.jit(in_layout)(jnp.transpose(lhs, order), jnp.transpose(rhs, (3, 2, 0, 1)))
    assert_same_bits(jnp.transpose(found, np.argsort(order)), expected)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    lhs, rhs = operands((2, *(5, 4, 3)[:rank], 3), (*(2, 2, 2)[:rank], 3, 4))
    letters = "DHW"[:rank]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    convolve = functools.partial(
        conv_general_dilated,
        window_strides=(1,) * rank,
        padding="SAME",
        dimension_numbers=numbers,
        config=INT8,
    )
    found = jax.jit(convolve)(lhs, rhs)
    expected = in_float(lhs, rhs, numbers, window_strides=(1,) * rank, padding="SAME")
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.15


def uncompiled_gradients(function, lhs, rhs):
    out, vjp = jax.vjp(function, lhs, rhs)
    g = jnp.asarray(np.random.default_rng(9).normal(size=out.shape), np.float32)
    return vjp(g)


def gradients(function, lhs, rhs):
    """Compiled whole: a compilation for each operation would take five times as long."""
    return jax.jit(functools.partial(uncompiled_gradients, function))(lhs, rhs)


@of_cases("same", "batch groups")
def test_unquantized_gradients_are_those_in_float(case):
    lhs, rhs, arguments = case
    ours = functools.partial(conv_general_dilated, dimension_numbers=NHWC, **arguments)
    expected = gradients(functools.partial(in_float, **arguments), lhs, rhs)
    for c in (DotGeneral(), INT8):  # the forward's rounding is passed straight through
        for found, exact in zip(
            gradients(functools.partial(ours, config=c), lhs, rhs), expected, strict=True
        ):
            np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)


# Each case with one of the two, in turn, and in the long form with both.
@pytest.mark.parametrize(
    ("case", "use_fwd_quant"),
    [
        pytest.param(case, fwd, marks=() if (i + fwd) % 2 else pytest.mark.long)
        for i, case in enumerate(CASES)
        for fwd in (False, True)
    ],
    indirect=["case"],
)
def test_quantized_gradients_are_near_those_in_float(case, use_fwd_quant):
    lhs, rhs, arguments = case
    c = config.fully_quantized(8, 8, use_fwd_quant, False)
    ours = functools.partial(conv_general_dilated, dimension_numbers=NHWC, config=c, **arguments)
    expected = gradients(functools.partial(in_float, **arguments), lhs, rhs)
    for found, exact in zip(gradients(ours, lhs, rhs), expected, strict=True):
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 0.03


def fake_quantized(x, axes):
    q, scale = quantized(x, axes)
    return jnp.asarray(q * scale)


@of_cases("explicit", "groups", "batch groups")
def test_quantized_gradients_are_those_of_quantized_operands(case):
    lhs, rhs, arguments = case
    c = config.config_v4(None, 8, 8, use_stochastic_rounding=False)
    ours = functools.partial(conv_general_dilated, dimension_numbers=NHWC, config=c, **arguments)
    dlhs, drhs = gradients(ours, lhs, rhs)
    out = jax.eval_shape(ours, lhs, rhs)
    g = jnp.asarray(np.random.default_rng(9).normal(size=out.shape), np.float32)
    reference = functools.partial(in_float, **arguments)
    # Groups have scales of their own.
    groups = arguments.get("feature_group_count", 1) * arguments.get("batch_group_count", 1)
    kernel = fake_quantized(rhs.reshape(*rhs.shape[:-1], groups, -1), (0, 1, 4)).reshape(rhs.shape)
    grouped = g.reshape(*g.shape[:-1], groups, -1)
    quantized_g = fake_quantized(grouped, (1, 2, 4)).reshape(g.shape)
    exact = jax.vjp(lambda x: reference(x, kernel), lhs)[1](quantized_g)[0]
    np.testing.assert_allclose(dlhs, exact, rtol=1e-4, atol=1e-4)
    parts = jnp.split(lhs, arguments.get("batch_group_count", 1))
    image = jnp.concatenate([fake_quantized(part, (0, 1, 2)) for part in parts])
    exact = jax.vjp(lambda w: reference(image, w), rhs)[1](fake_quantized(g, (0, 1, 2)))[0]
    np.testing.assert_allclose(drhs, exact, rtol=1e-4, atol=1e-4)


def test_a_stored_kernel_gives_the_same_bits_in_its_own_layout():
    lhs, rhs = operands((2, 3, 7, 6), (4, 3, 3, 2))
    convolve = functools.partial(
        conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=NCHW,
        config=INT8,
    )
    axes = ConvAxes.parse(lhs.shape, rhs.shape, (1, 1), "SAME", None, None, NCHW, 1, 1)
    stored = quantize_rhs(rhs, axes, config=INT8)
    assert stored.scale.shape == (4, 1, 1, 1)
    compiled = jax.jit(convolve)
    assert_same_bits(compiled(lhs, stored), compiled(lhs, rhs))
    with pytest.raises(TypeError, match="stored QTensor has no gradient"):
        jax.grad(lambda x: convolve(x, stored).sum())(lhs)


def test_stochastic_rounding_draws_with_the_key():
    lhs, rhs = operands(*CASES["same"][:2])
    c = config.fully_quantized()
    convolve = functools.partial(
        conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC
    )

    @jax.jit
    def run(key):
        convolution = functools.partial(convolve, config=c, context=Context(key=key))
        return uncompiled_gradients(convolution, lhs, rhs)

    first, again, other = (run(jax.random.key(s)) for s in (0, 0, 1))
    assert_same_bits(first[0], again[0])
    assert (first[0] != other[0]).any()
    with pytest.raises(ValueError, match="needs a PRNG key"):
        run(None)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("transform", [lambda f: f, jax.checkpoint], ids=["jit", "remat"])
def test_gradients_under_transformations(transform):
    lhs, rhs = operands(*CASES["same"][:2])
    c = config.fully_quantized(use_stochastic_rounding=False)
    convolve = functools.partial(
        conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=NHWC,
        config=c,
    )
    for found, expected in zip(
        gradients(transform(convolve), lhs, rhs),
        uncompiled_gradients(convolve, lhs, rhs),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@of_cases("same", "negative", "transposed", "depthwise", "batch groups")
def test_zero_points_do_not_leak_into_the_padding(case):
    lhs, rhs, arguments = case
    lhs, rhs = lhs + 1.5, rhs - 0.5
    c = INT8
    dequantized = [lhs, rhs]
    for side in ("lhs", "rhs"):
        c = config.update(c, f"fwd.{side}", calibration=MinMaxCalibration())
    for i, (tensor, axes) in enumerate(((c.fwd.lhs, (1, 2, 3)), (c.fwd.rhs, (0, 1, 2)))):
        quantizer = tensor.quantizer(None)
        rounded = jax.jit(lambda x, q=quantizer, axes=axes: q.quant(x, axes)[0].dequant())
        dequantized[i] = rounded(dequantized[i])
    convolve = functools.partial(
        conv_general_dilated, dimension_numbers=NHWC, config=c, **arguments
    )
    found = jax.jit(convolve)(lhs, rhs)
    expected = in_float(*dequantized, **arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_kernel_gradient_longer_than_int32_is_summed_in_parts():
    # 16 x 100 x 100 products of up to 127 x 127 are more than int32 holds.
    lhs, rhs = operands((16, 100, 100, 1), (1, 1, 1, 2))
    c = config.config_v4(None, None, 8, use_stochastic_rounding=False)
    found = gradients(
        lambda x, w: conv_general_dilated(x, w, (1, 1), "SAME", None, None, NHWC, config=c),
        jnp.abs(lhs),
        rhs,
    )[1]
    exact = gradients(
        lambda x, w: in_float(x, w, window_strides=(1, 1), padding="SAME"), jnp.abs(lhs), rhs
    )[1]
    np.testing.assert_allclose(found, exact, rtol=0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the oracle's own
def test_forward_equals_aqtp():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own, on today's JAX
        from aqt.jax.v2 import aqt_conv_general

        theirs = aqt_conv_general.make_conv_general_dilated(
            aqt_conv_general.conv_general_dilated_make(2, 8, 8)
        )
    for name in ("same", "explicit"):
        lhs, rhs, arguments = CASES[name]
        lhs, rhs = operands(lhs, rhs, seed=5)
        convolve = functools.partial(
            conv_general_dilated, dimension_numbers=NHWC, config=INT8, **arguments
        )
        found = jax.jit(convolve)(lhs, rhs)
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC)
        assert_same_bits(found, theirs(lhs, rhs, dimension_numbers=numbers, **arguments))


def test_what_it_cannot_do_is_refused():
    lhs, rhs = operands(*CASES["plain"][:2])
    convolve = functools.partial(
        conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=NHWC
    )
    sharded = config.update(INT8, "dlhs", local_aqt=config.LocalAqt(contraction_axis_shard_count=2))
    other = config.DotGeneral(
        fwd=config.DotGeneralRaw(
            rhs=dataclasses.replace(
                config.int_tensor(8),
                dequant_mode=config.DequantMode.OTHER_INPUT,
                calibration_mode=config.CalibrationMode.ALL_AXES,
            ),
            lhs=Tensor(),
        )
    )
    for c, message in ((sharded, "local_aqt"), (other, "OTHER_INPUT")):
        with pytest.raises(ValueError, match=message):
            convolve(lhs, rhs, config=c)
    with pytest.raises(TypeError, match="`lhs` has dtype"):
        convolve(lhs.astype(np.int8), rhs, config=INT8)
    with pytest.raises(ValueError, match="batch_group_count"):
        convolve(lhs, rhs, batch_group_count=3, config=INT8)
    with pytest.raises(ValueError, match="could overflow"):
        jax.eval_shape(
            functools.partial(convolve, config=INT8),
            jax.ShapeDtypeStruct((1, 3, 3, 20_000), np.float32),
            jax.ShapeDtypeStruct((3, 3, 20_000, 1), np.float32),
        )
