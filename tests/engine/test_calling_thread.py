"""What takes no time is computed in the thread that calls: the same code, weights and bits."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import bundle, calling_thread
from aqt_engine.arrays import aligned_zeros
from aqt_engine.execution import Program
from bundles import FEATURES, TILE, write_linear
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="other devices have no thread to save"
)


def aligned(values):
    array = aligned_zeros(values.shape, values.dtype)
    array[...] = values
    return array


X = aligned(np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32))
W = aligned(np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32))


def test_the_same_is_computed_there_of_the_same_memory():
    traced = jax.jit(lambda weights, inputs: [jnp.tanh(inputs[0] @ weights[0])]).trace([W], [X])
    weights = [jax.device_put(W)]
    there = calling_thread.shared(weights)
    assert there[0].devices() == {calling_thread.device()}
    assert there[0].unsafe_buffer_pointer() == weights[0].unsafe_buffer_pointer()
    found = calling_thread.compiled(traced)
    assert_same_bits(found(there, [X])[0], traced.lower().compile()(weights, [X])[0])


def test_weights_that_would_be_copied_are_not_shared():
    weights = [jax.device_put(W), jnp.arange(-4, 4).astype(jnp.int4)]
    assert calling_thread.shared(weights[:1]) is not None
    assert calling_thread.shared(weights) is None


@pytest.fixture
def loaded(tmp_path):
    write_linear(tmp_path / "m" / "1")
    return bundle.load(tmp_path / "m" / "1")


@pytest.fixture
def quick(loaded):
    """A program whose executables are all quick."""
    return loaded, Program(loaded, max_rows=4 * TILE)


def nbytes_of_a_tile(loaded):
    """What XLA counts for one, where no tile is quick."""
    counted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calling_thread, "QUICK_BYTES", 0)
        count = calling_thread.nbytes_accessed
        patch.setattr(
            calling_thread,
            "nbytes_accessed",
            lambda lowered: counted.append(count(lowered)) or counted[-1],
        )
        program = Program(loaded, max_rows=4 * TILE)
        for bucket in program.buckets:
            program.compile(bucket)
            assert not program.in_calling_thread(bucket)
    # The loop over tiles is counted once, whatever they are.
    assert max(counted) < 2 * counted[0]
    return counted[0]


def test_what_reads_and_writes_little_in_all_its_tiles_is_computed_there(loaded, monkeypatch):
    monkeypatch.setattr(calling_thread, "QUICK_BYTES", 3 * nbytes_of_a_tile(loaded))
    program = Program(loaded, max_rows=16 * TILE)
    for bucket in program.buckets:
        program.compile(bucket)
    assert program.buckets == (1, 2, 4, 8, 16)
    found = [program.in_calling_thread(bucket) for bucket in program.buckets]
    assert found[0]
    assert not any(found[2:])


def test_every_program_finds_the_same_to_be_quick(loaded):
    """No clock decides, so that a cache has what the next start compiles."""
    for program in [Program(loaded, max_rows=16 * TILE) for _ in range(2)]:
        for bucket in program.buckets:
            program.compile(bucket)
            assert program.in_calling_thread(bucket) == (bucket <= calling_thread.QUICK_TILES)


def test_a_program_computes_there_as_it_does_elsewhere(quick, monkeypatch):
    loaded, program = quick
    x = {"x": np.random.default_rng(2).normal(size=(4 * TILE, FEATURES)).astype(np.float32)}
    program(x)
    assert program.in_calling_thread(program.buckets[-1])
    monkeypatch.setattr(calling_thread, "is_possible", lambda: False)
    elsewhere = Program(loaded, max_rows=4 * TILE)
    for rows in (1, TILE, 3 * TILE + 1, 4 * TILE):
        part = {"x": x["x"][:rows]}
        assert_same_bits(program(part)["y"], elsewhere(part)["y"])
    assert not elsewhere.in_calling_thread(program.buckets[-1])


def test_weights_that_were_set_aside_are_shared_again(quick):
    loaded, program = quick
    x = {"x": np.ones((1, FEATURES), np.float32)}
    before = program(x)["y"]
    with program.set_aside(loaded):
        pass
    assert_same_bits(program(x)["y"], before)


def test_threads_call_at_once(quick):
    _, program = quick
    inputs = np.random.default_rng(3).normal(size=(8, 1, FEATURES)).astype(np.float32)
    expected = [program({"x": x})["y"] for x in inputs]
    found = {}

    def call(i):
        for _ in range(20):
            found[i] = program({"x": inputs[i]})["y"]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, answer in enumerate(expected):
        assert_same_bits(found[i], answer)
