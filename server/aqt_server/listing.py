"""What a source has, asked in a thread of its own: one that hangs holds up nothing for ever."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from aqt_server.directory import Fingerprint, Key
from aqt_server.source import Source


class Listing:
    """Looks through `source`, one look at a time, and waits at most `most_s` seconds for each."""

    def __init__(self, source: Source, most_s: float):
        self._source = source
        self._most_s = most_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="list")
        self._turn = asyncio.Lock()
        self._look: asyncio.Future[Mapping[Key, Fingerprint]] | None = None
        self._ends = 0.0

    @property
    def looking(self) -> bool:
        """Whether the thread is looking."""
        return self._look is not None and not self._look.done()

    async def versions(self) -> Mapping[Key, Fingerprint]:
        """The versions that there are now, by model, the newest of each first.

        While a look hangs there is no other, as that would hang too.

        Raises:
          OSError: the source cannot be read, or not in that time, which may pass.
        """
        async with self._turn:
            # What a caller who has gone began may not have what is there now.
            await self._ended()
            loop = asyncio.get_running_loop()
            self._ends = loop.time() + self._most_s
            self._look = loop.run_in_executor(self._thread, self._source.versions)
            # Retrieved, as asyncio complains of an error that nobody has waited for.
            self._look.add_done_callback(lambda look: look.cancelled() or look.exception())
            await self._ended()
            return self._look.result()

    async def _ended(self) -> None:
        if self._look is None:
            return
        left = max(0.0, self._ends - asyncio.get_running_loop().time())
        await asyncio.wait({self._look}, timeout=left)
        if not self._look.done():
            raise TimeoutError(f"no answer in {self._most_s:g} s, and it is still being read")
