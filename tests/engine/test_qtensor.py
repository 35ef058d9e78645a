"""Parts of quantized tensors, and a quantized cache of keys and values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import QTensor, Quantizer, config, einsum
from aqt_engine.calibration import MinMaxCalibration
from aqt_engine.qtensor import dynamic_slice, dynamic_update_slice
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.in_haste

BATCH, LENGTH, HEADS, DEPTH = 2, 6, 3, 8
INT8 = Quantizer(config.int_numerics(8))
ASYMMETRIC = Quantizer(config.int_numerics(8), calibration=MinMaxCalibration())


def quantized(shape=(4, 6, 5), axes=(1,), seed=0, quantizer=INT8):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jax.jit(lambda x: quantizer.quant(x, axes)[0])(x)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(1,), (0, 2)])
@pytest.mark.parametrize(
    "index",
    [
        2,
        (0, slice(2, 5), 1),
        np.asarray([3, 0]),
        *(
            pytest.param(index, marks=pytest.mark.slow)
            for index in (-1, slice(1, 3), (1, 4), (slice(None), 3))
        ),
    ],
    ids=str,
)
def test_a_part_dequantizes_to_the_part(index, axes):
    q = _asymmetric(axes)
    assert q.bias is not None
    # Not compiled with it: the product and the difference would be rounded at once.
    part = jax.jit(lambda q: q[index])(q)
    assert_same_bits(part.dequant(), np.asarray(q.dequant())[index])


@functools.cache
def _asymmetric(axes):
    return quantized(axes=axes, quantizer=ASYMMETRIC)


def test_a_part_under_jit_and_out_of_axes():
    q = quantized()
    assert_same_bits(jax.jit(lambda q, i: q[i].dequant())(q, 2), np.asarray(q.dequant())[2])
    with pytest.raises(IndexError, match="4 indices for a QTensor of 3 dimensions"):
        q[0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(1,), (0, 2), (2,)])
def test_a_dynamic_slice_and_its_update(axes):
    q = quantized(axes=axes)
    part = dynamic_slice(q, (1, 2, 3), (2, 3, 2))
    expected = jax.lax.dynamic_slice(q.dequant(), (1, 2, 3), (2, 3, 2))
    assert_same_bits(part.dequant(), expected)
    # Whole where scales are shared.
    shape = tuple(n if a in axes else 2 for a, n in enumerate(q.shape))
    start = tuple(0 if a in axes else 1 for a in range(3))
    other = quantized(shape, axes, seed=1)
    updated = dynamic_update_slice(q, other, start)
    expected = jax.lax.dynamic_update_slice(q.dequant(), other.dequant(), start)
    assert_same_bits(updated.dequant(), expected)


def test_an_update_that_would_rescale_other_values_is_refused():
    q = quantized(axes=(1,))
    with pytest.raises(ValueError, match="along axis 1"):
        dynamic_update_slice(q, quantized((4, 2, 5), (1,)), (0, 0, 0))
    with pytest.raises(ValueError, match="along axis 0"):
        dynamic_update_slice(q, quantized((4, 6, 5), (0, 1)), (0, 0, 0))
    narrow = Quantizer(config.int_numerics(4))
    with pytest.raises(ValueError, match="quantize both alike"):
        dynamic_update_slice(q, quantized(axes=(1,), quantizer=narrow), (0, 0, 0))


def test_an_empty_cache_is_zeros():
    cache = QTensor.zeros((2, 3), calibration_axes=(-1,), dequant_dtype=jnp.bfloat16)
    assert cache.qvalue.dtype == jnp.int8
    assert cache.scale.shape == (2, 1)
    assert cache.dequant().dtype == jnp.bfloat16
    assert not np.asarray(cache.dequant()).any()


@pytest.mark.slow
def test_attention_over_a_quantized_cache_is_that_over_quantized_keys_and_values():
    c = config.config_v4(8, None, None)
    rng = np.random.default_rng(0)
    shape = (BATCH, LENGTH, HEADS, DEPTH)
    query, keys, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    # A key has one scale for its depth, along which queries are contracted with it. A value has
    # one too: multiplied in before it is contracted along the positions, each of its own scale.
    value = dataclasses.replace(config.int_tensor(8), calib_shared_axes=(3,), use_fake_quant=True)
    by_value = config.DotGeneral(fwd=config.raw(config.int_tensor(8), value))

    def attend(query, k, v):
        weights = jax.nn.softmax(einsum("bqhd,bkhd->bhqk", query, k, config=c))
        return einsum("bhqk,bkhd->bqhd", weights, v, config=by_value)

    @jax.jit
    def step(caches, position):
        new = [
            INT8.quant(jax.lax.dynamic_slice_in_dim(x, position, 1, 1), -1)[0]
            for x in (keys, values)
        ]
        start = (0, position, 0, 0)
        return [dynamic_update_slice(c, x, start) for c, x in zip(caches, new, strict=True)]

    caches = [QTensor.zeros(shape, calibration_axes=(-1,)) for _ in range(2)]
    for position in range(LENGTH):
        caches = step(caches, position)
    whole = [INT8.quant(x, -1)[0] for x in (keys, values)]
    jax.tree.map(assert_same_bits, caches, whole)
    assert_same_bits(jax.jit(attend)(query, *caches), jax.jit(attend)(query, *whole))
    in_float = functools.partial(jnp.einsum, precision="highest")
    weights = jax.nn.softmax(in_float("bqhd,bkhd->bhqk", query, keys))
    exact = in_float("bhqk,bkhd->bqhd", weights, values)
    np.testing.assert_allclose(attend(query, *caches), exact, atol=0.05)


def test_fake_quantization_passes_gradients_straight_through():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    fake = jax.jit(lambda x: INT8.fake_quant(x, 1))
    np.testing.assert_array_equal(fake(x), quantized((3, 4), 1).dequant())
    gradient = jax.jit(jax.grad(lambda x: (INT8.fake_quant(x, 1) * jnp.arange(4.0)).sum()))(x)
    np.testing.assert_array_equal(gradient, np.broadcast_to(np.arange(4.0), (3, 4)))
