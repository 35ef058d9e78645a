"""Rows that the kernel quantizes: NumPy's bits and XLA's, and where it may do so in a graph."""

import dataclasses

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax import export, lax

from aqt_engine import config
from aqt_engine.calibration import AbsMaxCalibration, MinMaxCalibration
from aqt_engine.kernels import library
from aqt_engine.kernels.substitution import substituted
from aqt_engine.materialization import materialized, materialized_on_cpu
from aqt_engine.ops.operand import quantize_apart, quantize_forward
from aqt_engine.qtensor import Scale
from compiled_kernel import why_no_kernel
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.skipif(bool(why_no_kernel()), reason="no kernel is compiled here")
SETS = library.supported()
RNG = np.random.default_rng(0)
TENSOR = config.fully_quantized().fwd.lhs
LARGEST, TINY = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
HOSTILE = np.float32(
    [0, -0.0, TINY, -TINY, 1e-38, 3e-39, 1, -1.5, 0.5, LARGEST, -LARGEST, np.inf, -np.inf, np.nan]
)


def by_numpy(x, factor, bound):
    """The formula of `aqt_engine.ops.dot_general`; what is not a number becomes 0."""
    factor, bound = np.float32(factor), np.float32(bound)
    with np.errstate(all="ignore"):
        largest = np.where(np.isnan(x), np.inf, abs(x)).max(1, keepdims=True).astype(np.float32)
        scale = np.where(largest == 0, np.float32(1), largest) * factor
        inverse = 1 / scale
        scaled = x * np.where(np.isinf(inverse), np.float32(1), inverse)
        clipped = np.rint(np.clip(scaled, -bound, bound))
        return np.where(np.isnan(clipped), 0, clipped).astype(np.int8), scale


def rows_of(values):
    shapes = st.tuples(st.integers(0, 9), st.integers(1, 150))
    return hnp.arrays(np.float32, shapes, elements=values, fill=st.nothing())


def hostile_rows():
    """Of any value, of halves that are rounded to even, and of few magnitudes at all."""
    anything = rows_of(st.floats(width=32))
    halves = rows_of(st.integers(-255, 255).map(lambda i: i / 2))
    return anything | halves | rows_of(st.sampled_from(list(HOSTILE)))


@settings(max_examples=150)
@given(
    x=hostile_rows(),
    factor=st.sampled_from([1 / 127.5, 1 / 127, 0.5, 1.0, 2.0]),
    bound=st.sampled_from([127.0, 7.0, 0.0]),
)
@example(x=RNG.normal(size=(33, 1_031)).astype(np.float32), factor=1 / 127.5, bound=127.0)
@example(x=np.full((1, 70), np.nan, np.float32), factor=1 / 127.5, bound=127.0)
def test_the_bits_are_numpys(x, factor, bound):
    expected = by_numpy(x, factor, bound) if len(x) else None
    for name in SETS:
        found = library.quantized(name, x, factor, bound)
        if expected:
            for each, other in zip(found, expected, strict=True):
                assert_same_bits(each, other)


