"""`dot_general`: its integers and scales against NumPy, its gradients, what it accepts."""

import dataclasses
import functools
import os
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import Context, DotGeneral, QTensor, config, dot_general
from aqt_engine.config import DotGeneralRaw, LocalAqt, Tensor
from aqt_engine.numerics import Uniform
from aqt_engine.qtensor import Scale
from engine.contractions import assert_same_bits, contractions

pytestmark = pytest.mark.in_haste

MATMUL = (((1,), (0,)), ((), ()))
INT8 = config.config_v4(8, None, None)


def operands(lhs=(4, 16), rhs=(16, 3), seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=lhs), dtype), jnp.asarray(rng.normal(size=rhs), dtype)


@functools.partial(jax.jit, static_argnums=0, static_argnames="preferred_element_type")
def matmul(c, lhs, rhs, lhs_scale=None, preferred_element_type=None):
    """Compiled whole: eager, each operation is compiled by itself."""
    return c(lhs, rhs, MATMUL, lhs_scale=lhs_scale, preferred_element_type=preferred_element_type)


@functools.partial(jax.jit, static_argnums=(0, 2))
def stored(side, x, axis):
    return side.quantizer(None).quant(x, calibration_axes=axis)[0]


def quantized(x, axes):
    """int8 values and scale, by NumPy in float32, as the documentation of the module says."""
    absmax = np.abs(x).max(axis=tuple(axes), keepdims=True)
    scale = np.where(absmax == 0, np.float32(1), absmax) * np.float32(1 / 127.5)
    return np.round(np.clip(x * (np.float32(1) / scale), -127, 127)).astype(np.int64), scale


def labels(dimension_numbers, lhs_ndim, rhs_ndim):
    (lc, rc), (lb, rb) = dimension_numbers
    lhs = [f"l{a}" for a in range(lhs_ndim)]
    rhs = [f"r{a}" for a in range(rhs_ndim)]
    for kind, pairs in (("c", (lc, rc)), ("b", (lb, rb))):
        for i, (left, right) in enumerate(zip(*pairs, strict=True)):
            lhs[left] = rhs[right] = f"{kind}{i}"
    out = [f"b{i}" for i in range(len(lb))]
    out += [a for a in lhs if a[0] == "l"] + [a for a in rhs if a[0] == "r"]
    letter = {name: chr(97 + i) for i, name in enumerate(dict.fromkeys(lhs + rhs))}
    return tuple("".join(letter[a] for a in side) for side in (lhs, rhs, out))


