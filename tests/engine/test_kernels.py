"""The int8 kernel: every instruction set of this processor; the pass that puts it in a graph."""

import concurrent.futures
import logging

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax import export, lax

from aqt_engine import bundle
from aqt_engine.execution import Program
from aqt_engine.kernels import library
from aqt_engine.kernels.contraction import int8_matmul
from aqt_engine.kernels.packing import Packing, pack, packed_size
from aqt_engine.kernels.substitution import substituted
from aqt_engine.materialization import materialized, materialized_on_cpu
from bundles import FEATURES, write_linear
from compiled_kernel import why_no_kernel
from engine.contractions import assert_same_bits

WHY_NOT = why_no_kernel()
SETS = library.supported()
needs_a_kernel = pytest.mark.skipif(bool(WHY_NOT), reason=f"no kernel is compiled here: {WHY_NOT}")
RNG = np.random.default_rng(0)
RANGE = (-128, 127)


def int8(*shape, rng=RNG):
    return rng.integers(*RANGE, shape, np.int8, endpoint=True)


def wrapped(lhs, rhs):
    return (lhs.astype(np.int64) @ rhs.astype(np.int64)).astype(np.int32)


@needs_a_kernel
def test_there_is_a_kernel_for_this_processor():
    assert library.instruction_set() == SETS[0]


@needs_a_kernel
@settings(max_examples=60)
@given(
    rows=st.integers(0, 40),
    depth=st.integers(0, 200),
    columns=st.integers(0, 100),
    threads=st.integers(1, 4),
    values=st.sampled_from([RANGE, (-128, -128), (127, 127), (-1, 1)]),
    seed=st.integers(0, 2**32 - 1),
)
@example(rows=97, depth=1_025, columns=33, threads=3, values=RANGE, seed=0)
@example(rows=300, depth=257, columns=1_031, threads=4, values=RANGE, seed=0)
def test_sums_are_numpys(rows, depth, columns, threads, values, seed):
    rng = np.random.default_rng(seed)
    lhs, rhs = (
        rng.integers(*values, shape, np.int8, endpoint=True)
        for shape in ((rows, depth), (depth, columns))
    )
    packed = pack(rhs)
    assert packed.shape == (packed_size(depth, columns),)
    for name in SETS:
        found = library.product(name, lhs, packed, columns, threads=threads)
        np.testing.assert_array_equal(found, wrapped(lhs, rhs), err_msg=name)


@needs_a_kernel
@pytest.mark.parametrize("name", SETS)
def test_sums_wrap_around_as_xlas_do(name):
    lhs, rhs = np.full((2, 140_003), -128, np.int8), np.full((140_003, 3), -128, np.int8)
    rhs[:, 1] = 127
    assert np.iinfo(np.int32).max < 128 * 128 * 140_003
    summed = lax.dot(jnp.asarray(lhs), jnp.asarray(rhs), preferred_element_type=jnp.int32)
    np.testing.assert_array_equal(library.product(name, lhs, pack(rhs), 3), summed)


@needs_a_kernel
@pytest.mark.parametrize("name", SETS)
def test_called_by_xla_from_several_threads(name):
    lhs, rhs = int8(130, 96), int8(96, 1_560)
    multiply = jax.jit(int8_matmul, static_argnums=2)
    library.use(name)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            calls = [threads.submit(multiply, lhs, pack(rhs), 1_560) for _ in range(24)]
            for call in calls:
                np.testing.assert_array_equal(call.result(), wrapped(lhs, rhs))
    finally:
        library.use(SETS[0])


@needs_a_kernel
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="there is no int8 kernel for 'sse9' here"):
        library.use("sse9")
    with pytest.raises(jax.errors.JaxRuntimeError, match="the operands do not fit 8 x 5"):
        int8_matmul(jnp.zeros((2, 8), jnp.int8), jnp.zeros(7, jnp.int8), 5).block_until_ready()


def contraction(axes, dtype=jnp.int32, lhs=materialized_on_cpu, out=materialized_on_cpu):
    def contract(x, w):
        return out(lax.dot_general(lhs(x), w, axes, preferred_element_type=dtype))

    return contract


def transposed(x, w):
    return contraction((((1,), (0,)), ((), ())))(x, w.T)


def in_a_function_of_its_own(x, w):
    return jax.jit(lambda x, w: 2 * contraction((((1,), (0,)), ((), ())))(x, w))(x, w)


def of_two_axes_that_are_not_the_last(x, w):
    return contraction((((1, 0), (0, 1)), ((), ())))(x, w)


def of_a_narrow_weight(x, w):
    return contraction((((1,), (0,)), ((), ())))(x, w.reshape(6, -1).astype(jnp.int8))


def by_platform(x, w):
    def of(y):
        return contraction((((1,), (0,)), ((), ())))(y, w)

    return lax.platform_dependent(x, cpu=of, default=lambda y: of(y) + 1)


def twice_in_two_layouts(x, w):
    return contraction((((1,), (0,)), ((), ())))(x, w) + transposed(x, w)


def looked_up_too(x, w):
    return contraction((((1,), (0,)), ((), ())))(x, w) + w[0]


def with_a_batch_axis(x, w):
    return contraction((((2,), (1,)), ((0,), (0,))))(x, w)


def with_float_sums(x, w):
    return contraction((((1,), (0,)), ((), ())), jnp.float32)(x, w)


def same(x):
    return x


INT4 = int8(48).clip(-8, 7).astype(jnp.int4)


