"""Contractions in tiles: against sums of single tiles, stored, and in linen modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import QTensor, QuantMode, config, dot_general, einsum
from aqt_engine.flax import AqtDotGeneral, AqtEinsum
from aqt_engine.ops import TileCount, TileSize, Tiling, tiled_dot_general, tiled_einsum
from aqt_engine.ops.tiled import quantize_lhs, quantize_rhs
from engine.contractions import assert_same_bits, compiled, value_and_gradients

pytestmark = pytest.mark.in_haste

MATMUL = (((1,), (0,)), ((), ()))
INT8 = config.config_v4(8, 8, 8, use_stochastic_rounding=False)
# Scales that are powers of two: what is summed is not rounded before, however it is compiled.
POWERS = config.update(INT8, "*.*", po2_scale=True)
ATTENTION = (((3,), (3,)), ((0, 2), (0, 2)))


def operands(lhs, rhs, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (lhs, rhs)]


@pytest.mark.slow
def test_tiles_of_the_contracted_axis_are_contracted_apart_and_summed():
    lhs, rhs = operands((4, 12), (12, 5))
    tiling = Tiling(lhs=(TileCount(1, 3),))

    def tile_by_tile(lhs, rhs):
        tiles = (slice(i, i + 4) for i in (0, 4, 8))
        parts = [dot_general(lhs[:, tile], rhs[tile], MATMUL, config=POWERS) for tile in tiles]
        return jnp.sum(jnp.stack(parts), 0)

    found = compiled(tiled_dot_general, dimension_numbers=MATMUL, config=POWERS, tiling=tiling)
    assert_same_bits(found(lhs, rhs), jax.jit(tile_by_tile)(lhs, rhs))


@pytest.mark.slow
def test_tiles_of_a_remaining_axis_matter_backward():
    lhs, rhs = operands((4, 6), (6, 8))
    g = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    arguments = {"dimension_numbers": MATMUL, "config": POWERS}
    one = functools.partial(dot_general, **arguments)
    tiled = functools.partial(tiled_dot_general, tiling=Tiling(rhs=(TileSize(1, 4),)), **arguments)

    def half_by_half(lhs, rhs, g):
        parts = [value_and_gradients(one, lhs, rhs[:, i : i + 4], g[:, i : i + 4]) for i in (0, 4)]
        (_, left, first), (_, other, second) = parts
        return one(lhs, rhs), left + other, jnp.concatenate([first, second], 1)

    found = compiled(value_and_gradients, tiled)(lhs, rhs, g)
    for mine, expected in zip(found, jax.jit(half_by_half)(lhs, rhs, g), strict=True):
        assert_same_bits(mine, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lhs", "rhs", "numbers", "tiling"),
    [
        ((4, 12), (12, 6), MATMUL, Tiling((TileSize(1, 4), TileCount(0, 2)), (TileSize(1, 3),))),
        ((2, 4, 3, 8), (2, 6, 3, 8), ATTENTION, Tiling((TileCount(1, 2),), (TileSize(3, 2),))),
    ],
)
def test_tiles_sum_to_the_whole_and_may_be_stored_on_either_side(lhs, rhs, numbers, tiling):
    lhs, rhs = operands(lhs, rhs)
    arguments = {"dimension_numbers": numbers, "tiling": tiling}
    in_float = compiled(tiled_dot_general, config=config.DotGeneral(), **arguments)(lhs, rhs)
    expected = np.asarray(jax.lax.dot_general(lhs, rhs, numbers))
    np.testing.assert_allclose(in_float, expected, rtol=1e-5, atol=1e-5)
    tiled = compiled(tiled_dot_general, config=INT8, **arguments)
    found = tiled(lhs, rhs)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    stored = compiled(quantize_lhs, config=INT8, **arguments)(lhs, rhs)
    assert_same_bits(tiled(stored, rhs), found)
    other = compiled(quantize_rhs, config=INT8, **arguments)(rhs, lhs)
    assert_same_bits(tiled(lhs, other), found)
    assert_same_bits(tiled(stored, other), found)


@pytest.mark.slow
def test_blocks_of_a_weight_have_one_scale_each():
    lhs, rhs = operands((4, 12), (12, 6))
    # The weight in tiles is (3, 4, 2, 3): counted from the end, what each tile holds.
    c = config.update(INT8, "fwd.rhs", calib_shared_axes=(-3, -1))
    tiling = Tiling(rhs=(TileSize(0, 4), TileSize(1, 3)))
    arguments = {"dimension_numbers": MATMUL, "config": c, "tiling": tiling}
    stored = compiled(quantize_rhs, **arguments)(rhs, lhs)
    assert stored.qvalue.shape == (3, 4, 2, 3)
    assert stored.scale.shape == (3, 1, 2, 1)
    tiled = compiled(tiled_dot_general, **arguments)
    assert_same_bits(tiled(lhs, stored), tiled(lhs, rhs))
    blocks = np.abs(np.asarray(rhs)).reshape(3, 4, 2, 3).max((1, 3))
    np.testing.assert_allclose(stored.scale[:, 0, :, 0], blocks / 127.5, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("equation", ["ab,bc->ac", "ab,bc->ca", "ab,bc"])
def test_einsum_tiles_letters(equation):
    lhs, rhs = operands((4, 12), (12, 6))
    by_letters = compiled(tiled_einsum, equation, tile_sizes={"b": 4, "c": 3}, config=INT8)
    found = by_letters(lhs, rhs)
    tiling = Tiling((TileSize(1, 4),), (TileSize(1, 3),))
    arguments = {"dimension_numbers": MATMUL, "config": INT8, "tiling": tiling}
    expected = compiled(tiled_dot_general, **arguments)(lhs, rhs)
    # Turned around, the scales are multiplied in the other order.
    turned = equation.endswith("ca")
    np.testing.assert_allclose(found, expected.T if turned else expected, rtol=1e-6, atol=1e-6)
    stored = compiled(quantize_rhs, **arguments)(rhs, lhs)
    assert_same_bits(by_letters(lhs, stored), found)


def dot_general_module(mode):
    module = AqtDotGeneral(INT8, rhs_quant_mode=mode, tiling=Tiling(rhs=(TileSize(0, 4),)))
    return jax.jit(lambda variables, x, w: module.apply(variables, x, w, MATMUL, mutable=["aqt"]))


def einsum_module(mode):
    module = AqtEinsum(INT8, rhs_quant_mode=mode, tile_sizes={"b": 4})
    return jax.jit(
        lambda variables, x, w: module.apply(variables, "ab,bc->ca", x, w, mutable=["aqt"])
    )


@pytest.mark.slow
@pytest.mark.parametrize("module", [dot_general_module, einsum_module])
def test_a_module_stores_and_serves_tiles(module):
    x, w = operands((4, 12), (12, 6))
    trained, _ = module(QuantMode.TRAIN)({}, x, w)
    converted, variables = module(QuantMode.CONVERT)({}, x, w)
    leaves = jax.tree.leaves(variables, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    (stored,) = (leaf for leaf in leaves if isinstance(leaf, QTensor))
    assert (stored.qvalue.shape, stored.scale.shape) == ((3, 4, 6), (3, 1, 6))
    served, _ = module(QuantMode.SERVE)(variables, x, jnp.zeros_like(w))
    assert_same_bits(converted, trained)
    assert_same_bits(served, trained)


@pytest.mark.slow
def test_transformations():
    lhs, rhs = operands((3, 4, 12), (12, 6))
    tiling = Tiling((TileSize(1, 4), TileCount(0, 2)))
    tiled = functools.partial(
        tiled_dot_general, dimension_numbers=MATMUL, config=INT8, tiling=tiling
    )

    def run(x, contraction=tiled):
        out, vjp = jax.vjp(contraction, x, rhs)
        return out, *vjp(out)

    expected = jax.tree.map(lambda *xs: np.stack(xs), *map(jax.jit(run), lhs))
    for transformed in (
        jax.vmap(run),
        lambda lhs: jax.lax.scan(lambda c, x: (c, run(x)), 0, lhs)[1],
        jax.vmap(functools.partial(run, contraction=jax.checkpoint(tiled))),
    ):
        found = jax.jit(transformed)(lhs)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums of floats


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(lhs=(TileCount(1, 5),)), "size 12 cannot be split into 5 equal tiles"),
        (Tiling(rhs=(TileSize(0, 5),)), "size 12 cannot be split into tiles of size 5"),
        (Tiling(lhs=(TileCount(1, 0),)), "into 0 equal tiles"),
        (Tiling((TileCount(1, 3),), (TileCount(0, 2),)), "as many tiles, got 3 and 2"),
        (Tiling(lhs=(TileCount(2, 3),)), "only its contracted and remaining axes"),
        (Tiling(lhs=(TileCount(1, 3), TileSize(1, 4))), "names an axis twice"),
    ],
)
def test_a_tiling_that_does_not_fit_is_refused(tiling, message):
    lhs, rhs = operands((4, 12), (12, 6))
    with pytest.raises(ValueError, match=message):
        tiled_dot_general(lhs, rhs, MATMUL, config=INT8, tiling=tiling)


def test_contradictions_are_refused():
    lhs, rhs = operands((4, 12), (12, 6))
    with pytest.raises(ValueError, match="'z'"):
        tiled_einsum("ab,bc->ac", lhs, rhs, tile_sizes={"z": 4}, config=INT8)
    sharded = config.update(INT8, "fwd", local_aqt=config.LocalAqt(2))
    with pytest.raises(ValueError, match="use one of them"):
        tiled_dot_general(lhs, rhs, MATMUL, config=sharded, tiling=Tiling())
    batched = (((2,), (1,)), ((0,), (0,)))
    tiling = Tiling(lhs=(TileCount(0, 2),))
    with pytest.raises(ValueError, match="only its contracted and remaining axes"):
        tiled_dot_general(lhs[None], rhs[None], batched, config=INT8, tiling=tiling)
    untiled = INT8.fwd.rhs.quantizer(None).quant(rhs, 0)[0]
    with pytest.raises(ValueError, match="needs the 18 tiles of axis 0"):
        tiled_dot_general(lhs, untiled, MATMUL, config=INT8, tiling=Tiling(rhs=(TileSize(0, 4),)))


def test_sizes_that_do_not_fit_are_named():
    lhs, rhs = operands((4, 12), (11, 6))
    with pytest.raises(ValueError, match=r"contracted axes \(1,\) of `lhs` \(4, 12\)"):
        dot_general(lhs, rhs, MATMUL, config=INT8)
    with pytest.raises(ValueError, match=r"the letter 'b' .* sizes 12 and 11"):
        einsum("ab,bc->ac", lhs, rhs, config=INT8)


@pytest.mark.slow
def test_a_sum_of_no_values_gives_zeros():
    lhs, rhs = operands((4, 0), (0, 6))
    contraction = functools.partial(einsum, "ab,bc->ac", config=INT8)
    computed = compiled(value_and_gradients, contraction)
    out, *found = computed(lhs, rhs, np.ones((4, 6), np.float32))
    assert not np.asarray(out).any()
    assert [x.shape for x in found] == [(4, 0), (0, 6)]
    lhs, rhs = operands((0, 12), (12, 6))
    out, _, drhs = computed(lhs, rhs, np.ones((0, 6), np.float32))
    assert out.shape == (0, 6)
    assert not np.asarray(drhs).any()
