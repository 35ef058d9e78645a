"""Brings versions into memory, in threads of their own, where they stand in nobody's way."""

import asyncio
import contextlib
import enum
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from aqt_engine.bundle import BundleError
from aqt_engine.execution import Mode, Program
from aqt_engine.layout import Layout
from aqt_server import executor
from aqt_server.directory import Key, OutsideError
from aqt_server.kept import Records
from aqt_server.memory import Memory, NoMemoryError, available
from aqt_server.settings import Settings
from aqt_server.source import Source

if TYPE_CHECKING:
    from aqt_server.hosts import Leader


class Outcome(enum.StrEnum):
    """What came of loading a version."""

    READY = "ready"
    DAMAGED = "damaged"
    """Its files are not those of a whole bundle that this server reads."""
    INEXACT = "inexact"
    """Its witness does not reproduce here."""
    NO_MEMORY = "no_memory"
    """It takes more memory than there is."""
    FAILED = "failed"
    """Anything else."""


def outcome_of(error: Exception) -> Outcome:
    """The outcome of a load that `error` ended."""
    match error:
        case BundleError() | OutsideError():
            return Outcome.DAMAGED
        case executor.InexactError():
            return Outcome.INEXACT
        case NoMemoryError():
            return Outcome.NO_MEMORY
        case _:
            return Outcome.FAILED


class Loader:
    """Loads versions of `source` as the settings say, over the devices of `layout`."""

    def __init__(
        self,
        settings: Settings,
        source: Source,
        available: Callable[[], int] = available,
        *,
        layout: Layout = Layout(),
        leader: "Leader | None" = None,
    ):
        self._source = source
        self._models = settings.models
        self._memory_limit = settings.serving.model_memory_bytes
        self._available = available
        self._leader = leader
        self._layout = layout
        # One that may be inexact has to be proved each time, as it is served whatever comes of it.
        exact = not settings.models.allow_inexact
        self._records = Records(settings.models.compilation_cache) if exact else None
        self._described = settings.observe.status_page
        self._max_batch_rows = settings.batching.max_batch_rows
        self._loads = 0
        self._thread = _thread()
        self._replaying = ThreadPoolExecutor(max_workers=1, thread_name_prefix="replay")

    @property
    def loading(self) -> bool:
        """Whether a thread is loading a version, or computes a witness again."""
        return self._loads > 0

    async def load(self, key: Key, *, held: int) -> executor.Loaded:
        """The version `key`, compiled and proved; other versions hold `held` bytes.

        Raises:
          Exception: whatever its bundle does to its loader.
        """
        self._loads += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._load, key, held)
        finally:
            self._loads -= 1

    async def replay(self, replay: Callable[[], executor.Proof]) -> executor.Proof:
        """What comes of the replay of a version, beside loads and what is computed.

        Raises:
          Exception: it could not be computed.
        """
        self._loads += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._replaying, replay)
        finally:
            self._loads -= 1

    def leave_alone(self) -> None:
        """Has the next versions not wait for one that is being loaded."""
        self._thread.shutdown(wait=False)
        self._thread = _thread()

    def check(self, loaded: executor.Loaded, *, held: int) -> None:
        """Returns if there is room for what was loaded, now that others hold `held` bytes.

        Raises:
          NoMemoryError: there is not.
        """
        memory = Memory(limit=self._memory_limit, held=held, available=self._available)
        made = loaded.executor
        memory.check(
            loaded.manifest, workspace=made.workspace_nbytes, layout=made.layout, placed=True
        )

    def _load(self, key: Key, held: int) -> executor.Loaded:
        name = key[0]
        models = self._models
        fast = name in models.fast_model or "*" in models.fast_model
        leader = None if fast else self._leader
        return executor.load(
            self._source.local(key),
            max_batch_rows=self._max_batch_rows,
            allow_inexact=models.allow_inexact,
            mode=Mode.FAST if fast else Mode.EXACT,
            layout=Layout() if fast else self._layout,
            program=leader.programs(key) if leader else Program,
            turn=leader.turn if leader else contextlib.nullcontext(),
            proof_s=models.proof_s,
            memory=Memory(limit=self._memory_limit, held=held, available=self._available),
            described=self._described,
            records=self._records,
        )


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
