"""Profiles on demand: what JAX and the device do for some seconds, as files for XProf."""

import asyncio
import datetime
from pathlib import Path

import jax

from aqt_server.errors import InvalidRequest, NotPermitted, Overloaded


class Profiler:
    """Takes one profile at a time, into directories of `directory`; without one it takes none."""

    def __init__(self, directory: Path | None, max_s: float):
        self._directory = directory
        self._max_s = max_s
        self._taking = False

    async def take(self, seconds: float) -> Path:
        """Where the profile of the next `seconds` is.

        Raises:
          NotPermitted: the settings name no directory.
          InvalidRequest: that is no time that the settings allow.
          Overloaded: another profile is being taken.
        """
        if self._directory is None:
            raise NotPermitted("this server takes no profiles: start it with --profile-directory")
        if not 0 < seconds <= self._max_s:
            raise InvalidRequest(
                f"`seconds` is {seconds}: send a number above 0, up to {self._max_s:g}"
            )
        if self._taking:
            raise Overloaded(
                "a profile is being taken: ask again when it is done", retry_s=self._max_s
            )
        self._taking = True
        now = datetime.datetime.now(datetime.UTC)
        target = self._directory / now.strftime("%Y%m%dT%H%M%S.%fZ")
        try:
            await asyncio.to_thread(jax.profiler.start_trace, str(target))
            try:
                await asyncio.sleep(seconds)
            finally:
                # To its end even if who asked has gone: else no other can be taken.
                await asyncio.shield(asyncio.to_thread(jax.profiler.stop_trace))
        finally:
            self._taking = False
        return target
