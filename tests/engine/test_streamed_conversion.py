"""What is larger than memory: read few at a time, quantized in turn, and kept in mapped files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training import train_state

from aqt_engine.checkpoint import load_variables
from aqt_engine.spool import spool
from aqt_engine.streaming import as_it_is, frugal, in_turn
from engine.contractions import assert_same_bits

RNG = np.random.default_rng(0)


def folded(weights):
    """Two results of each weight, which belong together, and one of all."""
    scales = {name: jnp.max(jnp.abs(w), axis=0) / 127 for name, w in weights.items()}
    values = {n: jnp.round(w / scales[n]).astype(jnp.int8) for n, w in weights.items()}
    return {"values": values, "scales": scales, "mean": sum(w.mean() for w in weights.values())}


def test_results_in_turn_are_those_of_one_program():
    weights = {f"w{i}": RNG.normal(size=(64, 32)).astype(np.float32) for i in range(5)}
    kept = []

    def keep(array):
        kept.append(array.nbytes)
        return np.asarray(array)

    jax.tree.map(
        assert_same_bits, in_turn(folded, keep, weights), in_turn(folded, as_it_is, weights)
    )
    assert sum(kept) == 5 * (64 * 32 + 32 * 4) + 4


def test_a_frugal_program_quantizes_a_weight_when_it_is_its_turn():
    def forward(weights, x):
        for w in weights:
            scale = jnp.max(jnp.abs(w)) / 127
            q = jnp.round(w / scale).astype(jnp.int8)
            sums = jax.lax.dot(jnp.round(x).astype(jnp.int8), q, preferred_element_type=jnp.int32)
            x = sums.astype(jnp.float32) * scale
        return x

    weights = [RNG.normal(size=(256, 256)).astype(np.float32) for _ in range(6)]
    x = RNG.normal(size=(4, 256)).astype(np.float32)
    assert_same_bits(frugal(forward)(weights, x), jax.jit(forward)(weights, x))
    held = frugal(forward).lower(weights, x).compile().memory_analysis().temp_size_in_bytes
    assert held < 3 * 256 * 256


def test_only_what_was_trained_is_read_and_each_array_is_kept_elsewhere(tmp_path):
    params = {f"layer_{i}": {"kernel": np.full((4, 4), i, np.float32)} for i in range(3)}
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    kept = []

    def keep(array):
        kept.append(array)
        return array + 1

    loaded = load_variables(tmp_path / "state", keep)["params"]
    assert len(kept) == 3
    for i in range(3):
        np.testing.assert_array_equal(loaded[f"layer_{i}"]["kernel"], np.full((4, 4), i + 1))


def test_a_spool_leaves_nothing_behind(tmp_path):
    array = RNG.normal(size=(300, 300)).astype(np.float32)

    def failing():
        with spool(tmp_path / "model" / "1") as spooled:
            kept.append(spooled.keep(array))
            found.extend(tmp_path.glob(".spool*/*"))
            raise KeyError

    kept, found = [], []
    with pytest.raises(KeyError):
        failing()
    assert len(found) == 1
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(kept[0], array)
    assert not kept[0].flags.writeable
    # As executables take it, where it is mapped.
    assert jax.device_put(kept[0]).unsafe_buffer_pointer() == kept[0].ctypes.data
