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


@contextlib.contextmanager
def in_haste() -> Iterator[None]:
    """Has XLA optimize little, where programs run so short that compiling well costs more.

    What was compiled before or so is thrown away: the two may differ in a bit.
    """
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()


def for_children() -> dict[str, str]:
    """The environment of processes that are JAX's alone: one of them compiles for the others."""
    kept = Path(shared_cache()) / "children"
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(kept),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
