"""One compilation cache for a run of the tests: its workers and the servers that they start."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

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


def compile_in_haste(haste: bool) -> None:
    """Has XLA optimize little from now on, or as much as it does for everybody.

    What was compiled so far is thrown away where that changes: the two may differ in a bit.
    """
    if jax.config.read("jax_disable_most_optimizations") != haste:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", haste)


@contextlib.contextmanager
def in_haste() -> Iterator[None]:
    """Compiles in haste for as long as it is entered."""
    compile_in_haste(True)
    try:
        yield
    finally:
        compile_in_haste(False)


def for_children() -> dict[str, str]:
    """The environment of processes that are JAX's alone: one of them compiles for the others."""
    kept = Path(shared_cache()) / "children"
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(kept),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
