"""An executable of a CPU computes in the thread that calls: the same code and the same bits."""

import contextlib
import functools
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import bundle, calling_thread
from aqt_engine.execution import Program
from bundles import FEATURES, TILE, write_linear
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="other devices have no thread to save"
)
X = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8, jnp.int4])
def test_the_same_is_computed_there(dtype):
    values = np.random.default_rng(1).integers(-8, 8, size=(8, 3)).astype(dtype)
    function = jax.jit(lambda w, x: jnp.tanh(x @ w.astype(jnp.float32)))
    with calling_thread.chosen():
        weight = jax.device_put(values)
        found = calling_thread.compiled(function.lower(weight, X))
    assert weight.devices() == {calling_thread.device()}
    assert_same_bits(found(weight, X), function(values, X))


def test_what_is_asked_for_comes_from_the_thread_that_calls():
    """JAX's own client has gone on before the answer is there, and this one has not."""
    told = []

    def tell(x):
        told.append(threading.get_ident())
        return x

    def function(x):
        return jax.pure_callback(tell, jax.ShapeDtypeStruct(X.shape, X.dtype), x)

    with calling_thread.chosen():
        calling_thread.compiled(jax.jit(function).lower(X))(X)
    assert told == [threading.get_ident()]


def test_threads_that_ask_at_once_have_the_same_client(monkeypatch):
    """Else the weights that one places are copied in each call of what the other compiles."""
    made, others = [], threading.Barrier(2)

    @functools.cache
    def client():
        device = object()
        made.append(device)
        with contextlib.suppress(threading.BrokenBarrierError):
            # Nobody comes while another makes it.
            others.wait(0.2)
        return types.SimpleNamespace(devices=lambda: [device])

    monkeypatch.setattr(calling_thread, "_client", client)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: calling_thread.device(), range(2)))
    assert found == made * 2


def test_a_program_computes_there_as_it_does_elsewhere(tmp_path, monkeypatch):
    write_linear(tmp_path / "m" / "1")
    loaded = bundle.load(tmp_path / "m" / "1")
    x = np.random.default_rng(2).normal(size=(4 * TILE, FEATURES)).astype(np.float32)
    there = Program(loaded, max_rows=4 * TILE)
    monkeypatch.setattr(calling_thread, "is_possible", lambda: False)
    elsewhere = Program(loaded, max_rows=4 * TILE)
    devices = [next(iter(w.devices())) for p in (there, elsewhere) for w in p._weights[()]]
    assert set(devices) == {calling_thread.device(), jax.local_devices()[0]}
    for rows in (1, TILE, 3 * TILE + 1, 4 * TILE):
        assert_same_bits(there({"x": x[:rows]})["y"], elsewhere({"x": x[:rows]})["y"])
