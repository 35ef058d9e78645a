"""Quantized `ragged_dot`: NumPy's integers, each group by `dot_general`, `aqtp`, bad input."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from aqt_engine import Context, QTensor, config, dot_general
from aqt_engine.calibration import MinMaxCalibration
from aqt_engine.ops import ragged_dot
from aqt_engine.ops.ragged_dot import quantize_rhs
from engine.contractions import assert_same_bits, compiled, value_and_gradients

pytestmark = pytest.mark.in_haste

MATMUL = (((1,), (0,)), ((), ()))
# An empty group among them, and two rows beyond the last.
SIZES = (3, 0, 5, 1)
ROWS, K, N = 11, 16, 6
INT8 = config.config_v4(8, 8, 8, use_stochastic_rounding=False)
FWD_QUANT = config.fully_quantized(use_stochastic_rounding=False)


def operands(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = (ROWS, K), (len(SIZES), K, N), (ROWS, N)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def slices(sizes=SIZES):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def contraction(c, sizes=SIZES, **arguments):
    return functools.partial(ragged_dot, group_sizes=jnp.asarray(sizes), config=c, **arguments)


def group_by_group(c):
    """The same by one `dot_general` for each group, and zeros where there is none."""

    def run(lhs, rhs, g):
        out, dlhs, drhs = jnp.zeros_like(g), jnp.zeros_like(lhs), jnp.zeros_like(rhs)
        for i, rows in enumerate(slices()):
            if rows.stop > rows.start:
                one = functools.partial(dot_general, dimension_numbers=MATMUL, config=c)
                parts = value_and_gradients(one, lhs[rows], rhs[i], g[rows])
                out, dlhs = out.at[rows].set(parts[0]), dlhs.at[rows].set(parts[1])
                drhs = drhs.at[i].set(parts[2])
        return out, dlhs, drhs

    return run


@pytest.mark.slow
def test_forward_is_numpys_integer_sum_times_both_scales():
    lhs, rhs, _ = operands()
    x, w = np.asarray(lhs), np.asarray(rhs)
    x_scale = np.abs(x).max(1, keepdims=True) * np.float32(1 / 127.5)
    w_scale = np.abs(w).max(1, keepdims=True) * np.float32(1 / 127.5)
    x_q = np.rint(np.clip(x * (1 / x_scale), -127, 127)).astype(np.int64)
    w_q = np.rint(np.clip(w * (1 / w_scale), -127, 127)).astype(np.int64)
    expected = np.zeros((ROWS, N), np.float32)
    for i, rows in enumerate(slices()):
        expected[rows] = (x_q[rows] @ w_q[i]).astype(np.float32) * x_scale[rows] * w_scale[i]
    assert_same_bits(jax.jit(contraction(INT8))(lhs, rhs), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("c", "dtype"),
    [
        (INT8, jnp.bfloat16),
        pytest.param(INT8, np.float32, marks=pytest.mark.long),
        (FWD_QUANT, np.float32),
    ],
)
def test_value_and_gradients_are_those_of_each_group_alone(c, dtype):
    arguments = operands(1, dtype)
    # Compiled: eager, each of the many small operations would be compiled by itself.
    found = jax.jit(functools.partial(value_and_gradients, contraction(c)))(*arguments)
    for mine, other in zip(found, jax.jit(group_by_group(c))(*arguments), strict=True):
        assert_same_bits(mine, other)
        assert np.asarray(mine, np.float32).any()


@pytest.mark.slow
def test_unquantized_gradients_are_those_of_jax():
    arguments = operands(2)
    found = compiled(value_and_gradients, contraction(config.DotGeneral()))(*arguments)
    in_float = functools.partial(jax.lax.ragged_dot, group_sizes=jnp.asarray(SIZES))
    expected = compiled(value_and_gradients, in_float)(*arguments)
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_forward_equals_aqtp_where_the_groups_share_their_scales():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own, on today's JAX
        from aqt.jax.v2 import aqt_ragged_dot
        from aqt.jax.v2 import config as aqtp_config
    for bits in (8, 4):
        ours = config.config_v4(bits, None, None)
        ours = config.update(ours, "fwd.rhs", calib_shared_axes=(0, 1))
        theirs = jax.jit(
            functools.partial(aqt_ragged_dot.ragged_dot, cfg=aqtp_config.config_v4(fwd_bits=bits))
        )
        mine = jax.jit(functools.partial(ragged_dot, config=ours))
        for seed in range(20):
            lhs, rhs, _ = operands(seed)
            sizes = jnp.asarray(np.random.default_rng(seed).multinomial(ROWS, [0.25] * 4))
            assert_same_bits(mine(lhs, rhs, sizes), theirs(lhs, rhs, sizes))


@pytest.mark.slow
def test_a_stored_side_and_a_given_scale():
    lhs, rhs, _ = operands(3)
    expected = compiled(contraction(INT8))(lhs, rhs)
    stored = compiled(quantize_rhs, config=INT8)(rhs)
    assert stored.qvalue.dtype == jnp.int8
    assert stored.scale.shape == (len(SIZES), 1, N)
    assert_same_bits(compiled(contraction(INT8))(lhs, stored), expected)

    @jax.jit
    def with_its_scale(lhs, rhs):
        scale = INT8.fwd.lhs.quantizer(None).calibrate(lhs, 1)
        return contraction(INT8, lhs_scale=scale)(lhs, rhs)

    assert_same_bits(with_its_scale(lhs, rhs), expected)
    with pytest.raises(TypeError, match="stored QTensor has no gradient"):
        jax.eval_shape(jax.grad(lambda x: contraction(INT8)(x, stored).sum()), lhs)


@pytest.mark.slow
def test_zero_points_are_corrected_in_integers_forward_and_backward():
    lhs, rhs, g = operands(4)
    lhs, rhs, g = lhs + 2, rhs - 1, g + 1
    c = INT8
    for side in ("fwd.*", "dlhs.*", "drhs.*"):
        c = config.update(c, side, calibration=MinMaxCalibration())
    found = jax.jit(functools.partial(value_and_gradients, contraction(c)))(lhs, rhs, g)
    expected = jax.jit(group_by_group(c))(lhs, rhs, g)
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_rows_of_a_group_longer_than_the_accumulator_are_summed_in_parts():
    lhs, rhs, g = operands(5)
    numerics = dataclasses.replace(config.int_numerics(15), dtype=jnp.int16)
    tensor = dataclasses.replace(config.int_tensor(15), numerics=numerics)
    drhs = config.DotGeneralRaw(tensor, tensor, jnp.int32, jnp.int32)  # holds 8 products
    sizes = (10, 0, 1, 0)
    c = dataclasses.replace(INT8, drhs=drhs)
    found = jax.jit(functools.partial(value_and_gradients, contraction(c, sizes)))(lhs, rhs, g)[2]
    in_float = functools.partial(jax.lax.ragged_dot, group_sizes=jnp.asarray(sizes))
    exact = compiled(value_and_gradients, in_float)(lhs, rhs, g)[2]
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)


def test_what_is_not_finite_stays_in_its_row_and_its_group():
    lhs, rhs, _ = operands(6)
    run = compiled(contraction(INT8))
    expected = np.asarray(run(lhs, rhs))
    # Row 10 is in no group.
    x, w = np.array(lhs), np.array(rhs)
    x[0, 3], x[10, 0], w[2, 0, 1] = np.nan, np.inf, np.inf
    out = np.asarray(run(x, w))
    spoiled = np.zeros((ROWS, N), bool)
    spoiled[0] = spoiled[3:8, 1] = True
    assert np.isnan(out[spoiled]).all()
    np.testing.assert_array_equal(out[~spoiled], expected[~spoiled])


@pytest.mark.long
@pytest.mark.slow
def test_transformations():
    lhs, rhs, g = operands(7)
    run = functools.partial(value_and_gradients, contraction(INT8))
    expected = jax.jit(run)(lhs, rhs, g)

    def scanned(lhs, rhs, g):
        return jax.lax.scan(lambda c, x: (c, run(x, rhs[0], g[0])), 0, lhs)[1]

    twice = [np.stack([x, x]) for x in (lhs, rhs, g)]
    remat = compiled(value_and_gradients, jax.checkpoint(contraction(INT8)))
    for found in (
        jax.tree.map(lambda x: np.asarray(x)[1], jax.jit(jax.vmap(run))(*twice)),
        jax.tree.map(lambda x: np.asarray(x)[1], jax.jit(scanned)(*twice)),
        remat(lhs, rhs, g),
    ):
        jax.tree.map(assert_same_bits, found, expected)


@pytest.mark.slow
def test_stochastic_rounding_draws_with_the_key():
    lhs, rhs, g = operands(8)
    c = config.config_v4(8, 8, 8)

    @jax.jit
    def gradients(seed):
        context = Context(key=jax.random.key(seed))
        return value_and_gradients(contraction(c, context=context), lhs, rhs, g)[1:]

    for a, b, other in zip(gradients(0), gradients(0), gradients(1), strict=True):
        assert_same_bits(a, b)
        assert (np.asarray(a) != np.asarray(other)).any()
    with pytest.raises(ValueError, match="needs a PRNG key"):
        compiled(value_and_gradients, contraction(c))(lhs, rhs, g)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_it_lowers_for_every_platform(platform):
    run = jax.jit(functools.partial(value_and_gradients, contraction(INT8)))
    assert export.export(run, platforms=[platform])(*operands()).platforms == (platform,)


def test_nothing_to_sum_gives_zeros():
    lhs, rhs = (np.asarray(x) for x in operands()[:2])
    run = compiled(contraction(INT8))
    assert not np.asarray(run(lhs[:, :0], rhs[:, :0])).any()
    assert run(lhs[:0], rhs).shape == (0, N)
    assert not np.asarray(compiled(contraction(INT8, (0, 0, 0, 0)))(lhs, rhs)).any()


def test_what_it_cannot_do_is_refused():
    lhs, rhs = (np.asarray(x) for x in operands()[:2])

    def contraction(c, sizes=SIZES):
        sizes = np.asarray(sizes)
        return functools.partial(
            jax.eval_shape, functools.partial(ragged_dot, group_sizes=sizes, config=c)
        )

    sharded = config.update(INT8, "dlhs", local_aqt=config.LocalAqt(contraction_axis_shard_count=2))
    with pytest.raises(ValueError, match="local_aqt"):
        contraction(sharded)(lhs, rhs)
    varying = config.update(INT8, "fwd.rhs", calib_shared_axes=(0, 2))
    with pytest.raises(ValueError, match="varies along contracted axes"):
        contraction(varying)(lhs, rhs)
    with pytest.raises(TypeError, match="`group_sizes` must be integers"):
        contraction(INT8, (3.0, 0.0, 5.0, 1.0))(lhs, rhs)
    with pytest.raises(TypeError, match="`rhs` has dtype int32"):
        contraction(INT8)(lhs, rhs.astype(np.int32))
    for left, right, sizes in (
        (lhs[0], rhs, SIZES),
        (lhs, rhs[0], SIZES),
        (lhs[:, 1:], rhs, SIZES),
        (lhs, rhs, SIZES[1:]),
    ):
        with pytest.raises(ValueError, match=r"\(m, k\)"):
            contraction(INT8, sizes)(left, right)
    with pytest.raises(ValueError, match="could overflow"):
        contraction(INT8, (1,))(
            jax.ShapeDtypeStruct((1, 140_000), np.float32),
            jax.ShapeDtypeStruct((1, 140_000, 1), np.float32),
        )


def test_a_stored_left_side():
    lhs, rhs, _ = operands(9)
    q = jax.jit(lambda x: INT8.fwd.lhs.quantizer(None).quant(x, 1)[0])(lhs)
    assert isinstance(q, QTensor)
    run = compiled(contraction(INT8))
    assert_same_bits(run(q, rhs), run(lhs, rhs))
