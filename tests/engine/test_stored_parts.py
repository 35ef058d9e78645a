"""Parts of the arrays of a bundle: read from its files, and no more than the parts."""

import jax
import numpy as np
import pytest

from aqt_engine import arrays, bundle
from engine.contractions import assert_same_bits

DTYPES = ("int8", "int16", "float32", "bool", "int4")


@pytest.fixture
def read(monkeypatch):
    """Bytes that were asked of files, each time."""
    asked = []

    def filled(stream, memory, original=arrays._filled):
        asked.append(memory.nbytes)
        return original(stream, memory)

    monkeypatch.setattr(arrays, "_filled", filled)
    return asked


def stored(path, *values):
    arrays.save(path / "arrays", list(values))
    return arrays.load(path / "arrays")


def random(shape, dtype):
    values = np.random.default_rng(0).integers(-8, 8, shape)
    return values.astype(jax.numpy.dtype(dtype))


def cuts(shape):
    """Each axis in parts, all others whole."""
    whole = [slice(None)] * len(shape)
    for axis, size in enumerate(shape):
        for count in (c for c in range(2, size + 1) if size % c == 0):
            part = size // count
            for i in range(count):
                yield (*whole[:axis], slice(i * part, (i + 1) * part), *whole[axis + 1 :])
    yield tuple(whole)


@pytest.mark.parametrize("at_once", [1, 100, 2**22])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_has_the_bits_that_the_whole_has_there(tmp_path, monkeypatch, dtype, at_once):
    monkeypatch.setattr(arrays, "_AT_ONCE", at_once)
    for i, shape in enumerate([(12,), (4, 6), (2, 3, 8), (1, 6, 1, 2)]):
        whole = random(shape, dtype)
        (tmp_path / str(i)).mkdir()
        kept = stored(tmp_path / str(i), whole)
        for cut in cuts(shape):
            part = kept.part(0, cut)
            assert_same_bits(part, whole[cut])
            assert part.flags.c_contiguous
            assert part.ctypes.data % 64 == 0


@pytest.mark.parametrize("axis", [0, 1])
def test_of_a_file_only_the_part_is_read(tmp_path, read, axis):
    whole = random((64, 32768), "int8")
    kept = stored(tmp_path, whole)
    cut = (slice(16, 32), slice(None)) if axis == 0 else (slice(None), slice(8192, 16384))
    assert_same_bits(kept.part(0, cut), whole[cut])
    assert sum(read) == whole.nbytes // 4
    assert len(read) == (1 if axis == 0 else 64)


def test_short_runs_are_read_together_and_a_little_at_a_time(tmp_path, read, monkeypatch):
    monkeypatch.setattr(arrays, "_AT_ONCE", 2**16)
    whole = random((4096, 64), "int8")
    kept = stored(tmp_path, whole)
    cut = (slice(None), slice(48, 64))
    assert_same_bits(kept.part(0, cut), whole[cut])
    assert len(read) == 4
    assert max(read) <= 2**16


@pytest.mark.parametrize("cut", [(slice(8, 16), slice(None)), (slice(None), slice(2, 4))])
def test_a_file_that_is_cut_short_meanwhile_is_told_of(tmp_path, cut):
    kept = stored(tmp_path, random((16, 4), "int8"))
    file = tmp_path / "arrays" / "0" / "0.0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(bundle.BundleError, match="was written over while it was read"):
        kept.part(0, cut)


def test_a_file_that_is_written_over_meanwhile_is_told_of(tmp_path):
    kept = stored(tmp_path, random((16, 4), "int8"))
    file = tmp_path / "arrays" / "0" / "0.0"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(bundle.BundleError, match="was written over while it was read"):
        kept.part(0, (slice(0, 8), slice(None)))


def test_arrays_in_memory_have_parts_too():
    whole = random((4, 6), "int8")
    kept = arrays.Stored.held([whole])
    assert_same_bits(kept[0], whole)
    assert_same_bits(kept.part(0, (slice(2, 4), slice(None))), whole[2:])
