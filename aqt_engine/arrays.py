"""Arrays in a bundle: an Orbax checkpoint of which each array is one file, as it lies in memory.

Orbax writes it, without compression, under the number of each array in its order; whoever has Orbax
can restore it. A bundle's reader needs neither Orbax nor a second copy: the bytes of each file are
read when they are asked for, to where executables on a CPU take them as they are, and no more of
them than the part that a device holds. They are not mapped: a file that is cut short or written
over would end the server, or change its answers.
"""

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast, overload

import jax
import numpy as np

from aqt_engine import spool
from aqt_engine.files import BundleError

Array = np.ndarray[Any, Any]
Cut = tuple[slice, ...]
"""A part of an array, cut along one axis at most: a slice for each axis."""
_ALIGNMENT = 64
_AT_ONCE = 2**22
_PAGE = 2**12


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros at an address that executables on a CPU read from; others they copy."""
    return _aligned(np.zeros(_nbytes(shape, dtype) + _ALIGNMENT, np.uint8), shape, dtype)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The same with anything in it."""
    return _aligned(np.empty(_nbytes(shape, dtype) + _ALIGNMENT, np.uint8), shape, dtype)


def _aligned(memory: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + _nbytes(shape, dtype)].view(dtype).reshape(shape)


def _nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return math.prod(shape) * dtype.itemsize


def save(path: Path, arrays: Sequence[Array]) -> None:
    """Writes `arrays`, none of which is empty, to the new directory `path`."""
    # Orbax takes a third as long to import as JAX, and only who writes needs it.
    import orbax.checkpoint as ocp
    from etils import epath

    path.mkdir()
    tree = {str(i): np.asarray(array) for i, array in enumerate(arrays)}
    # It would copy all arrays to write them beside what else is done, and nothing is.
    numpy = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    most = max((array.nbytes for array in tree.values()), default=0)
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=False,
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, numpy), (jax.Array, ocp.type_handlers.ArrayHandler())
        ),
        save_concurrent_gb=cast(int, max(most, _AT_ONCE) / 10**9),
    )
    # Without a checkpointer, which makes a whole directory visible at once: so does the bundle.
    handler.save(epath.Path(path), args=ocp.args.PyTreeSave(tree))
    handler.close()


class _Readable(Protocol):
    def read(self, cut: Cut = ...) -> Array: ...


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """An array that is kept in memory."""

    array: Array

    def read(self, cut: Cut = ()) -> Array:
        return self.array[cut]


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """An array in a file, which is as it was found."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    found: tuple[int, ...]
    mapped: bool

    def read(self, cut: Cut = ()) -> Array:
        if self.mapped:
            return spool.mapped(self.path, self.shape, self.dtype)[cut]
        sizes = self.shape
        every = cut or (slice(None),) * len(sizes)
        bounds = [of.indices(size)[:2] for of, size in zip(every, sizes, strict=True)]
        cuts = [i for i, size in enumerate(sizes) if bounds[i] != (0, size)]
        axis = min(cuts, default=0)
        assert len(cuts) <= 1, f"{self.path} is cut along one axis at most, and not by {cut}"
        array = aligned_zeros(tuple(end - start for start, end in bounds), self.dtype)
        # A run is what the part has at one index of all axes before `axis`.
        whole = self._read_runs(
            array.reshape(-1).view(np.uint8).reshape(math.prod(sizes[:axis]), -1),
            start=bounds[axis][0] * _nbytes(sizes[axis + 1 :], self.dtype) if cuts else 0,
            stride=_nbytes(sizes[axis:], self.dtype),
        )
        if not whole or _as_it_is(self.path) != self.found:
            raise BundleError(
                f"{self.path} was written over while it was read: write another version instead"
            )
        return array

    def _read_runs(self, runs: Array, *, start: int, stride: int) -> bool:
        """Whether the file had all of `runs`, the first at `start`, which it is read into.

        What lies between runs is read too where they are shorter than a page, as disks do so.
        """
        length = runs.shape[1]
        at_once = max(1, _AT_ONCE // stride) if length < _PAGE else 1
        with self.path.open("rb", buffering=0) as stream:
            for first in range(0, len(runs), at_once):
                some = runs[first : first + at_once]
                stream.seek(start + first * stride)
                if len(some) == 1:
                    if not _filled(stream, some[0]):
                        return False
                    continue
                between = np.empty((len(some), stride), np.uint8)
                if not _filled(stream, between.reshape(-1)[: length - stride or None]):
                    return False
                some[:] = between[:, :length]
        return True


def _filled(stream: io.FileIO, memory: Array) -> bool:
    """Whether there was enough in `stream` for all of `memory`, which it is read into."""
    left = memory.data
    while left.nbytes:
        # Linux reads 2 GB at once at most.
        if not (read := stream.readinto(left)):
            return False
        left = left[read:]
    return True


class Stored(Sequence[Array]):
    """Arrays in files, each read anew whenever it is asked for: who reads one keeps only that.

    They lie at addresses that executables read from.

    Raises:
      BundleError: on reading, the file is not what it was.
      OSError: it cannot be read.
    """

    def __init__(self, files: Sequence[_Readable]):
        self._files = files

    @classmethod
    def held(cls, arrays: Sequence[Array]) -> "Stored":
        """`arrays` that are kept in memory, as if they were read."""
        return cls([_Held(array) for array in arrays])

    def part(self, index: int, cut: Cut) -> Array:
        """What `cut` has of an array: only that is read of its file, and is in memory."""
        return self._files[index].read(cut)

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> "Stored": ...
    def __getitem__(self, index: int | slice) -> "Array | Stored":
        if isinstance(index, slice):
            return Stored(self._files[index])
        return self._files[index].read()


def load(path: Path, *, mapped: bool = False) -> Stored:
    """The arrays that `save` wrote at `path`; `mapped`, if nobody else can write there.

    Raises:
      ValueError: they are stored otherwise.
      OSError: one cannot be found.
    """
    count = sum(entry.is_dir() for entry in path.iterdir())
    return Stored([_file(path / str(i), mapped) for i in range(count)])


def _file(path: Path, mapped: bool) -> _File:
    form = json.loads((path / ".zarray").read_text())
    shape, dtype = tuple(form["shape"]), np.dtype(form["dtype"])
    file = path / (".".join("0" * len(shape)) or "0")
    whole = (form["compressor"], form["order"], form["chunks"]) == (None, "C", form["shape"])
    if not whole or file.stat().st_size != _nbytes(shape, dtype):
        raise ValueError(f"{file} is not one whole array of {dtype}{list(shape)}")
    return _File(file, shape, dtype, _as_it_is(file), mapped)


def _as_it_is(file: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def by_name(path: Path) -> bool:
    """Whether the arrays at `path` are stored by their names and in parts, as formats 1 and 2."""
    return (path / "manifest.ocdbt").exists()


def restore(path: Path) -> dict[str, Array]:
    """Arrays by name, of any checkpoint, by Orbax."""
    import orbax.checkpoint as ocp

    # Alone: by itself it waits for the other processes of JAX's, who read other files, or none.
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"host{here}"
    )
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        return {k: np.asarray(v) for k, v in checkpointer.restore(path.absolute()).items()}
