"""Memory that client and server share, on one machine: what is in it does not go over the wire."""

import dataclasses
import math
import mmap
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from aqt_protos import tensors

_OBJECTS = Path("/dev/shm")  # where Linux shows the objects of POSIX shared memory
_ALIGNMENT = 64

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedTensor:
    """A place for one tensor in shared memory: an input, or where an output is to go.

    `array` is the memory itself. What is written to it before a call is what the server reads, and
    an output that was put there is overwritten by the next.
    """

    array: Array
    region: str
    offset: int

    def read(self, datatype: tensors.Datatype, shape: Sequence[int]) -> Array:
        """What the server put here, read-only.

        Raises:
          ValueError: it is larger than the place, or is text.
        """
        if datatype.dtype.hasobject:
            raise ValueError("it is text, which is not read from shared memory")
        nbytes = math.prod(shape) * datatype.dtype.itemsize
        if nbytes > self.array.nbytes:
            raise ValueError(f"it has {nbytes} bytes in shared memory, of {self.array.nbytes}")
        whole = self.array.reshape(-1).view(np.uint8)
        found = whole[:nbytes].view(datatype.dtype).reshape(tuple(shape))
        found.flags.writeable = False
        return found


class Region:
    """A piece of shared memory that a server knows, from which places are taken one after another.

    It lasts as long as an array in it does.
    """

    def __init__(self, nbytes: int, address: str | Sequence[str]):
        """Makes the memory for the server at `address`, under a name that `unlink` takes away.

        Raises:
          ValueError: `nbytes` is not positive, or there are several servers.
          OSError: the system has no shared memory, or not so much of it.
        """
        if nbytes < 1:
            raise ValueError(f"`nbytes` must be at least 1, got {nbytes!r}")
        if not isinstance(address, str):
            raise ValueError(
                "shared memory is known to the one server that it is told to, and this client has "
                "a list of addresses: give it one 'host:port'"
            )
        self.name = f"aqt-client-{uuid.uuid4().hex}"
        self.key = f"/{self.name}"
        self.nbytes = nbytes
        self._used = 0
        # For this user alone, under whom the server has to run.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Not only made so long: a page that the system has not would end the process later.
            os.posix_fallocate(descriptor, 0, nbytes)
            self._memory = mmap.mmap(descriptor, nbytes)
        except OSError:
            self.unlink()
            raise
        finally:
            os.close(descriptor)

    @property
    def _path(self) -> Path:
        return _OBJECTS / self.name

    def unlink(self) -> None:
        """Takes the name away; who has opened the memory keeps it."""
        self._path.unlink()

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> SharedTensor:
        """A place for an array of `shape`, as an output is; what is in it is not defined.

        Raises:
          ValueError: there is not so much left, or the dtype has no size or is none of the
            protocol's.
        """
        kind = tensors.datatype_of(np.dtype(dtype)).dtype
        if kind.hasobject:
            raise ValueError("text has no fixed size in shared memory: send it in the message")
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        needed = math.prod(shape) * kind.itemsize
        if start + needed > self.nbytes:
            raise ValueError(
                f"an array of shape {list(shape)} takes {needed} bytes, and {self.nbytes - start} "
                f"of the {self.nbytes} in shared memory are left: ask for more"
            )
        self._used = start + needed
        array = np.ndarray(tuple(shape), kind, buffer=self._memory, offset=start)
        return SharedTensor(array=array, region=self.name, offset=start)

    def put(self, value: ArrayLike) -> SharedTensor:
        """A place with a copy of the array, as an input is.

        Raises:
          ValueError: as `empty`.
        """
        given = np.asarray(value)
        place = self.empty(given.shape, given.dtype)
        place.array[...] = given
        return place
