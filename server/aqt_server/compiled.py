"""Compiled executables on the disk, so that a restart does not compile again.

JAX says what an entry is and what its key; here is how it lies on the disk. JAX's own files are
written in place and never again, so that one that was cut short or damaged stays so, and some forms
of them have no checksum: machine code would be run that nobody compiled.

Who knows which entry is that of an executable has JAX take it without lowering what it is of
(`given`); `kept` knows it of those of versions.
"""

import contextlib
import contextvars
import hashlib
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from aqt_engine.files import unfinished

_log = logging.getLogger(__name__)
_DIGEST = hashlib.sha256().digest_size
_EVENTS = {
    "/jax/compilation_cache/cache_hits": "hits",
    "/jax/compilation_cache/cache_misses": "misses",
}

_asked: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("asked", default=None)
_given: contextvars.ContextVar[bytes | None] = contextvars.ContextVar("given", default=None)


@contextlib.contextmanager
def noted() -> Generator[list[str]]:
    """The keys that JAX asks the cache for in the block, in this thread."""
    keys: list[str] = []
    token = _asked.set(keys)
    try:
        yield keys
    finally:
        _asked.reset(token)


@contextlib.contextmanager
def given(value: bytes) -> Generator[None]:
    """In the block, in this thread, whatever JAX asks the cache for, it gets this entry.

    If JAX cannot use it, what it compiles instead is not kept.
    """
    token = _given.set(value)
    try:
        yield
    finally:
        _given.reset(token)


class Entries(CacheInterface):
    """Files of a digest and what it is of. One that cannot be used is as one that is not there."""

    def __init__(self, directory: Path):
        self._path = directory

    def get(self, key: str) -> Any:
        """What JAX gets for `key`: what was put there, or None."""
        if (value := _given.get()) is not None:
            return value
        if (asked := _asked.get()) is not None:
            asked.append(key)
        return self.read(key)

    def read(self, key: str) -> bytes | None:
        """What was put there for `key`, or None."""
        file = self._file(key)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("%s cannot be read, and is compiled again: %s", file, error)
            return None
        value = content[_DIGEST:]
        if hashlib.sha256(value).digest() != content[:_DIGEST]:
            _log.warning("%s is damaged, and is compiled again", file)
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keeps `value`, in the place of what was there, or says in the log that it cannot."""
        if _given.get() is not None:
            return
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            with unfinished(self._path, "entry") as directory:
                file = directory / "entry"
                file.write_bytes(hashlib.sha256(value).digest() + value)
                file.rename(self._file(key))
        except OSError as error:
            _log.warning(
                "an executable cannot be kept, and the next start compiles it again: %s", error
            )

    def remove(self, key: str) -> None:
        """Forgets what was put there for `key`, if it can."""
        with contextlib.suppress(OSError):
            self._file(key).unlink()

    def _file(self, key: str) -> Path:
        return self._path / f"{key}.compiled"


class CacheEvents:
    """How often JAX, from now on, finds an executable in the cache, and how often not."""

    def __init__(self):
        self.counts = dict.fromkeys(_EVENTS.values(), 0)
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_: str | int) -> None:
        if event in _EVENTS:
            self.counts[_EVENTS[event]] += 1


def keep_in(directory: Path) -> None:
    """Keeps what JAX compiles from now on in `directory`, and takes it from there.

    It has to come before anything is compiled.
    """
    # JAX has a setting for where its files are, and none for what they are.
    compilation_cache.get_file_cache = lambda path: (Entries(Path(path)), path)
    jax.config.update("jax_compilation_cache_dir", str(directory.expanduser()))
    # The defaults leave out what compiles in under a second, as most buckets do.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
