"""The thread in which a version computes, so that one that hangs does not stop the event loop."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Asked = TypeVar("_Asked")
_Found = TypeVar("_Found")


class ComputingThread(Generic[_Asked, _Found]):
    """Calls `function` in a thread of its own, one call after the other, and `done` in the loop.

    An executor makes a lock, a condition and two futures of each call, which takes a tenth of the
    time that a lone request to a small model does. The process may end while this one computes.
    """

    def __init__(
        self,
        function: Callable[[_Asked], _Found],
        done: Callable[[_Asked, _Found | Exception], None],
    ):
        self._function = function
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._asked = queue.SimpleQueue[_Asked | None]()
        threading.Thread(target=self._work, name="compute", daemon=True).start()

    def compute(self, asked: _Asked) -> None:
        """Has the function called with `asked`, and `done` with that and what came of it."""
        self._asked.put(asked)

    def end(self) -> None:
        """Ends the thread, after what it was asked to compute."""
        self._asked.put(None)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            try:
                found = self._function(asked)
            except Exception as error:
                found = error
            # The loop may have been closed meanwhile: then nobody waits for it.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._done, asked, found)
            # They would be kept until the next comes.
            del asked, found
