"""What takes no time is computed in the thread that calls: the same code, weights and bits."""

import itertools
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


@pytest.fixture(scope="module")
def product():
    """A traced function of weights and inputs, and its executable."""
    traced = jax.jit(lambda weights, inputs: [jnp.tanh(inputs[0] @ weights[0])]).trace([W], [X])
    return traced, traced.lower().compile()


def clock(*seconds):
    """One that says that calls took so long, one after the other, again and again."""
    now, took = 0.0, itertools.cycle(seconds)
    while True:
        yield now
        now += next(took)
        yield now


def moved(product, *seconds):
    """What comes of an executable that takes the first, and the others in turns with the moved."""
    traced, compiled = product
    ticks = clock(*seconds)
    return calling_thread.quicker(
        compiled, traced, [jax.device_put(W)], [X], clock=lambda: next(ticks)
    )


QUICK = calling_thread.WORTH_S / 10


def test_what_is_quicker_there_is_moved_with_the_same_bits(product):
    # The first time is of the executable alone.
    here = moved(product, QUICK, *([QUICK, QUICK / 2] * 5))
    weights = [jax.device_put(W)]
    there = calling_thread.shared(weights)
    assert there[0].devices() == {calling_thread.device()}
    assert there[0].unsafe_buffer_pointer() == weights[0].unsafe_buffer_pointer()
    assert_same_bits(here(there, [X])[0], product[1](weights, [X])[0])


def test_what_is_no_quicker_there_or_takes_long_is_not(product):
    assert moved(product, QUICK, *([QUICK, QUICK * 2] * 5)) is None
    assert moved(product, 2 * calling_thread.WORTH_S) is None


def test_weights_that_would_be_copied_are_not_shared():
    weights = [jax.device_put(W), jnp.arange(-4, 4).astype(jnp.int4)]
    assert calling_thread.shared(weights[:1]) is not None
    assert calling_thread.shared(weights) is None


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A program whose executables are all found to be quicker in the calling thread."""

    def seconds(executable, weights, *_):
        return QUICK / 2 if weights[0].devices() == {calling_thread.device()} else QUICK

    monkeypatch.setattr(calling_thread, "_seconds", seconds)
    write_linear(tmp_path / "m" / "1")
    loaded = bundle.load(tmp_path / "m" / "1")
    return loaded, Program(loaded, max_rows=4 * TILE)


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
