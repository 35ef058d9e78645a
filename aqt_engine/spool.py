"""Arrays in files that are mapped: memory that the system can take away and read again.

What is converted may be larger than memory. So arrays that are needed for long, the weights as they
were trained and as they are served, lie in files of a directory that is removed at the end, and
executables on a CPU read them where they are mapped, as each mapping begins at a page. Nobody else
writes these files, which could end who reads them.
"""

import contextlib
import mmap
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from aqt_engine.files import onto, unfinished

Array = np.ndarray[Any, Any]
_FEW = 2**18


class Spool:
    """A directory of arrays."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._count = 0

    def keep(self, array: Any) -> Array:
        """The same values, in a file of their own unless they are few. They cannot be changed.

        Raises:
          OSError: there is no room for it.
        """
        values = np.ascontiguousarray(array).reshape(np.shape(array))
        if values.nbytes < _FEW:
            return values
        file = self._directory / str(self._count)
        self._count += 1
        with onto(file):
            file.write_bytes(values.reshape(-1).view(np.uint8).data)
        return mapped(file, values.shape, values.dtype)


def mapped(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The array that is all of `file`, as it lies there; the file may be removed meanwhile."""
    with file.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)


@contextlib.contextmanager
def spool(target: Path) -> Generator[Spool]:
    """A spool on the disk of `target`, which need not be there yet.

    It is removed at the end of the block; where the process is killed before, by whoever makes the
    next one there.
    """
    parent = next(p for p in target.absolute().parents if p.is_dir())
    with unfinished(parent, "spool") as directory:
        yield Spool(directory)
