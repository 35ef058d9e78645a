"""Calibrations: what bound, scale and bias they give, and that compiling changes no bit of them."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import Quantizer, config
from aqt_engine.calibration import (
    AbsMaxCalibration,
    AbsMeanCalibration,
    ConstantCalibration,
    MinMaxCalibration,
    MseCalibration,
    PercentileCalibration,
    SnrCalibration,
)
from aqt_engine.numerics import Uniform
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.in_haste

INT8 = config.int_numerics(8)
INT4 = config.int_numerics(4)
ALL = [
    AbsMaxCalibration(),
    AbsMaxCalibration(0.7),
    AbsMeanCalibration(3.0),
    ConstantCalibration(2.7, 0.3),
    PercentileCalibration(90.0),
    SnrCalibration((1.0, 0.8, 0.5)),
    MseCalibration(2.4),
    MinMaxCalibration(),
]


def values(shape=(16, 24), seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=shape)), dtype)


@functools.cache
def compiled(quantizer, axis):
    return jax.jit(functools.partial(quantizer.calibrate, calibration_axes=axis))


def quant(quantizer, x, axis):
    return jax.jit(lambda x: quantizer.quant(x, calibration_axes=axis)[0])(x)


# Eager, a search compiles each of its operations.
SEARCHES = (SnrCalibration, MseCalibration)


def one_by_one(calibrations):
    return pytest.mark.parametrize(
        "calibration",
        [
            pytest.param(c, marks=[pytest.mark.slow] if isinstance(c, SEARCHES) else [])
            for c in calibrations
        ],
        ids=repr,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@one_by_one(ALL)
def test_scales_are_positive_and_the_same_compiled(calibration, dtype):
    quantizer = Quantizer(INT8, calibration=calibration)
    for seed in range(3):
        x = values(seed=seed, dtype=dtype)
        eager = quantizer.calibrate(x, calibration_axes=0)
        assert eager.scale.shape == (1, 24)
        assert eager.scale.dtype == dtype
        assert (np.asarray(eager.scale) > 0).all()
        for found, expected in zip(
            jax.tree.leaves(compiled(quantizer, 0)(x)), jax.tree.leaves(eager), strict=True
        ):
            assert_same_bits(found, expected)


# A mean of many values is summed in another order when it is compiled.
@one_by_one(c for c in ALL if not isinstance(c, AbsMeanCalibration))
def test_a_scale_for_the_whole_tensor_is_the_same_compiled(calibration):
    # XLA treats tensors of one value apart.
    quantizer = Quantizer(INT8, calib_shared_axes="per_tensor", calibration=calibration)
    x = values()
    eager = quantizer.calibrate(x, calibration_axes=0)
    assert eager.scale.shape == (1, 1)
    assert_same_bits(compiled(quantizer, 0)(x).scale, eager.scale)


@one_by_one(ALL)
def test_zeros_stay_zeros(calibration):
    q = quant(Quantizer(INT8, calibration=calibration), np.zeros((3, 4), np.float32), 1)
    assert np.isfinite(q.scale).all()
    if calibration != ConstantCalibration(2.7, 0.3):  # whose zero lies between two buckets
        assert (np.asarray(q.dequant()) == 0).all()


def test_absmax_of_a_large_tensor_is_one_product():
    x = values()
    scale = compiled(Quantizer(INT8), 0)(x).scale
    assert_same_bits(scale, np.abs(x).max(0, keepdims=True) * np.float32(1 / 127.5))


def test_mean_leaves_zeros_out():
    x = jnp.asarray([[1.0, 0.0, 3.0, 0.0]])
    bound = AbsMeanCalibration(2.0).bound(x, (1,), INT8)
    assert bound.tolist() == [[4.0]]
    bound = AbsMeanCalibration(1.0, p=2.0).bound(x, (1,), INT8)
    np.testing.assert_allclose(bound, [[np.sqrt(5.0)]], rtol=1e-6)


@pytest.mark.parametrize(("percentile", "expected"), [(100, 10), (90, 9), (50, 5), (10, 1)])
def test_percentile_is_one_of_the_values(percentile, expected):
    x = jnp.arange(1.0, 11.0)[None] * jnp.asarray([[1, -1] * 5])
    found = PercentileCalibration(percentile).bound(x, (1,), INT8)
    assert found.tolist() in (
        [[expected]],
        [[expected + 1]],
    )
    assert (np.abs(x) <= found).mean() >= percentile / 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("calibration", "error"),
    [
        (SnrCalibration((1.0, 0.8, 0.6, 0.4)), lambda e: (e**2).sum(1)),
        (MseCalibration(2.0, (1.0, 0.8, 0.6, 0.4)), lambda e: (e**2).sum(1)),
        (MseCalibration(1.0, (1.0, 0.8, 0.6, 0.4)), lambda e: np.abs(e).sum(1)),
    ],
)
def test_a_search_finds_the_best_of_its_candidates(calibration, error):
    x = values((32, 200), seed=3)

    def error_with(candidate):
        quantizer = Quantizer(INT4, calibration=candidate)
        return error(np.asarray(x) - np.asarray(quant(quantizer, x, 1).dequant()))

    each = [error_with(AbsMaxCalibration(c)) for c in (1.0, 0.8, 0.6, 0.4)]
    np.testing.assert_allclose(error_with(calibration), np.min(each, axis=0), rtol=1e-4)
    assert len(set(np.argmin(each, axis=0))) > 1  # else any constant would pass


def test_a_search_refuses_noise():
    noisy = Quantizer(config.int_numerics(8, noise_fn=Uniform()), calibration=SnrCalibration())
    with pytest.raises(ValueError, match="stochastic rounding"):
        noisy.calibrate(values(), calibration_axes=0)


@jax.jit
def asymmetric_rows(x):
    return Quantizer(INT8, calibration=MinMaxCalibration()).quant(x, calibration_axes=1)[0]


@hypothesis.given(
    hnp.arrays(
        np.float32,
        (4, 9),
        elements=st.floats(-100, 100, width=32).map(lambda v: v if abs(v) > 1e-6 else 0.0),
    )
)
def test_a_zero_point_keeps_zero_and_the_range(x):
    with_zero = np.concatenate([x, np.zeros((4, 1), np.float32)], axis=1)
    q = asymmetric_rows(with_zero)
    back = np.asarray(q.dequant())
    assert (back[:, -1] == 0).all()
    # Half a bucket for rounding, and half for the zero point, which is rounded too.
    assert (np.abs(back - with_zero) <= np.asarray(q.scale) * 1.01).all()


def test_asymmetric_values_use_all_buckets():
    x = np.abs(values((1, 1000)))
    symmetric, asymmetric = quant(Quantizer(INT8), x, 1), asymmetric_rows(x)
    assert np.min(symmetric.qvalue) == 0
    assert np.min(asymmetric.qvalue) < -120
    assert asymmetric.scale.item() < 0.51 * symmetric.scale.item()


def test_scale_dtype():
    x = values(dtype=jnp.bfloat16)
    q = quant(Quantizer(INT8, scale_dtype=jnp.float32), x, 0)
    assert q.scale.dtype == jnp.float32
    assert q.dequant().dtype == jnp.bfloat16


@pytest.mark.parametrize("bound", [0.3, 1.0, 3.0])
def test_powers_of_two_are_the_next_above(bound):
    quantizer = Quantizer(INT8, calibration=ConstantCalibration(bound), po2_scale=True)
    scale = np.asarray(compiled(quantizer, 0)(values()).scale)
    assert set(np.frexp(scale)[0].ravel()) == {0.5}
    assert (scale >= bound / 127.5).all()
    assert (scale < 2 * bound / 127.5).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: AbsMaxCalibration(0.0),
        lambda: AbsMaxCalibration(float("nan")),
        lambda: AbsMeanCalibration(-1.0),
        lambda: AbsMeanCalibration(1.0, p=0.0),
        lambda: ConstantCalibration(0.0),
        lambda: ConstantCalibration(1.0, float("inf")),
        lambda: PercentileCalibration(0.0),
        lambda: PercentileCalibration(100.5),
        lambda: SnrCalibration(()),
        lambda: SnrCalibration((1.0, -0.5)),
        lambda: MseCalibration(0.0),
    ],
)
def test_contradictions_are_refused_at_construction(make):
    with pytest.raises(ValueError, match=r"must (be|hold)"):
        make()


def test_the_axes_that_share_a_scale_are_given_by_either_side():
    x = values()
    own = Quantizer(INT8, 1).calibrate(x)
    of_the_call = Quantizer(INT8).calibrate(x, 1)
    assert_same_bits(own.scale, of_the_call.scale)
    with pytest.raises(ValueError, match="no axes share a scale"):
        Quantizer(INT8).quant(x)
    with pytest.raises(ValueError, match="do not fit a tensor of 2 dimensions"):
        Quantizer(INT8).quant(x, 2)
