"""Arrays that commands read from files."""

import ml_dtypes
import numpy as np
import pytest

from aqt_cli.sources import read_arrays
from aqt_engine.convert import ConversionError


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