# Each example is another shape, and compiles.
@pytest.mark.slow
@hypothesis.settings(max_examples=hypothesis.settings.default.max_examples // 2)
@hypothesis.given(contractions())
def test_integers_and_scales_are_those_of_numpy(case):
    (lc, rc), _ = case.dimension_numbers
    lhs, lhs_scale = quantized(case.lhs, lc)
    rhs, rhs_scale = quantized(case.rhs, rc)
    left, right, out = labels(case.dimension_numbers, lhs.ndim, rhs.ndim)

    def to_output(scale, side):
        return np.einsum(f"{side},{out}->{out}", scale.astype(np.float64), np.ones(total.shape))

    total = np.einsum(f"{left},{right}->{out}", lhs, rhs)
    # Each scale has size 1 where it is shared, which einsum does not broadcast.
    squeezed = [np.squeeze(s, tuple(a)) for s, a in ((lhs_scale, lc), (rhs_scale, rc))]
    letters = [
        "".join(c for i, c in enumerate(side) if i not in axes)
        for side, axes in ((left, lc), (right, rc))
    ]
    expected = total.astype(np.float32)
    for scale, kept in zip(squeezed, letters, strict=True):
        expected = expected * to_output(scale, kept).astype(np.float32)
    # Compiled whole: a compilation for each operation would take five times as long.
    contraction = functools.partial(
        dot_general, dimension_numbers=case.dimension_numbers, config=INT8
    )
    found = jax.jit(contraction)(jnp.asarray(case.lhs), jnp.asarray(case.rhs))
    assert_same_bits(found, expected.astype(np.float32))


def test_integers_and_scales_of_a_matmul():
    for seed in range(20):
        lhs, rhs = operands(seed=seed)
        (ql, sl), (qr, sr) = quantized(np.asarray(lhs), (1,)), quantized(np.asarray(rhs), (0,))
        assert_same_bits(matmul(INT8, lhs, rhs), (ql @ qr).astype(np.float32) * sl * sr)


def straight_through(lhs, rhs, g):
    """The gradients of a matmul of the operands as they are, as a float backward pass gives."""
    return g @ rhs.T, lhs.T @ g


@functools.partial(jax.jit, static_argnums=0)
def gradients(c, lhs, rhs, g, key=None):
    contraction = functools.partial(c, dimension_numbers=MATMUL, context=Context(key=key))
    return jax.vjp(contraction, lhs, rhs)[1](g)


def test_float_gradients_pass_straight_through():
    lhs, rhs = operands()
    g = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), np.float32)
    for found, expected in zip(
        gradients(INT8, lhs, rhs, g), straight_through(lhs, rhs, g), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_quantized_gradients_are_near_and_not_equal():
    lhs, rhs = operands((32, 64), (64, 48))
    g = jnp.asarray(np.random.default_rng(1).normal(size=(32, 48)), np.float32)
    c = config.fully_quantized(use_stochastic_rounding=False)
    for found, expected in zip(
        gradients(c, lhs, rhs, g), straight_through(lhs, rhs, g), strict=True
    ):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert 0 < error < 0.03


def test_clip_gradient_stops_gradients_of_clipped_values():
    lhs, rhs = operands()
    clipping = dataclasses.replace(config.int_numerics(8), clip_gradient=True)
    c = config.update(INT8, "fwd.*", numerics=clipping)
    g = jnp.ones((4, 3))
    dlhs, _ = gradients(c, lhs, rhs, g)
    x = np.asarray(lhs)
    largest = np.abs(x) == np.abs(x).max(1, keepdims=True)
    assert (np.asarray(dlhs)[largest] == 0).all()  # 127.5, beyond the last centre
    assert (np.asarray(dlhs)[~largest] != 0).all()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("transform", ["jit", "vmap", "scan", "remat"])
def test_value_and_gradient_are_the_same_under_transformations(transform):
    lhs, rhs = operands((3, 4, 16), (16, 3))
    c = config.fully_quantized(use_stochastic_rounding=False)

    def loss(x, w):
        out = c(x, w, MATMUL)
        return (out * jnp.cos(out)).sum()

    grad = jax.value_and_grad(loss, (0, 1))
    one_by_one = [grad(x, rhs) for x in lhs]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *one_by_one)
    if transform == "jit":
        jitted = jax.jit(grad)
        found = jax.tree.map(lambda *xs: jnp.stack(xs), *[jitted(x, rhs) for x in lhs])
    elif transform == "vmap":
        found = jax.vmap(grad, (0, None))(lhs, rhs)
    elif transform == "remat":
        rematerialized = jax.value_and_grad(jax.checkpoint(loss), (0, 1))
        found = jax.vmap(rematerialized, (0, None))(lhs, rhs)
    else:
        found = jax.lax.scan(lambda carry, x: (carry, grad(x, rhs)), 0, lhs)[1]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # The cosine and the sum around the contraction are compiled in float.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_stochastic_rounding_needs_a_key_only_where_it_rounds():
    lhs, rhs = operands()
    c = config.fully_quantized()
    g = jnp.ones((4, 3))
    assert matmul(c, lhs, rhs).shape == (4, 3)
    with pytest.raises(ValueError, match="needs a PRNG key"):
        gradients(c, lhs, rhs, g)
    same = [gradients(c, lhs, rhs, g, jax.random.key(s)) for s in (0, 0, 1)]
    assert_same_bits(same[0][0], same[1][0])
    assert (same[0][0] != same[2][0]).any()


@pytest.mark.slow
def test_a_stored_side_gives_the_same_bits():
    lhs, rhs = operands()
    left, right = stored(INT8.fwd.lhs, lhs, 1), stored(INT8.fwd.rhs, rhs, 0)
    expected = matmul(INT8, lhs, rhs)
    for a, b in ((left, rhs), (lhs, right), (left, right)):
        assert_same_bits(matmul(INT8, a, b), expected)
    with pytest.raises(TypeError, match="stored QTensor has no gradient"):
        jax.grad(lambda x: matmul(INT8, x, right).sum())(lhs)


def test_a_given_scale_takes_the_place_of_calibration():
    lhs, rhs = operands()
    own = Scale(stored(INT8.fwd.lhs, lhs, 1).scale)
    assert_same_bits(matmul(INT8, lhs, rhs, lhs_scale=own), matmul(INT8, lhs, rhs))
    fixed = Scale(jnp.full((1, 1), 0.05, jnp.float32))
    found = matmul(INT8, lhs, rhs, lhs_scale=fixed)
    (qr, sr), scale = quantized(np.asarray(rhs), (0,)), np.float32(0.05)
    ql = np.round(np.clip(np.asarray(lhs) * (np.float32(1) / scale), -127, 127)).astype(np.int64)
    assert_same_bits(found, (ql @ qr).astype(np.float32) * scale * sr)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 8])
