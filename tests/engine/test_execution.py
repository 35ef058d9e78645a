"""A row's answer has the same bits in any company, and so does every row of any batch."""

import concurrent.futures
import dataclasses
import threading

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export, lax

from aqt_engine import bundle, calling_thread, graphs, pieces
from aqt_engine.arrays import aligned_zeros
from aqt_engine.convertible import Leaf, Serving
from aqt_engine.execution import Mode, Program, tile_buckets
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.slow

TILE = 4
FEATURES = 48
CLASSES = 5
POOL = 60
BOUND_S = 120.0
CUT = "cut into pieces"


def sensitive(weights, inputs):
    """Float sums over a row, the bits of which depend on the batch, and integers made of them."""
    first, second, scale = weights
    token, x = inputs
    h = jax.nn.softmax(jnp.tanh(x.astype(jnp.float32) @ first) + token[:, None])
    bound = jnp.max(jnp.abs(h), axis=1, keepdims=True) / 127.5
    q = jnp.round(jnp.clip(h * (1 / bound), -127, 127)).astype(jnp.int8)
    y = lax.dot_general(q, second, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    y = y.astype(jnp.float32) * bound * scale
    return [h.sum(axis=1) > 1, y.astype(jnp.bfloat16), y]


def pool():
    """Rows to draw batches from: ordinary ones first, then what could disturb a neighbor."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(POOL, FEATURES)).astype(ml_dtypes.bfloat16)
    token = rng.integers(-3, 4, POOL).astype(np.int32)
    largest = ml_dtypes.finfo(ml_dtypes.bfloat16).max
    for i, value in enumerate((0, largest, -largest, np.inf, -np.inf, np.nan)):
        x[POOL - 6 + i] = value
    token[-6:] = np.iinfo(np.int32).max
    return {"token": token, "x": x}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    rng = np.random.default_rng(1)
    weights = {
        "first": rng.normal(size=(FEATURES, FEATURES)).astype(np.float32),
        "second": rng.integers(-127, 128, (FEATURES, CLASSES), np.int8),
        "scale": rng.uniform(0.01, 0.02, (1, CLASSES)).astype(np.float32),
    }
    inputs = (
        bundle.TensorSpec(name="token", dtype="int32", shape=(bundle.BATCH,)),
        bundle.TensorSpec(name="x", dtype="bfloat16", shape=(bundle.BATCH, FEATURES)),
    )
    outputs = (
        bundle.TensorSpec(name="flag", dtype="bool", shape=(bundle.BATCH,)),
        bundle.TensorSpec(name="half", dtype="bfloat16", shape=(bundle.BATCH, CLASSES)),
        bundle.TensorSpec(name="y", dtype="float32", shape=(bundle.BATCH, CLASSES)),
    )
    first = {name: array[:TILE] for name, array in pool().items()}
    answers = jax.jit(sensitive)(list(weights.values()), list(first.values()))
    path = tmp_path_factory.mktemp("repository") / "sensitive" / "1"
    bundle.write(
        path,
        graph=export.export(jax.jit(sensitive), platforms=("cpu", "cuda", "tpu"))(
            [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights.values()],
            [spec.with_rows(TILE) for spec in inputs],
        ),
        inputs=inputs,
        outputs=outputs,
        tile=TILE,
        weights=weights,
        roles={"first": "float", "second": "qvalue", "scale": "scale"},
        float_nbytes=1,
        tools={"jax": jax.__version__},
        witness=bundle.Witness(
            inputs=first,
            outputs={s.name: np.asarray(a) for s, a in zip(outputs, answers, strict=True)},
        ),
    )
    return bundle.load(path)


@pytest.fixture(scope="module")
def alone(loaded):
    """What each row of the pool gets when it is the only one, computed without serving code."""
    at_tile = jax.jit(sensitive)
    answers = []
    for row in range(POOL):
        tile = []
        for array in pool().values():
            tile.append(np.zeros((TILE, *array.shape[1:]), array.dtype))
            tile[-1][0] = array[row]
        answers.append([np.asarray(a)[:1] for a in at_tile(list(loaded.weights), tile)])
    return {
        spec.name: np.concatenate([answer[i] for answer in answers])
        for i, spec in enumerate(loaded.manifest.outputs)
    }


@pytest.fixture(scope="module")
def programs(loaded):
    """For all rows at once, and for two tiles, so that larger batches are divided; cut for three.

    Those of CUT have pieces of up to four tiles, where there is a CPU that computes them.
    """
    found = {max_rows: Program(loaded, max_rows=max_rows) for max_rows in (100, 2 * TILE)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "ALONE_NBYTES", 0)
        patch.setattr(pieces, "threads", lambda: 3)
        return found | {CUT: Program(loaded, max_rows=15 * TILE)}


def test_batches_are_cut_into_pieces(programs):
    assert programs[CUT].sizes() == (
        (1, 2, 4) if calling_thread.is_possible() else (1, 2, 4, 8, 16)
    )


def assert_answers(program, alone, rows):
    found = program({name: array[rows] for name, array in pool().items()})
    assert list(found) == ["flag", "half", "y"]
    for name, array in found.items():
        assert_same_bits(array, alone[name][rows])
        assert array.shape == alone[name][rows].shape


@pytest.mark.parametrize("max_rows", [100, 2 * TILE, CUT])
def test_bits_do_not_depend_on_the_batch(programs, alone, max_rows):
    @hypothesis.given(st.lists(st.integers(0, POOL - 1), max_size=100))
    def check(rows):
        assert_answers(programs[max_rows], alone, np.array(rows, int))

    check()


def test_weights_that_were_set_aside_come_back(loaded, alone):
    program = Program(loaded, max_rows=TILE)
    assert_answers(program, alone, np.arange(TILE))
    with program.set_aside(loaded):
        pass
    assert_answers(program, alone, np.arange(TILE))


@pytest.mark.parametrize("max_rows", [100, 2 * TILE, CUT])
def test_every_number_of_rows_is_answered(programs, alone, max_rows):
    rng = np.random.default_rng(2)
    for count in range(101):
        assert_answers(programs[max_rows], alone, rng.integers(0, POOL, count))


def test_every_position_in_a_tile_and_every_neighbor(programs, alone):
    for neighbor in range(POOL - 7, POOL):
        for position in range(TILE):
            rows = np.full(TILE, neighbor)
            rows[position] = 0
            assert_answers(programs[100], alone, rows)


def test_rows_have_answers_of_their_own(alone):
    """Else the tests here could not see a row that was answered as another."""
    ordinary = alone["y"][: POOL - 6]
    assert np.isfinite(ordinary).all()
    assert len(np.unique(ordinary, axis=0)) == len(ordinary)


def test_no_rows_have_no_answers_of_the_right_shape(programs):
    found = programs[100]({name: array[:0] for name, array in pool().items()})
    assert {k: (v.shape, v.dtype.name) for k, v in found.items()} == {
        "flag": ((0,), "bool"),
        "half": ((0, CLASSES), "bfloat16"),
        "y": ((0, CLASSES), "float32"),
    }


def test_the_inputs_stay_as_they_were(programs):
    inputs = {name: array[:7] for name, array in pool().items()}
    for array in inputs.values():
        array.flags.writeable = False
    programs[100](inputs)
    for name, array in inputs.items():
        assert_same_bits(array, pool()[name][:7])


def test_rows_in_any_layout(programs, alone):
    inputs = {name: np.asfortranarray(np.repeat(a, 2, axis=0))[::-2] for name, a in pool().items()}
    found = programs[100](inputs)
    for name, array in found.items():
        assert_same_bits(array, alone[name][::-1])


@pytest.mark.parametrize("max_rows", [100, CUT])
def test_eight_threads_on_one_program(programs, alone, max_rows):
    in_eight_threads(programs[max_rows], alone)


def test_eight_threads_on_a_program_that_has_compiled_nothing(loaded, alone):
    in_eight_threads(Program(loaded, max_rows=TILE), alone)


def in_eight_threads(program, alone):
    start = threading.Barrier(8)

    def work(seed):
        rng = np.random.default_rng(seed)
        start.wait(BOUND_S)
        for _ in range(20):
            assert_answers(program, alone, rng.integers(0, POOL, rng.integers(0, 40)))

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(work, seed) for seed in range(8)]:
            future.result(BOUND_S)


def test_a_bucket_is_compiled_once(loaded, monkeypatch):
    program = Program(loaded, max_rows=8)
    lowered = []
    lower = Program._lowered_graph
    monkeypatch.setattr(
        Program, "_lowered_graph", lambda self, *of: lowered.append(of) or lower(self, *of)
    )
    program.compile(1)
    program.compile(1)
    program({name: array[:3] for name, array in pool().items()})
    assert len(lowered) == 1
    program({name: array[:5] for name, array in pool().items()})
    program.compile(2)
    assert len(lowered) == 2


@hypothesis.given(st.integers(1, 10**6), st.integers(2, 300))
def test_buckets_are_powers_of_two_and_just_hold_the_rows(max_rows, tile):
    buckets = tile_buckets(max_rows, tile)
    assert list(buckets) == [2**i for i in range(len(buckets))]
    assert buckets[-1] * tile >= max_rows
    assert buckets[-1] == 1 or buckets[-2] * tile < max_rows


@pytest.mark.parametrize(
    ("max_rows", "buckets"),
    [(1, (1,)), (4, (1,)), (5, (1, 2)), (16, (1, 2, 4)), (17, (1, 2, 4, 8))],
)
def test_executables_of_a_program(loaded, max_rows, buckets):
    """So small a model is computed at once, and not in pieces."""
    program = Program(loaded, max_rows=max_rows)
    assert program.sizes() == buckets
    assert program.max_rows == buckets[-1] * TILE


def lowered_for(loaded, *platforms):
    return dataclasses.replace(
        loaded, manifest=dataclasses.replace(loaded.manifest, platforms=platforms)
    )


@pytest.mark.parametrize(
    ("device", "platforms", "message"),
    [
        ("cpu", ("tpu",), "lowered for tpu and the device here is cpu: convert again"),
        ("cpu", ("cuda", "tpu"), "lowered for cuda, tpu and the device here is cpu"),
        ("gpu", ("cpu", "tpu"), "lowered for cpu, tpu and the device here is cuda"),
        ("tpu", ("cpu", "cuda"), "lowered for cpu, cuda and the device here is tpu"),
    ],
)
def test_another_platform_is_refused(loaded, monkeypatch, device, platforms, message):
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    with pytest.raises(bundle.BundleError, match=message):
        Program(lowered_for(loaded, *platforms), max_rows=8)


def test_a_gpu_takes_what_was_lowered_for_cuda(loaded, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert Program(lowered_for(loaded, "cuda"), max_rows=8).sizes() == (1, 2)


def test_mode_fast_computes_the_whole_batch_at_once(tmp_path):
    """A graph that subtracts the mean of all rows shows which rows were computed together."""

    def centered(weights, inputs):
        return [inputs[0] - inputs[0].mean(axis=0)]

    def graph(rows):
        x = jax.ShapeDtypeStruct((rows, 1), np.float32)
        return export.export(jax.jit(centered), platforms=("cpu", "cuda", "tpu"))(
            [jax.ShapeDtypeStruct((1,), np.float32)], [x]
        )

    x = np.arange(8, dtype=np.float32)[:, None]
    by_tile = np.concatenate([x[:4] - 1.5, x[4:] - 5.5])
    spec = bundle.TensorSpec(name="x", dtype="float32", shape=(bundle.BATCH, 1))
    bundle.write(
        tmp_path / "1",
        graph=graph(TILE),
        batched={(): graph(export.symbolic_shape("rows")[0])},
        inputs=(spec,),
        outputs=(dataclasses.replace(spec, name="y"),),
        tile=TILE,
        weights={"unused": np.zeros(1, np.float32)},
        roles={"unused": "float"},
        float_nbytes=4,
        tools={},
        witness=bundle.Witness(inputs={"x": x}, outputs={"y": by_tile}),
    )
    loaded = bundle.load(tmp_path / "1")
    assert_same_bits(Program(loaded, max_rows=8)({"x": x})["y"], by_tile)
    fast = Program(loaded, max_rows=8, mode=Mode.FAST)
    assert_same_bits(fast({"x": x})["y"], x - 3.5)
    assert_same_bits(fast({"x": x[:4]})["y"], x[:4] - 1.5)


def test_mode_fast_needs_a_graph_for_any_number_of_rows(loaded):
    with pytest.raises(bundle.BundleError, match="no graph for any number of rows"):
        Program(loaded, max_rows=TILE, mode=Mode.FAST)


def test_why_there_is_no_graph_for_any_number_of_rows_is_told(loaded):
    counting = Serving(
        leaves=[Leaf(name="w", value=jnp.ones(1), role="float")],
        forward=lambda weights, inputs: inputs["x"] * weights[0] * len(inputs["x"]),
    )
    made = graphs.exported(counting, {(): {"x": jax.ShapeDtypeStruct((TILE, 1), np.float32)}})
    assert made.at_tile
    assert not made.batched
    told = dataclasses.replace(loaded.manifest, not_batched=made.not_batched)
    with pytest.raises(bundle.BundleError, match=r"cannot be traced so \(\w+Error: .*rows"):
        Program(dataclasses.replace(loaded, manifest=told), max_rows=TILE, mode=Mode.FAST)


@pytest.mark.parametrize("dtype", ["float32", "int8", "bool", "bfloat16"])
def test_a_batch_lies_where_an_executable_reads_it(dtype):
    batch = aligned_zeros((3, 2, 5), np.dtype(dtype))
    assert batch.shape == (3, 2, 5)
    assert batch.dtype == dtype
    assert not batch.any()
    placed = jax.device_put(batch)
    if placed.devices().pop().platform == "cpu":
        assert placed.unsafe_buffer_pointer() == batch.ctypes.data
