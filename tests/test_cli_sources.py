"""Arrays and variables that commands read from files."""

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from aqt_cli.models import load_model
from aqt_cli.sources import read_arrays
from aqt_engine.convert import ConversionError
from aqt_engine.modes import QuantMode


def test_arrays_come_back_as_they_were_saved(tmp_path):
    saved = {
        "a": np.arange(6, dtype=np.int32).reshape(2, 3),
        "b": np.array([True, False]),
        "c": np.array([1.5, -0.0, np.nan], ml_dtypes.bfloat16),
    }
    np.savez(tmp_path / "arrays.npz", **saved)
    found = read_arrays(tmp_path / "arrays.npz")
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in saved.items()}
    assert all(found[name].tobytes() == array.tobytes() for name, array in saved.items())


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([1.0], ml_dtypes.float8_e4m3fn)])
def test_an_array_that_is_no_number_is_refused_by_name(tmp_path, array):
    np.savez(tmp_path / "arrays.npz", first=array)
    with pytest.raises(ConversionError, match="save numbers"):
        read_arrays(tmp_path / "arrays.npz")


class Boxed(nn.Module):
    """Parameters with names for their axes, of both kinds, and one that is called `value`."""

    mode: QuantMode = QuantMode.TRAIN

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "m")))(x)
        x = nn.Dense(2, bias_init=nn.with_logical_partitioning(nn.initializers.ones, ("e",)))(x)
        return Shift(name="shift")(x)


class Shift(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("value", nn.initializers.ones, (2,))


def test_boxes_of_metadata_that_orbax_saved_are_opened(tmp_path):
    x = np.ones((4, 5), np.float32)
    variables = Boxed().init(jax.random.key(0), x)
    state = {"params": variables["params"], "opt_state": {}, "step": 3}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", state)
    _, found = load_model(f"{__name__}:Boxed", tmp_path / "checkpoint", example={"x": x})
    expected = nn.meta.unbox({"params": variables["params"]})
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