def test_forward_shards_have_scales_of_their_own(count):
    lhs, rhs = operands((4, 16), (16, 3))
    c = config.update(INT8, "fwd", local_aqt=LocalAqt(contraction_axis_shard_count=count))
    parts = [
        matmul(INT8, a, b)
        for a, b in zip(jnp.split(lhs, count, 1), jnp.split(rhs, count, 0), strict=True)
    ]
    found = matmul(c, lhs, rhs)
    np.testing.assert_allclose(found, sum(parts), rtol=1e-6, atol=1e-6)
    g = jnp.cos(found)
    for a, b in zip(gradients(c, lhs, rhs, g), straight_through(lhs, rhs, g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_shards_help_where_magnitudes_differ():
    lhs, rhs = operands((8, 64), (64, 8))
    lhs = lhs * jnp.repeat(jnp.asarray([1.0, 100.0]), 32)
    rhs = rhs / jnp.repeat(jnp.asarray([1.0, 100.0]), 32)[:, None]
    error = {}
    for count in (1, 2):
        c = config.update(INT8, "fwd", local_aqt=LocalAqt(contraction_axis_shard_count=count))
        error[count] = float(jnp.abs(matmul(c, lhs, rhs) - lhs @ rhs).mean())
    assert error[2] < 0.1 * error[1]


@pytest.mark.slow
def test_backward_shards_equal_a_manual_split():
    lhs, rhs = operands((4, 16), (16, 8))
    g = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8)), np.float32)
    plain = config.config_v4(8, 8, None, use_stochastic_rounding=False)
    c = config.update(plain, "dlhs", local_aqt=LocalAqt(contraction_axis_shard_count=2))
    dlhs, _ = gradients(c, lhs, rhs, g)
    parts = [
        gradients(plain, lhs, half, gradient)[0]
        for half, gradient in zip(jnp.split(rhs, 2, 1), jnp.split(g, 2, 1), strict=True)
    ]
    np.testing.assert_allclose(dlhs, sum(parts), rtol=1e-6, atol=1e-6)


def test_a_nan_or_an_infinity_spoils_the_values_that_share_its_scale_and_no_others():
    lhs, rhs = operands()
    clean = matmul(INT8, lhs, rhs)
    for bad in (np.nan, np.inf, -np.inf):
        x = np.array(lhs)
        x[1, 5] = bad
        spoiled = np.asarray(matmul(INT8, x, rhs))
        assert np.isnan(spoiled[1]).all()
        assert_same_bits(np.delete(spoiled, 1, 0), np.delete(clean, 1, 0))


def test_zero_rows_give_zeros():
    lhs, rhs = operands()
    x = np.array(lhs)
    x[2] = 0
    out = np.asarray(matmul(INT8, x, rhs))
    assert (out[2] == 0).all()
    assert np.isfinite(out).all()


def test_a_sum_that_could_overflow_is_refused():
    def contraction(size):
        shape = jax.ShapeDtypeStruct((size,), np.float32)
        axes = (((0,), (0,)), ((), ()))
        return jax.eval_shape(lambda a, b: INT8(a, b, axes), shape, shape)

    limit = (2**31 - 1) // (127 * 128)  # a weight that Qwix stored reaches -128
    assert contraction(limit).shape == ()
    with pytest.raises(ValueError, match=f"{limit + 1} values could overflow"):
        contraction(limit + 1)


def test_integers_are_no_operands():
    lhs, rhs = operands()
    whole = np.asarray(lhs).astype(np.int8), np.asarray(rhs).astype(np.int32)
    for a, b, side in ((whole[0], rhs, "lhs"), (lhs, whole[1], "rhs")):
        with pytest.raises(TypeError, match=f"`{side}` has dtype"):
            matmul(INT8, a, b)


