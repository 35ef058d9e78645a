"""The versions that the server knows, and the life of each.

    NAME/VERSION/ appears -> LOADING -> READY -> vanishes: UNLOADING while it drains
                                     -> UNAVAILABLE, until its files change, or where it
                                        lacked memory, until some becomes free

Which versions of a model are served is in its policy. Those that are new are loaded before those
that have to go are unloaded, so that a model is never without a version that answers.
Under --model-control poll the directory is looked at again and again; under explicit, a model's
part of it when a client asks for that; under none, once. Versions are loaded one after the other in
a thread, so that requests are answered meanwhile. One that is refused, for damage or because it is
not exact here, touches no other, and one that takes too long goes on in a thread of its own. A
version whose files were replaced is loaded anew and swapped when ready.
"""

import asyncio
import collections
import dataclasses
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from aqt_engine.layout import Layout
from aqt_server.directory import Fingerprint, Key
from aqt_server.entry import Entry, Listed, State
from aqt_server.errors import (
    DeadlineExceeded,
    NotFound,
    NotPermitted,
    NotReady,
    NotServable,
    OutOfMemory,
)
from aqt_server.executor import Loaded, Proof
from aqt_server.listing import Listing
from aqt_server.loader import Loader, Outcome, outcome_of
from aqt_server.policies import Policies, Policy
from aqt_server.response_cache import ResponseCache
from aqt_server.servable import Servable, serve
from aqt_server.settings import ModelControl, Settings
from aqt_server.source import Source

if TYPE_CHECKING:
    from aqt_server.hosts import Leader

_log = logging.getLogger(__name__)
REPLAY_AFTER_S = 1.0
"""Until the witness is computed again, of a version whose verdict is one of an earlier start."""


