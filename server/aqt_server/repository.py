"""The versions in a directory, and the life of each.

    NAME/VERSION/ appears -> LOADING -> READY -> vanishes: drained, unloaded
                                     -> REFUSED, until its files change

The directory is looked at again and again. Versions are loaded one after the other in a thread, so
that requests are answered meanwhile; one that is refused, for damage or because it is not exact
here, touches no other. A version whose files were replaced is loaded anew and swapped when ready.
"""

import asyncio
import dataclasses
import enum
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from aqt_engine.bundle import Manifest
from aqt_server import executor
from aqt_server.batcher import Batcher
from aqt_server.errors import NotFound, NotReady, NotServable
from aqt_server.settings import Settings

_log = logging.getLogger(__name__)
_Fingerprint = tuple[tuple[str, int, int], ...]
_Key = tuple[str, int]


class State(enum.Enum):
    """Where a version is in its life."""

    LOADING = "loading"
    READY = "ready"
    REFUSED = "refused"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Servable:
    """A version that answers requests."""

    name: str
    version: int
    manifest: Manifest
    exact: bool
    batcher: Batcher


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    state: State
    fingerprint: _Fingerprint
    reason: str = ""
    servable: Servable | None = None


class Repository:
    """All versions by name and number. Belongs to the event loop that it is used in."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._entries: dict[_Key, _Entry] = {}
        self._draining: set[asyncio.Task[None]] = set()
        self._closing = False
        self.scanned = False
        """Whether everything that was there at the start has been loaded or refused."""

    async def watch(self, settled: Callable[[], Awaitable[None]]) -> None:
        """Loads what is there, calls `settled`, then follows the directory until cancelled."""
        await self.scan()
        self.scanned = True
        await settled()
        while self._settings.poll_s:
            await asyncio.sleep(self._settings.poll_s)
            await self.scan()

    async def scan(self) -> None:
        """Brings what is loaded in line with the directory, if that can be read."""
        try:
            found = dict(await asyncio.to_thread(_versions, self._settings.model_repository))
        except OSError as error:
            # What is loaded is served on: the directory may come back.
            _log.error("the model repository cannot be read: %s", error)
            return
        for key in self._entries.keys() - found.keys():
            self._unload(key)
        for key, fingerprint in found.items():
            entry = self._entries.get(key)
            if entry is None or entry.fingerprint != fingerprint:
                await self._load(key, fingerprint)

    def get(self, name: str, version: str) -> Servable:
        """The version that a request means; with `version` empty, the newest that is ready.

        Raises:
          NotFound: there is no such model or version.
          NotReady: it is still loading, or the server is stopping.
          NotServable: it was refused.
        """
        if self._closing:
            raise NotReady("the server is stopping: send the request to another, or again later")
        versions = {number: e for (n, number), e in self._entries.items() if n == name}
        if not versions:
            known = sorted({n for n, _ in self._entries})
            raise NotFound(
                f"there is no model {name!r}: the repository has "
                f"{', '.join(map(repr, known)) or 'none yet'}"
            )
        if version:
            entry = versions.get(int(version)) if version.isdecimal() else None
            if entry is None:
                raise NotFound(
                    f"model {name!r} has no version {version!r}: it has "
                    f"{', '.join(map(str, sorted(versions)))}"
                )
        else:
            ready = [number for number, e in versions.items() if e.servable]
            entry = versions[max(ready or versions)]
        if entry.servable:
            return entry.servable
        if entry.state is State.REFUSED:
            raise NotServable(f"model {name!r} was refused: {entry.reason}")
        raise NotReady(f"model {name!r} is still loading: send the request again")

    def ready_versions(self, name: str) -> list[int]:
        """The versions of a model that answer requests, ascending."""
        return sorted(v for (n, v), entry in self._entries.items() if n == name and entry.servable)

    async def close(self) -> None:
        """Takes no more requests, and unloads everything once the accepted ones are answered."""
        self._closing = True
        for key in list(self._entries):
            self._unload(key)
        await asyncio.gather(*self._draining)

    async def _load(self, key: _Key, fingerprint: _Fingerprint) -> None:
        name, version = key
        path = self._settings.model_repository / name / str(version)
        before = self._entries.get(key)
        serving = before.servable if before else None
        if serving is None:
            self._entries[key] = _Entry(state=State.LOADING, fingerprint=fingerprint)
        _log.info("loading %s version %d", name, version)
        try:
            loaded = await asyncio.to_thread(
                executor.load,
                path,
                max_batch_rows=self._settings.max_batch_rows,
                allow_inexact=self._settings.allow_inexact,
            )
        except Exception as error:
            # Whatever a bundle does to its loader, the server and the other versions go on.
            _log.error("refused %s version %d: %s", name, version, error)
            self._entries[key] = _Entry(
                # A version that is served stays so while its files are being replaced.
                state=State.READY if serving else State.REFUSED,
                fingerprint=fingerprint,
                reason=str(error),
                servable=serving,
            )
            return
        batcher = Batcher(
            loaded.program,
            max_batch_rows=loaded.program.max_rows,
            queue_rows=self._settings.queue_rows,
        )
        servable = Servable(
            name=name,
            version=version,
            manifest=loaded.manifest,
            exact=loaded.exact,
            batcher=batcher,
        )
        self._entries[key] = _Entry(state=State.READY, fingerprint=fingerprint, servable=servable)
        _log.info("ready %s version %d, exact: %s", name, version, loaded.exact)
        if serving:
            self._drain(serving)

    def _unload(self, key: _Key) -> None:
        servable = self._entries.pop(key).servable
        if servable:
            _log.info("unloading %s version %d", servable.name, servable.version)
            self._drain(servable)

    def _drain(self, servable: Servable) -> None:
        task = asyncio.create_task(servable.batcher.close())
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)


def _versions(repository: Path) -> list[tuple[_Key, _Fingerprint]]:
    """What is on disk, the newest version of each model first, with a mark of its files' state."""
    found: list[tuple[_Key, _Fingerprint]] = []
    for model in sorted(repository.iterdir()):
        if model.name.startswith(".") or not model.is_dir():
            continue
        numbers = [d.name for d in model.iterdir() if d.name.isdecimal() and d.name[0] != "0"]
        for number in sorted(map(int, numbers), reverse=True):
            found.append(((model.name, number), _fingerprint(model / str(number))))
    return found


def _fingerprint(path: Path) -> _Fingerprint:
    marks: list[tuple[str, int, int]] = []
    for file in sorted(path.rglob("*")):
        try:
            status = file.stat()
        except FileNotFoundError:
            continue  # it was removed while we looked, and the next look will tell
        marks.append((str(file), status.st_size, status.st_mtime_ns))
    return tuple(marks)