@needs_a_kernel
@pytest.mark.parametrize(
    ("forward", "x", "w", "packing"),
    [
        (contraction((((1,), (0,)), ((), ()))), (3, 6), (6, 5), Packing((), (0,))),
        (contraction((((1,), (1,)), ((), ()))), (3, 6), (5, 6), Packing((), (1,))),
        (contraction((((2,), (1,)), ((), ()))), (2, 3, 6), (5, 6, 7), Packing((), (1,))),
        (transposed, (3, 6), (5, 6), Packing((("transpose", (1, 0)),), (0,))),
        (in_a_function_of_its_own, (3, 6), (6, 5), Packing((), (0,))),
        (of_two_axes_that_are_not_the_last, (2, 6, 3), (6, 2, 5), Packing((), (0, 1))),
        (of_a_narrow_weight, (3, 6), INT4, Packing((("reshape", (6, 8)),), (0,))),
        (by_platform, (3, 6), (6, 5), Packing((), (0,))),
        (twice_in_two_layouts, (3, 6), (6, 6), None),
        (looked_up_too, (3, 6), (6, 5), None),
        (with_a_batch_axis, (2, 3, 6), (2, 6, 5), None),
        (with_float_sums, (3, 6), (6, 5), None),
        (contraction((((1,), (0,)), ((), ()))), (3, 0), (0, 5), None),
        (contraction((((1,), (0,)), ((), ())), lhs=same), (3, 6), (6, 5), None),
        (contraction((((1,), (0,)), ((), ())), out=same), (3, 6), (6, 5), None),
    ],
)
def test_a_graph_with_the_kernel_gives_the_same_integers(forward, x, w, packing):
    x, w = int8(*x), w if isinstance(w, np.ndarray) else int8(*w)
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (w, x)]
    exporting = export.export(
        jax.jit(lambda weights, inputs: forward(inputs[0], weights[0])), platforms=("cpu", "tpu")
    )
    graph = exporting([structs[0]], [structs[1]])
    found = substituted(graph, 1)
    assert found.packed == ({0: packing} if packing else {})
    assert (library.TARGET in found.graph.mlir_module()) == bool(packing)
    weight = packing(w) if packing else w
    answer = jax.jit(found.graph.call)([weight], [x])
    np.testing.assert_array_equal(answer, jax.jit(graph.call)([w], [x]))


@needs_a_kernel
def test_what_is_read_and_what_the_kernel_computes_need_no_call():
    def forward(weights, inputs):
        w, scale = weights
        sums = contraction((((1,), (0,)), ((), ())))(inputs[0], w)
        return sums * materialized(scale) + materialized(inputs[0].sum() * scale)

    structs = [jax.ShapeDtypeStruct((6, 5), jnp.int8), jax.ShapeDtypeStruct((5,), jnp.float32)]
    x = jax.ShapeDtypeStruct((3, 6), jnp.int8)
    graph = export.export(jax.jit(forward), platforms=("cpu", "tpu"))(structs, [x])
    found = substituted(graph, 2)
    text = found.graph.mlir_module()
    call = "call @aqt_materialize"
    assert (graph.mlir_module().count(call), text.count(call)) == (4, 1)
    w, scale, x = int8(6, 5), np.float32(RNG.normal(size=5)), int8(3, 6)
    answer = jax.jit(found.graph.call)([pack(w), scale], [x])
    assert_same_bits(answer, jax.jit(graph.call)([w, scale], [x]))


@pytest.fixture
def linear(tmp_path):
    write_linear(tmp_path / "linear" / "1")
    return tmp_path / "linear" / "1"


@needs_a_kernel
def test_a_program_computes_with_the_kernel_in_the_same_bits(linear):
    loaded = bundle.load(linear)
    x = RNG.normal(size=(37, FEATURES)).astype(np.float32)
    by_kernel = Program(loaded, max_rows=16, kernel=True)
    by_xla = Program(loaded, max_rows=16, kernel=False)
    assert (by_kernel.kernel, by_xla.kernel) == (SETS[0], None)
    assert_same_bits(by_kernel({"x": x})["y"], by_xla({"x": x})["y"])


@pytest.fixture
def again(monkeypatch):
    """What was found of the kernel is found again, in this test and after it."""
    cached = (library.instruction_set, library.supported, library._library)
    for function in cached:
        function.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("missing", ["never compiled", "of another system", "turned off"])
def test_without_a_kernel_xla_computes_and_the_log_says_so_once(
    linear, tmp_path, again, caplog, missing
):
    if missing == "turned off":
        again.setenv("AQT_KERNELS", "off")
    else:
        again.setattr(library, "_FILE", tmp_path / "libaqt_kernels.so")
    if missing == "of another system":
        (tmp_path / "libaqt_kernels.so").write_bytes(b"not a library")
    caplog.set_level(logging.INFO, logger=library.__name__)
    loaded = bundle.load(linear)
    programs = [Program(loaded, max_rows=8, kernel=True) for _ in range(2)]
    (said,) = caplog.messages
    assert said.startswith("int8 contractions are computed by XLA")
    x = loaded.witness.inputs
    for program in programs:
        assert program.kernel is None
        assert_same_bits(program(x)["y"], loaded.witness.outputs["y"])


def test_an_instruction_set_that_is_not_there_is_refused(again):
    again.setenv("AQT_KERNELS", "sse9")
    with pytest.raises(ValueError, match="AQT_KERNELS is 'sse9': there is no int8 kernel for"):
        library.instruction_set()


@needs_a_kernel
def test_instructions_that_compute_something_else_are_left_out(again, caplog):
    computes = library._computes
    again.setattr(library, "_computes", lambda lib, name: name != SETS[0] and computes(lib, name))
    assert library.supported() == SETS[1:]
    assert f"computes wrong sums with ['{SETS[0]}']" in caplog.text