class Repository:
    """All versions by name and number. Belongs to the event loop that it is used in."""

    def __init__(
        self,
        settings: Settings,
        source: Source,
        policies: Policies,
        *,
        layout: Layout = Layout(),
        leader: "Leader | None" = None,
    ):
        self._settings = settings
        self._policies = policies
        self._listing = Listing(source, settings.serving.load_s)
        self._loader = Loader(settings, source, layout=layout, leader=leader)
        self._random = random.Random()
        self._entries: dict[Key, Entry] = {}
        self._draining: dict[asyncio.Task[bool], Servable] = {}
        self._freed = 0
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._closing = False
        kept_bytes = settings.serving.response_cache_bytes
        self.cache = ResponseCache(kept_bytes) if kept_bytes else None
        """Answers that are kept, if the settings say so."""
        self.loads = collections.Counter[tuple[str, Outcome]]()
        """Loads by model and outcome."""
        self.scanned = False
        """Whether everything that was to be loaded at the start is loaded or refused."""

    @property
    def busy(self) -> bool:
        """Whether a thread is loading a version, or looking for versions."""
        return self._loader.loading or self._listing.looking

    def policy(self, name: str) -> Policy:
        """What is said of the model `name`."""
        return self._policies.of(name)

    async def watch(self, settled: Callable[[], Awaitable[None]]) -> None:
        """Loads what the settings say, calls `settled`, then polls until cancelled if they do."""
        explicit = self._settings.models.model_control is ModelControl.EXPLICIT
        names = frozenset(self._settings.models.load_model)
        await self._follow(names if explicit and "*" not in names else None)
        self.scanned = True
        await settled()
        while self._settings.models.model_control is ModelControl.POLL:
            await asyncio.sleep(self._settings.models.poll_s)
            await self._follow(None)

    def get(self, name: str, version: str, *, request_id: str = "") -> Servable:
        """The version that a request means: by its number, by an alias, or with `version` empty.

        Then it is the version in whose share the request with `request_id` falls, where the policy
        splits them, and else the newest that is ready.

        Raises:
          NotFound: there is no such model or version, or it is not loaded.
          NotReady: it is still loading, or the server is stopping.
          NotServable: it was refused.
        """
        if self._closing:
            raise NotReady("the server is stopping: send the request to another, or again later")
        versions = {number: e for (n, number), e in self._entries.items() if n == name}
        if not versions:
            known = sorted({n for n, _ in self._entries})
            raise NotFound(
                f"there is no model {name!r}: the server has "
                f"{', '.join(map(repr, known)) or 'none yet'}"
            )
        policy = self._policies.of(name)
        if version:
            entry = versions.get(policy.number(version) or 0)
            if entry is None:
                there = [
                    *map(str, sorted(versions)),
                    *(f"{a} ({n})" for a, n in policy.aliases.items()),
                ]
                raise NotFound(
                    f"model {name!r} has no version {version!r}: it has {', '.join(there)}"
                )
        else:
            ready = [number for number, e in versions.items() if e.servable]
            number = policy.share(ready, request_id, self._random)
            if policy.split and number is None:
                raise NotReady(f"model {name!r} has none of the versions of its split ready")
            entry = versions[number or max(ready or versions)]
        if entry.servable:
            return entry.servable
        if entry.state is State.UNAVAILABLE:
            raise NotServable(f"model {name!r} was refused: {entry.reason}")
        raise NotReady(f"model {name!r} is still loading: send the request again")

    def ready(self) -> list[Servable]:
        """The versions that answer requests, by name and then by number."""
        servables = [entry.servable for entry in self._entries.values()]
        return sorted((s for s in servables if s), key=lambda s: (s.name, s.version))

    def known(self) -> list[Listed]:
        """The versions that are served, loading, refused or draining, ordered as in `index`."""
        listed = {
            key: Listed(name=key[0], version=key[1], state=entry.state, reason=entry.reason)
            for key, entry in self._entries.items()
        }
        for s in self._draining.values():
            listed.setdefault(
                (s.name, s.version),
                Listed(name=s.name, version=s.version, state=State.UNLOADING, reason=""),
            )
        return [listed[key] for key in sorted(listed)]

    async def index(self) -> list[Listed]:
        """Every version that is served, known or in the directory, by name and then by number."""
        listed = {(known.name, known.version): known for known in self.known()}
        for name, version in await self._on_disk() or ():
            newer = sum(s.name == name and s.version > version for s in self.ready())
            left_out = newer and not self._policies.of(name).serves(version, newer=newer)
            reason = "left out by the model's policy" if left_out else "not loaded"
            listed.setdefault(
                (name, version),
                Listed(name=name, version=version, state=State.UNAVAILABLE, reason=reason),
            )
        return [listed[key] for key in sorted(listed)]

    async def load(self, name: str) -> None:
        """Loads the versions of a model that are new, were replaced or were refused.

        Those that are served stay so until their successors are ready.

        Raises:
          NotPermitted: the model control is not explicit.
          NotFound: the directory has no such model.
          NotReady: one of its versions takes long to load, which goes on; or the directory cannot
            be read.
          OutOfMemory: one of its versions does not fit into memory.
          NotServable: one of its versions was refused for another reason.
        """
        self._check_explicit()
        found = await self._on_disk()
        if found is None:
            raise NotReady("the model repository cannot be read: see the log, or ask again later")
        if not any(n == name for n, _ in found):
            raise NotFound(f"the model repository has no versions of a model {name!r}")
        await self._finish(self._follow(frozenset([name]), again=True))
        refused = {
            key[1]: entry
            for key, entry in sorted(self._entries.items())
            if key[0] == name and entry.reason
        }
        if refused:
            late = any(entry.late for entry in refused.values())
            fits = any(entry.lacked_memory_at is None for entry in refused.values())
            reasons = "; ".join(f"version {v}: {entry.reason}" for v, entry in refused.items())
            if late:
                raise NotReady(f"model {name!r} is still loading: {reasons}")
            raise (NotServable if fits else OutOfMemory)(f"model {name!r} was refused: {reasons}")

    async def unload(self, name: str) -> None:
        """Takes no more requests for a model, and returns when the accepted ones are answered.

        Raises:
          NotPermitted: the model control is not explicit.
          NotFound: no such model is loaded.
          DeadlineExceeded: requests took longer than the settings give them, and were cut off.
        """
        self._check_explicit()

        async def unload() -> None:
            async with self._changing:
                keys = [key for key in self._entries if key[0] == name]
                if not keys:
                    raise NotFound(f"no model {name!r} is loaded")
                drained = [self._unload(key) for key in keys]
            if not all(await asyncio.gather(*drained)):
                raise DeadlineExceeded(
                    f"model {name!r} is unloaded, but requests that were computing were cut off "
                    f"after {self._settings.batching.drain_s:g} s"
                )

        await self._finish(unload())

    async def close(self) -> bool:
        """Takes no more requests, and returns when the accepted ones are answered or cut off.

        Returns whether all were answered.
        """
        self._closing = True
        for key in list(self._entries):
            self._unload(key)
        return all(await asyncio.gather(*self._draining))

    def _check_explicit(self) -> None:
        if self._settings.models.model_control is not ModelControl.EXPLICIT:
            raise NotPermitted(
                f"models are loaded and unloaded by request only under --model-control explicit, "
                f"and this server has {self._settings.models.model_control}"
            )

    async def _finish(self, change: Coroutine[Any, Any, None]) -> None:
        """Waits for `change`, which goes on to its end even if the caller is cancelled."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        # Retrieved, as asyncio complains of an error that nobody has waited for.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(task)

    async def _on_disk(self) -> Mapping[Key, Fingerprint] | None:
        """What the directory has; None if it cannot be read, which may pass."""
        try:
            return await self._listing.versions()
        except OSError as error:
            _log.error("the model repository cannot be read: %s", error)
            return None

    async def _follow(self, names: frozenset[str] | None, *, again: bool = False) -> None:
        """Brings the models `names`, or all, in line with the directory, if that can be read.

        What was refused is tried again when its files have changed, or if `again` is set.
        """
        async with self._changing:
            found = await self._on_disk()
            if found is None:
                return
            for name in sorted({name for name, _ in (*found, *self._entries)}):
                if names is None or name in names:
                    served = await self._load_served(name, found, again=again)
                    if self._closing:
                        return
                    for key in [k for k in self._entries if k[0] == name and k not in served]:
                        self._unload(key)

    async def _load_served(
        self, name: str, found: Mapping[Key, Fingerprint], *, again: bool
    ) -> set[Key]:
        """Loads what the policy of a model says is served, the newest first; returns all of that.

        Of the newest n, one that is refused does not count: the next older is served in its place.
        """
        policy = self._policies.of(name)
        served: set[Key] = set()
        newer = 0
        for key, fingerprint in found.items():
            if key[0] != name or not policy.serves(key[1], newer=newer):
                continue
            entry = self._entries.get(key)
            if (
                not entry
                or entry.fingerprint != fingerprint
                or (again and entry.reason and not entry.late)
                or entry.unread
                or entry.lacked_memory_at not in (None, self._freed)
            ):
                await self._load(key, fingerprint)
            if self._closing:
                break
            served.add(key)
            newer += self._entries[key].servable is not None
        return served

    async def _load(self, key: Key, fingerprint: Fingerprint) -> None:
        """Loads a version; one that takes longer than others wait for it is left to its thread."""
        before = self._entries.get(key)
        serving = before.servable if before else None
        # A version that is served stays so while its files are being replaced.
        state = State.READY if serving else State.LOADING
        if serving is None:
            self._entries[key] = Entry(state=state, fingerprint=fingerprint)
        _log.info("loading %s version %d", *key)
        loading = asyncio.create_task(self._loader.load(key, held=self._held()))
        # Retrieved, as asyncio complains of an error that nobody has waited for.
        loading.add_done_callback(lambda done: done.cancelled() or done.exception())
        most_s = self._settings.serving.load_s
        done, _ = await asyncio.wait({loading}, timeout=most_s)
        if done:
            self._end_load(key, fingerprint, serving, loading)
            return
        reason = f"it has been loading for {most_s:g} s, and goes on beside other loads"
        _log.error("%s version %d: %s", *key, reason)
        self._loader.leave_alone()
        late = self._entries[key] = Entry(
            state=state, fingerprint=fingerprint, reason=reason, servable=serving, late=True
        )

        def ended(loading: asyncio.Task[Loaded]) -> None:
            # It may have been unloaded meanwhile, or have other files.
            if self._entries.get(key) is late:
                self._end_load(key, fingerprint, serving, loading)

        loading.add_done_callback(ended)

    def _end_load(
        self,
        key: Key,
        fingerprint: Fingerprint,
        serving: Servable | None,
        loading: asyncio.Task[Loaded],
    ) -> None:
        """Serves what was loaded, in the place of `serving`, or says why it is refused."""
        name, version = key
        try:
            loaded = loading.result()
            if self._entries[key].late:
                self._loader.check(loaded, held=self._held())
        except Exception as error:
            # Whatever a bundle does to its loader, the server and the other versions go on.
            outcome = outcome_of(error)
            _log.error("refused %s version %d: %s", name, version, error)
            self.loads[name, outcome] += 1
            self._entries[key] = Entry(
                state=State.READY if serving else State.UNAVAILABLE,
                fingerprint=fingerprint,
                reason=str(error) or type(error).__name__,
                servable=serving,
                lacked_memory_at=self._freed if outcome is Outcome.NO_MEMORY else None,
                unread=isinstance(error, OSError),
            )
            return
        if self._closing:
            return
        servable = serve(
            key, loaded, self._policies.of(name), self._settings.batching, cache=self.cache
        )
        self._entries[key] = Entry(state=State.READY, fingerprint=fingerprint, servable=servable)
        self.loads[name, Outcome.READY] += 1
        _log.info("ready %s version %d, mode %s, %s", name, version, loaded.mode, loaded.verdict)
        if serving:
            self._drain(serving)
        if loaded.replay:
            task = asyncio.create_task(self._replay(key, servable, loaded.replay))
            self._changes.add(task)
            task.add_done_callback(self._changes.discard)

    async def _replay(self, key: Key, servable: Servable, replay: Callable[[], Proof]) -> None:
        """Computes the witness of a version again, whose verdict is one of an earlier start.

        If it does not reproduce, the version answers nothing more.
        """
        # First what has waited for the server is answered.
        await asyncio.sleep(REPLAY_AFTER_S)
        try:
            found = await self._loader.replay(replay)
        except Exception as error:
            _log.warning("the witness of %s version %d is not computed again: %s", *key, error)
            return
        if not found.failed:
            _log.info("the witness of %s version %d, computed again, is %s", *key, found)
            return
        reason = f"it was exact at an earlier start and is not now: {found.failed[0]}"
        _log.error("%s version %d: %s", *key, reason)
        self.loads[key[0], Outcome.INEXACT] += 1
        entry = self._entries.get(key)
        if entry and entry.servable is servable:
            self._entries[key] = dataclasses.replace(
                entry, state=State.UNAVAILABLE, reason=reason, servable=None
            )
            # What it has accepted would be answered with the same executables.
            self._drain(servable, grace_s=0)

    def _held(self) -> int:
        """Bytes that versions hold, those too that are on their way out."""
        servables = [*self.ready(), *self._draining.values()]
        return sum(s.nbytes for s in servables)

    def _unload(self, key: Key) -> asyncio.Future[bool]:
        """Forgets a version; the future says in the end whether all its requests were answered."""
        servable = self._entries.pop(key).servable
        if servable:
            return self._drain(servable)
        done = asyncio.get_running_loop().create_future()
        done.set_result(True)
        return done

    def _drain(self, servable: Servable, *, grace_s: float | None = None) -> asyncio.Task[bool]:
        _log.info("unloading %s version %d", servable.name, servable.version)
        grace_s = self._settings.batching.drain_s if grace_s is None else grace_s
        task = asyncio.create_task(servable.close(grace_s))
        self._draining[task] = servable

        def drained(done: asyncio.Task[bool]) -> None:
            del self._draining[done]
            self._freed += 1

        task.add_done_callback(drained)
        return task
