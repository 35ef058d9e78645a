"""Executables that compute in the thread that calls them, for models that take no time.

On a CPU JAX hands every call to a thread of its own and waits for it: two changes of thread, which
a model of a few small layers takes less time than. Whether it does so is a matter of the client
that executables are loaded by, and without it a large model may take longer, whose operations are
begun side by side. So there is a second client, which does not, and those executables are moved to
it that are quicker there. They are the same machine code, and so give the same bits.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import serialize_executable
from jaxlib import xla_client

Executable = Callable[..., Sequence[jax.Array]]
WORTH_S = 1e-3
"""Seconds of a call from which on changing threads is little of it."""
_CALLS = 5


def is_possible() -> bool:
    """Whether JAX computes on the CPU of one process, so that there is a thread to save."""
    return jax.default_backend() == "cpu" and jax.process_count() == 1


@functools.cache
def device() -> Any:
    """The `jax.Device` of the CPU by the client that computes in the thread which calls."""
    client = cast(Any, xla_client).make_cpu_client(asynchronous=False)
    return client.devices()[0]


def shared(weights: Sequence[jax.Array]) -> list[jax.Array] | None:
    """`weights` of the CPU for executables of `device`; None if they would be copied."""
    there = [jax.device_put(np.asarray(weight), device()) for weight in weights]
    where = [
        (a.unsafe_buffer_pointer(), b.unsafe_buffer_pointer())
        for a, b in zip(weights, there, strict=True)
    ]
    return there if all(a == b for a, b in where) else None


def quicker(
    usual: Any,
    traced: Any,
    weights: Sequence[jax.Array],
    inputs: Sequence[np.ndarray[Any, Any]],
    clock: Callable[[], float] = time.perf_counter,
) -> Executable | None:
    """`usual`, a `jax.stages.Compiled` for the CPU, in the calling thread; None if that is no gain.

    Both are timed with these arguments, in turns. `usual` was compiled of the `jax.stages.Traced`
    `traced`.
    """
    if _seconds(usual, weights, inputs, clock) > WORTH_S or (here := shared(weights)) is None:
        return None
    moved = _moved(usual, traced)
    turns = [
        (_seconds(usual, weights, inputs, clock), _seconds(moved, here, inputs, clock))
        for _ in range(_CALLS)
    ]
    least = [min(took) for took in zip(*turns, strict=True)]
    return moved if least[1] < least[0] else None


def _moved(usual: Any, traced: Any) -> Executable:
    # What was read from JAX's cache, XLA cannot write again; but there it can be read once more.
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        with jax.default_device(device()):
            return traced.lower().compile()
    return serialize_executable.deserialize_and_load(
        *serialize_executable.serialize(usual),
        backend=device().client,
        execution_devices=[device()],
    )


def _seconds(
    executable: Executable,
    weights: Sequence[jax.Array],
    inputs: Sequence[np.ndarray[Any, Any]],
    clock: Callable[[], float],
) -> float:
    """Of the second of two calls, after which a thread that waited for the first is awake."""
    jax.block_until_ready(executable(weights, inputs))
    began = clock()
    jax.block_until_ready(executable(weights, inputs))
    return clock() - began