def test_the_result_has_the_dtype_of_the_left_or_the_preferred_one():
    lhs, rhs = operands(dtype=jnp.bfloat16)
    assert matmul(INT8, lhs, rhs).dtype == jnp.bfloat16
    wide = matmul(INT8, lhs, rhs, preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32


WHOLE = config.int_tensor(8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DotGeneralRaw(lhs=WHOLE, dg_accumulator_dtype=jnp.int32), "whole numbers"),
        (
            lambda: DotGeneralRaw(
                lhs=WHOLE,
                rhs=dataclasses.replace(WHOLE, use_fake_quant=True),
                dg_accumulator_dtype=jnp.int32,
            ),
            "whole numbers",
        ),
        (
            lambda: DotGeneral(fwd=DotGeneralRaw(lhs=Tensor(use_fwd_quant=True))),
            "forward pass has quantized",
        ),
        (
            lambda: dataclasses.replace(
                WHOLE, calibration_mode=config.CalibrationMode.REMAINING_AXIS
            ),
            "cannot be multiplied into the output",
        ),
        (
            lambda: dataclasses.replace(WHOLE, dequant_mode=config.DequantMode.OTHER_INPUT),
            "which the other operand does not have",
        ),
        (
            lambda: Tensor(use_fake_quant=True, dequant_mode=config.DequantMode.OTHER_INPUT),
            "leave one of them out",
        ),
        (
            lambda: DotGeneralRaw(
                lhs=WHOLE,
                rhs=dataclasses.replace(
                    WHOLE,
                    dequant_mode=config.DequantMode.OTHER_INPUT,
                    calibration_mode=config.CalibrationMode.ALL_AXES,
                ),
            ),
            "leave the other side in float",
        ),
        (lambda: LocalAqt(contraction_axis_shard_count=0), "at least 1"),
        (lambda: config.update(INT8, "forward", lhs=WHOLE), "names no part"),
    ],
)
def test_contradictions_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_scale_that_varies_along_the_sum_is_refused():
    lhs, rhs = operands()
    c = config.update(INT8, "fwd.lhs", calib_shared_axes=())
    with pytest.raises(ValueError, match="varies along contracted axes"):
        matmul(c, lhs, rhs)


def test_shards_that_do_not_fit_are_refused():
    lhs, rhs = operands()
    c = config.update(INT8, "fwd", local_aqt=LocalAqt(contraction_axis_shard_count=3))
    with pytest.raises(ValueError, match="16 cannot be split"):
        matmul(c, lhs, rhs)


def test_configurations_are_values():
    assert config.fully_quantized() == config.fully_quantized()
    assert hash(config.config_v4()) == hash(config.config_v4())
    assert config.update(INT8, "fwd.rhs", po2_scale=True) != INT8
    noisy = config.update(INT8, "dlhs.lhs", numerics=config.int_numerics(8, noise_fn=Uniform()))
    assert noisy.fwd == INT8.fwd


def test_a_qtensor_dequantizes():
    q = QTensor(jnp.asarray([[2, -3]], jnp.int8), jnp.asarray([[0.5]]), np.dtype(np.float32))
    assert q.dequant().tolist() == [[1.0, -1.5]]
    assert (q.shape, q.ndim, q.dtype) == ((1, 2), 2, np.float32)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from aqt_engine import config
c = config.config_v4(8, None, None)
matmul = (((1,), (0,)), ((), ()))
rng = np.random.default_rng(0)
lhs = jnp.asarray(rng.normal(size=(8, 64)), jnp.float32)
rhs = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
mesh = Mesh(np.asarray(jax.devices()), ("x",))
alone = jax.jit(lambda a, b: c(a, b, matmul))(lhs, rhs)
for left, right in ((P("x", None), P()), (P(None, "x"), P("x", None)), (P(), P(None, "x"))):
    a = jax.device_put(lhs, NamedSharding(mesh, left))
    b = jax.device_put(rhs, NamedSharding(mesh, right))
    together = jax.jit(lambda a, b: c(a, b, matmul))(a, b)
    assert (np.asarray(together).view(np.uint32) == np.asarray(alone).view(np.uint32)).all(), left
mapped = jax.jit(jax.shard_map(
    lambda a, b: c(a, b, matmul), mesh=mesh, in_specs=(P("x", None), P()), out_specs=P("x", None)
))
assert (np.asarray(mapped(lhs, rhs)).view(np.uint32) == np.asarray(alone).view(np.uint32)).all()
from aqt_engine.ops import TileCount, Tiling, ragged_dot, tiled_dot_general
experts = jnp.asarray(rng.normal(size=(4, 64, 16)), jnp.float32)
sizes = jnp.asarray([3, 0, 4, 1])
tiling = Tiling((TileCount(1, 2),))
for op, right, right_specs in (
    (lambda a, b: ragged_dot(a, b, sizes, config=c), experts, (P("x"), P(None, None, "x"))),
    (lambda a, b: tiled_dot_general(a, b, matmul, config=c, tiling=tiling), rhs, (P(None, "x"),)),
):
    alone = jax.jit(op)(lhs, right)
    for left_spec, right_spec in ((P("x", None), P()), *((P(), spec) for spec in right_specs)):
        a = jax.device_put(lhs, NamedSharding(mesh, left_spec))
        b = jax.device_put(right, NamedSharding(mesh, right_spec))
        together = jax.jit(op)(a, b)
        same = np.asarray(together).view(np.uint32) == np.asarray(alone).view(np.uint32)
        assert same.all(), (left_spec, right_spec)
print(len(jax.devices()), "devices")
"""


@pytest.mark.slow
def test_sharded_over_devices_gives_the_same_bits():
    run = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=os.environ
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout == "4 devices\n", run.stderr
