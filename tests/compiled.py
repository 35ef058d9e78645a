"""One compilation cache for a run of the tests: its workers and the servers that they start."""

import functools
import os
import tempfile

_INHERITED = "AQT_TESTS_COMPILED"


@functools.cache
def _made() -> tempfile.TemporaryDirectory:
    # It is removed when this process ends, which is the last of the run.
    return tempfile.TemporaryDirectory(prefix="aqt-tests-compiled-")


def shared_cache() -> str:
    """The directory of the cache, which processes that are started from now on share."""
    if _INHERITED not in os.environ:
        os.environ[_INHERITED] = _made().name
    return os.environ[_INHERITED]
