"""Executables that compute in the thread that calls them, for models that take no time.

On a CPU JAX hands every call to a thread of its own and waits for it: two changes of thread, which
a model of a few small layers takes less time than. Whether it does so is a matter of the client
that executables are loaded by, and without it a large model may take longer, whose operations are
begun side by side. So there is a second client, which does not, for executables that are quick.
They are compiled to begin one operation after the other too: to wake a thread for one that is ready
at the same time takes longer than it does. Neither decides about a bit, as the operations are the
same.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jaxlib import xla_client

Executable = Callable[..., Sequence[jax.Array]]
QUICK_S = 0.5e-3
"""Seconds of a call from which on changing threads is little of it."""
MOST_BYTES = 2**24
"""Of weights: reading more takes longer than that."""
_IN_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
_CALLS = 4


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


def compiled(traced: Any) -> Any:
    """A `jax.stages.Traced` as a `jax.stages.Compiled` that computes in the calling thread."""
    with jax.default_device(device()):
        return traced.lower().compile(compiler_options=_IN_ORDER)


def seconds(
    executable: Executable,
    weights: Sequence[jax.Array],
    inputs: Sequence[np.ndarray[Any, Any]],
) -> float:
    """The least of a few calls."""
    least = math.inf
    for _ in range(_CALLS):
        began = time.perf_counter()
        jax.block_until_ready(executable(weights, inputs))
        least = min(least, time.perf_counter() - began)
    return least
