"""Noise: its values, its bits beside `aqtp`'s, and what sharing it does to rounding."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine.numerics import Centered, IntNumerics, Noise, Uniform
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.in_haste

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the oracle's own, on today's JAX
    from aqt.jax.v2 import stochastic_rounding

SHAPE = (4, 5, 6)
AXES = [(), (1,), (0, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize(
    ("noise", "theirs"),
    [
        (Uniform, stochastic_rounding.JaxUniform),
        (Centered, stochastic_rounding.RandomCenteredUniform),
    ],
)
def test_the_bits_are_aqtps(noise, theirs, axes):
    draw = noise(axes).draw
    for seed in range(3):
        key = jax.random.PRNGKey(seed)
        expected = theirs()(SHAPE, key, axes)
        assert expected.shape == tuple(1 if i in axes else n for i, n in enumerate(SHAPE))
        assert_same_bits(draw(key, SHAPE), expected)


@pytest.mark.parametrize("noise", [Uniform, Centered])
def test_axes_may_be_counted_from_the_end_and_calls_compiled(noise):
    key = jax.random.PRNGKey(0)
    compiled = jax.jit(noise((-1, -3)).draw, static_argnums=1)
    assert_same_bits(compiled(key, SHAPE), noise((2, 0)).draw(key, SHAPE))


def test_centered_noise_is_16_random_bits_and_symmetric():
    key = jax.random.PRNGKey(0)
    found = np.asarray(Centered().draw(key, (2**16,))).astype(np.float64)
    levels = (found + 0.5) * 2**16 - 0.5
    np.testing.assert_array_equal(levels, jax.random.bits(key, (2**16,), jnp.uint16))
    # Both ends, in closed form: 16 bits of zeros and of ones.
    assert np.abs(found).max() <= 0.5 - 2.0**-17
    assert levels.min() < 8
    assert levels.max() > 2**16 - 9


@pytest.mark.slow
@pytest.mark.parametrize("noise", [Uniform(), Centered()], ids=repr)
def test_rounding_with_noise_is_unbiased_and_keeps_whole_numbers(noise):
    n = int_numerics(noise)
    size = 2**16
    for x in (0.25, -1.75, 3.0, 0.5, -7.0):
        found = np.asarray(n.quantize(jnp.full(size, x, jnp.float32), jax.random.PRNGKey(3)))
        low, high = np.floor(x), np.ceil(x)
        # Five standard errors of the mean of so many draws of one of two values.
        assert abs(found.mean() - x) <= 5 * np.sqrt((high - x) * (x - low) / size)
        assert set(found.tolist()) == {low, high}


@pytest.mark.slow
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_where_noise_is_shared_equal_values_round_alike(axes):
    n = int_numerics(Uniform(axes))
    found = np.asarray(n.quantize(jnp.full((4, 5, 64), 0.5), jax.random.PRNGKey(0)))
    for axis, size in enumerate(found.shape):
        alike = np.array_equal(found, found.take([0], axis=axis).repeat(size, axis=axis))
        assert alike == (axis in axes)


def test_equal_noise_is_equal_and_hashes_alike():
    assert Uniform() == Uniform(()) != Centered()
    assert len({Uniform((1,)), Uniform((1,)), Uniform((2,)), Centered((1,)), Uniform()}) == 4


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([0], "must be a tuple of integers"),
        (1, "must be a tuple of integers"),
        ((0.0,), "must be a tuple of integers"),
        ((1, 1), "must name each axis once"),
    ],
)
def test_axes_that_make_no_sense_are_refused(axes, message):
    with pytest.raises(ValueError, match=f"`shared_axes` {message}"):
        Uniform(axes)


@pytest.mark.parametrize("noise", [Uniform, Centered])
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((3,), "do not fit a tensor of 3 dimensions: use axes from -3 to 2"),
        ((-4,), "do not fit a tensor of 3 dimensions"),
        ((2, -1), "name an axis of 3 from both ends"),
    ],
)
def test_axes_that_the_tensor_lacks_are_refused(noise, axes, message):
    with pytest.raises(ValueError, match=message):
        noise(axes).draw(jax.random.PRNGKey(0), SHAPE)


def test_other_noise_can_be_written():
    class Half(Noise):
        def draw(self, key, shape):
            return jnp.full(self.drawn_shape(shape), 0.5, jnp.float32)

    assert int_numerics(Half()).quantize(jnp.asarray([0.25]), jax.random.PRNGKey(0)).tolist() == [1]


def int_numerics(noise):
    return IntNumerics(
        bits=8,
        preserve_zero=True,
        preserve_max_val=False,
        clip=True,
        clip_gradient=False,
        round=True,
        noise_fn=noise,
        dtype=jnp.int8,
    )
