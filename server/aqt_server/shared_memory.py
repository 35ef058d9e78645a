"""System shared memory: tensors that a client on the same machine leaves in, and finds in, memory.

A region is part of a POSIX shared memory object, which Linux shows as a file in /dev/shm. It is
read and written through its descriptor, not mapped: to touch a mapped page that the client has
truncated away would end the server, where a read just comes back short. The bytes are copied once
either way, since what a client may still change cannot be computed with.
"""

import dataclasses
import os
import stat
import weakref
from pathlib import Path

from aqt_server import parameters
from aqt_server.errors import AlreadyExists, InvalidRequest, NotFound

_OBJECTS = Path("/dev/shm")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Region:
    """`nbytes` bytes of the object `key`, from `offset`. Open for as long as someone holds it."""

    name: str
    key: str
    offset: int
    nbytes: int
    descriptor: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The part of a region that holds one tensor of `owner`, `nbytes` from `offset` on."""

    region: Region
    offset: int
    nbytes: int
    owner: str

    def read(self) -> bytes:
        """A copy of its bytes.

        Raises:
          InvalidRequest: the client has truncated the object.
        """
        content = bytearray(self.nbytes)
        view = memoryview(content)
        start = self.region.offset + self.offset
        done = 0
        while done < self.nbytes:
            count = os.preadv(self.region.descriptor, [view[done:]], start + done)
            if not count:
                raise self._truncated()
            done += count
        return bytes(content)

    def write(self, content: bytes) -> None:
        """Puts `content` at its beginning.

        Raises:
          InvalidRequest: it is too small for that, or the client has truncated the object.
        """
        if len(content) > self.nbytes:
            raise InvalidRequest(
                f"{self.owner} takes {len(content)} bytes, and its part of region "
                f"{self.region.name!r} has {self.nbytes}: give it a larger one"
            )
        start = self.region.offset + self.offset
        # A write beyond the end would make the object longer again.
        if os.fstat(self.region.descriptor).st_size < start + len(content):
            raise self._truncated()
        view = memoryview(content)
        done = 0
        while done < len(content):
            done += os.pwrite(self.region.descriptor, view[done:], start + done)

    def _truncated(self) -> InvalidRequest:
        return InvalidRequest(
            f"the object {self.region.key!r} of region {self.region.name!r} became shorter than "
            f"{self.owner} needs after it was registered: register it again"
        )


class Regions:
    """The registered regions by name; no tensor in them may be larger than `max_tensor_bytes`."""

    def __init__(self, max_tensor_bytes: int):
        self._max_tensor_bytes = max_tensor_bytes
        self._regions: dict[str, Region] = {}

    def register(self, *, name: str, key: str, offset: int, nbytes: int) -> None:
        """Opens `nbytes` bytes of the object `key` from `offset` on, as the region `name`.

        Raises:
          InvalidRequest: there is no such object, it is too short, or the name or key is no name.
          AlreadyExists: a region has that name.
        """
        if not name:
            raise InvalidRequest("a shared memory region needs a name: give it one")
        if name in self._regions:
            raise AlreadyExists(
                f"a shared memory region {name!r} is registered: unregister it first, or choose "
                f"another name"
            )
        descriptor = _open(key)
        size = os.fstat(descriptor).st_size
        if not nbytes or offset + nbytes > size:
            os.close(descriptor)
            raise InvalidRequest(
                f"region {name!r} is to have {nbytes} bytes from {offset} on, and the object "
                f"{key!r} has {size}: register at least 1 byte within it"
            )
        region = Region(name=name, key=key, offset=offset, nbytes=nbytes, descriptor=descriptor)
        # Not closed by name: a request that uses the region may outlive its registration, and by
        # then the number may stand for another file.
        weakref.finalize(region, os.close, descriptor)
        self._regions[name] = region

    def unregister(self, name: str) -> None:
        """Forgets the region `name`, or all of them if it is empty; an unknown one is none."""
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def registered(self, name: str) -> list[Region]:
        """The region `name`, or all of them if it is empty.

        Raises:
          NotFound: there is no such region.
        """
        return [self._get(name)] if name else list(self._regions.values())

    def window(self, given: parameters.Parameters, owner: str) -> Window | None:
        """Where the parameters of `owner`, an input or output, say that its tensor is.

        None if they name no region.

        Raises:
          InvalidRequest: they have a wrong type, or name what is not within the region.
          NotFound: there is no such region.
        """
        name = parameters.text(given, "shared_memory_region", owner)
        offset = parameters.integer(given, "shared_memory_offset", owner)
        nbytes = parameters.integer(given, "shared_memory_byte_size", owner)
        if not name:
            if offset or nbytes:
                raise InvalidRequest(
                    f"{owner} has an offset or size in shared memory and no region: name it in "
                    f"`shared_memory_region`"
                )
            return None
        region = self._get(name)
        if offset + nbytes > region.nbytes:
            raise InvalidRequest(
                f"{owner} is to be {nbytes} bytes from {offset} on in region {name!r}, which has "
                f"{region.nbytes}: stay within it"
            )
        if nbytes > self._max_tensor_bytes:
            raise InvalidRequest(
                f"{owner} is to have {nbytes} bytes in shared memory, and the server takes at most "
                f"{self._max_tensor_bytes} for a tensor: split it, or raise --max-tensor-bytes"
            )
        return Window(region=region, offset=offset, nbytes=nbytes, owner=owner)

    def _get(self, name: str) -> Region:
        try:
            return self._regions[name]
        except KeyError:
            raise NotFound(
                f"no shared memory region {name!r} is registered: there are "
                f"{', '.join(map(repr, self._regions)) or 'none'}"
            ) from None


def _open(key: str) -> int:
    """A descriptor of the shared memory object `key`, which is a name and never a path."""
    name = key.removeprefix("/")
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise InvalidRequest(
            f"{key!r} is no key of a shared memory object: give its name, with or without one "
            f"leading slash and without others"
        )
    try:
        descriptor = os.open(_OBJECTS / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequest(
            f"the shared memory object {key!r} cannot be opened ({error.strerror}): create it on "
            f"the server's machine, and readable and writable for the server"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidRequest(f"{key!r} is no shared memory object: give the key of one")
    return descriptor
