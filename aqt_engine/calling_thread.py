"""Executables of a CPU that compute in the thread that calls them.

JAX hands every call on a CPU to a thread of its own and waits for it: two changes of thread, which
a model of a few small layers takes less time than. Whether it does so is a matter of the client
that executables are loaded by, and so there is a second client, which does not. What is compiled
for it begins one operation after the other: to wake a thread for one that is ready at the same time
takes longer than most do, and what a batch has to be computed at once are its tiles (`pieces`).
Neither decides about a bit, as the operations are the same.
"""

import contextlib
import functools
import threading
from typing import Any, cast

import jax
from jaxlib import xla_client

_making = threading.Lock()
_IN_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def is_possible() -> bool:
    """Whether JAX computes on the CPU of one process, so that there is a thread to save."""
    return jax.default_backend() == "cpu" and jax.process_count() == 1


def device() -> Any:
    """The `jax.Device` of the CPU by the client that computes in the thread which calls."""
    # Of two clients, one would copy the weights of the other in each call.
    with _making:
        return _client().devices()[0]


@functools.cache
def _client() -> Any:
    return cast(Any, xla_client).make_cpu_client(asynchronous=False)


def chosen() -> contextlib.AbstractContextManager[Any]:
    """Within it, what this thread places and lowers is for `device`."""
    return jax.default_device(device())


def compiled(lowered: Any) -> Any:
    """A `jax.stages.Lowered` for `device` as a `jax.stages.Compiled`."""
    return lowered.compile(compiler_options=_IN_ORDER)
