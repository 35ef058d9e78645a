"""Files that are read again when they have changed, so that secrets rotate without a restart."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)
_LOOK_S = 1.0
_Value = TypeVar("_Value")
_Mark = tuple[tuple[int, int, int], ...]


class Watched(Generic[_Value]):
    """What `read` makes of `files`, again whenever one of them has changed.

    A new content that cannot be read is told in the log, and what held before holds on: half of a
    certificate and its key may be there already when the other half is not.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], _Value]):
        self._files = files
        self._read = read
        self._mark = self._now()
        self._looked = time.monotonic()
        self._value = read()

    @property
    def value(self) -> _Value:
        """As of a second ago at most."""
        if time.monotonic() - self._looked < _LOOK_S:
            return self._value
        self._looked = time.monotonic()
        try:
            mark = self._now()
            if mark != self._mark:
                self._mark = mark
                self._value = self._read()
                _log.info("read again: %s", self._names)
        except Exception as error:
            _log.error("%s cannot be read again, and what it held holds on: %s", self._names, error)
        return self._value

    @property
    def _names(self) -> str:
        return ", ".join(map(str, self._files))

    def _now(self) -> _Mark:
        status = map(os.stat, self._files)
        return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in status)


def of_setting(
    setting: str, file: Path, read: Callable[[], _Value], error: type[Exception]
) -> Watched[_Value]:
    """What `read` makes of `file`, which `setting` names.

    Raises:
      error: the file cannot be used, as `read` says by that type, or cannot be read.
    """
    try:
        return Watched([file], read)
    except OSError as failed:
        raise error(f"{setting} {file} cannot be read: {failed.strerror}") from failed
    except error as failed:
        raise error(f"{setting} {failed}") from failed