@pytest.mark.parametrize("shape", [(300, 1_031), (1, 300_000), (2_000, 130)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_that_share_rows_give_the_same_bits(shape, threads):
    x = RNG.normal(size=shape).astype(np.float32)
    x[:, 0] = RNG.choice(HOSTILE, shape[0])
    for name in SETS:
        found = library.quantized(name, x, 1 / 127.5, 127.0, threads=threads)
        for each, other in zip(found, by_numpy(x, 1 / 127.5, 127.0), strict=True):
            assert_same_bits(each, other)


def test_xla_shares_many_rows_among_its_threads():
    x = RNG.normal(size=(700, 1_031)).astype(np.float32)
    x[:, 0] = RNG.choice(HOSTILE, 700)
    weight = RNG.integers(-127, 128, (1_031, 8), np.int8)
    assert in_both(forward(TENSOR, (1,)), x, weight) == 1


def forward(tensor, contracting, scale=None, by=quantize_apart):
    """The sums of what is quantized with a weight, and its scale."""

    def call(weights, inputs):
        q = by(tensor, inputs[0], contracting, (), None, scale)[0]
        weight = weights[0].reshape(*(inputs[0].shape[a] for a in contracting), -1)
        axes = ((contracting, tuple(range(len(contracting)))), ((), ()))
        values = materialized_on_cpu(q.qvalue)
        sums = lax.dot_general(values, weight, axes, preferred_element_type=jnp.int32)
        return materialized_on_cpu(sums), q.scale

    return call


def exported(call, x, weight):
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (weight, x)]
    return export.export(jax.jit(call), platforms=("cpu", "tpu"))([structs[0]], [structs[1]])


def identity_of(size):
    """A weight whose sums are what they are of."""
    return np.eye(size, dtype=np.int8)


def changed(**changes):
    return dataclasses.replace(TENSOR, **changes)


def numerics(**changes):
    return changed(numerics=dataclasses.replace(TENSOR.numerics, **changes))


def in_both(call, x, weight):
    """How often the graph quantizes rows by the kernel; its answers are those of XLA alone."""
    graph = exported(call, x, weight)
    found = substituted(graph, 1)
    (packing,) = found.packed.values()
    answers = jax.jit(found.graph.call)([packing(weight)], [x])
    for each, other in zip(answers, jax.jit(graph.call)([weight], [x]), strict=True):
        assert_same_bits(each, other)
    return found.graph.mlir_module().count(library.QUANTIZE_TARGET)


@pytest.mark.parametrize(
    ("tensor", "shape", "contracting"),
    [
        (TENSOR, (14, 70), (1,)),
        (TENSOR, (2, 7, 70), (2,)),
        (TENSOR, (14, 10, 7), (1, 2)),
        (TENSOR, (70,), (0,)),
        (changed(calib_shared_axes="per_tensor"), (14, 70), (1,)),
        (changed(calibration=AbsMaxCalibration(0.7)), (14, 70), (1,)),
        (numerics(bits=4), (14, 70), (1,)),
        (numerics(preserve_max_val=True), (14, 70), (1,)),
    ],
)
@pytest.mark.parametrize("values", ["normal", "hostile", "denormal", "each hostile alone"])
def test_a_graph_that_quantizes_in_one_pass_gives_xlas_bits(tensor, shape, contracting, values):
    size = int(np.prod([shape[a] for a in contracting]))
    x = RNG.normal(size=(*shape[:1], *shape[1:])).astype(np.float32)
    if values == "hostile":
        x = RNG.choice(HOSTILE, shape)
    elif values == "denormal":
        x *= np.float32(2e-38)
    elif values == "each hostile alone":
        x.reshape(-1, size)[:, 3] = np.resize(HOSTILE, x.size // size)
    assert in_both(forward(tensor, contracting), x, identity_of(size)) == 1


@pytest.mark.parametrize(
    "call",
    [
        forward(TENSOR, (1,), by=quantize_forward),
        forward(TENSOR, (1,), scale=Scale(jnp.full((14, 1), 0.1))),
        forward(changed(po2_scale=True), (1,)),
        forward(changed(calibration=MinMaxCalibration()), (1,)),
        forward(changed(calib_shared_axes=(0,)), (1,)),
        forward(changed(scale_dtype=jnp.bfloat16), (1,)),
        forward(TENSOR, (0,)),
    ],
)
def test_what_is_quantized_otherwise_is_left_to_xla(call):
    assert in_both(call, RNG.normal(size=(14, 14)).astype(np.float32), identity_of(14)) == 0


def by_hand(
    *,
    zero=0.0,
    one=1.0,
    nan=np.inf,
    infinite=np.inf,
    quotient=1.0,
    low=-127.0,
    high=127.0,
    factor=0.01,
    mantissa=23,
    axis=1,
    largest=jnp.max,
    rounded=jnp.round,
    apart=materialized_on_cpu,
    scale_apart=materialized,
    also=lambda x: x,
):
    """What the kernel does, unless told otherwise."""

    def call(weights, inputs):
        x = apart(inputs[0])
        magnitude = jnp.where(jnp.isnan(x), jnp.float32(nan), jnp.abs(also(x)))
        bound = largest(magnitude, axis=axis, keepdims=True)
        bound = jnp.where(bound == zero, jnp.full_like(bound, one), bound)
        scale = scale_apart(lax.reduce_precision(bound, 8, mantissa) * jnp.float32(factor))
        inverse = quotient / scale
        is_infinite = jnp.abs(inverse) == infinite
        inverse = jnp.where(is_infinite, jnp.ones_like(inverse), inverse)
        whole = rounded(jnp.clip(also(x) * inverse, low, high)).astype(jnp.int8)
        values = materialized_on_cpu(whole)
        sums = lax.dot(values, weights[0], preferred_element_type=jnp.int32)
        return materialized_on_cpu(sums), scale

    return call


@pytest.mark.parametrize(
    "otherwise",
    [
        {"zero": 1.0},
        {"one": 2.0},
        {"nan": 1.0},
        {"infinite": 1.0},
        {"quotient": 2.0},
        {"low": -126.0},
        {"low": -128.0, "high": 128.0},
        {"factor": -0.01},
        {"mantissa": 7},
        {"axis": 0},
        {"largest": jnp.min},
        {"rounded": jnp.floor},
        {"apart": lambda x: x},
        {"scale_apart": lambda x: x},
        {"also": jnp.sin},
    ],
    ids=" ".join,
)
def test_only_what_the_kernel_does_becomes_its_call(otherwise):
    x, weight = RNG.normal(size=(14, 14)).astype(np.float32), identity_of(14)
    assert in_both(by_hand(), x, weight) == 1
    assert in_both(by_hand(**otherwise), x, weight) == 0


def test_what_several_contractions_take_is_quantized_once():
    def call(weights, inputs):
        return [forward(TENSOR, (1,))([w], inputs) for w in weights]

    x = jax.ShapeDtypeStruct((14, 70), jnp.float32)
    weights = [jax.ShapeDtypeStruct((70, 32), jnp.int8)] * 3
    graph = substituted(export.export(jax.jit(call))(weights, [x]), 3).graph
    assert graph.mlir_module().count(library.QUANTIZE_TARGET) == 3
    packed = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in graph.in_avals[:3]]
    compiled = jax.jit(graph.call).lower(packed, [x]).compile().as_text()
    assert compiled.count(f'custom_call_target="{library.QUANTIZE_TARGET}"') == 1
