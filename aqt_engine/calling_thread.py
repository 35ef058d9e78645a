"""Executables that compute in the thread that calls them, for models that take no time.

On a CPU JAX hands every call to a thread of its own and waits for it: two changes of thread, which
a model of a few small layers takes less time than. Whether it does so is a matter of the client
that executables are loaded by, and without it a large model may take longer, whose operations are
begun side by side. So there is a second client, which does not, for executables that are quick.
They are compiled to begin one operation after the other too: to wake a thread for one that is ready
at the same time takes longer than it does. Neither decides about a bit, as the operations are the
same.

What is quick is told by the bytes that it reads and writes, and not by a clock: so the same is
compiled in every start, and a cache has it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jaxlib import xla_client

from aqt_engine.batches import At
from aqt_engine.manifest import LengthBucket

Executable = Callable[..., Sequence[jax.Array]]
QUICK_BYTES = 2**25
"""Read and written by all operations, before XLA joins any: about half a millisecond."""
QUICK_TILES = 8
"""In a loop over more, beginning operations takes longer than their bytes tell."""
_IN_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


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


def nbytes_accessed(counted: Any) -> float:
    """What the operations of a `jax.stages.Lowered` or `Compiled` read and write; a loop's once."""
    return (counted.cost_analysis() or {}).get("bytes accessed", math.inf)


class Quick:
    """Which executables of a program are quick, and the weights as those take them.

    Where the program is `spread` over devices, none is.
    """

    def __init__(self, *, spread: bool):
        self._spread = spread
        self._found: set[At] = set()
        self._shared: dict[LengthBucket, list[jax.Array] | None] = {}

    def __contains__(self, at: At) -> bool:
        return at in self._found

    def add(self, at: At) -> None:
        """Takes that executable to be quick, as it was found to be before."""
        self._found.add(at)

    def find(self, at: At, nbytes: float, weights: Sequence[jax.Array]) -> bool:
        """Whether the executable at `at` is quick, whose operations read and write so much."""
        small = nbytes <= QUICK_BYTES and at[1] <= QUICK_TILES
        if self._spread or not is_possible() or not small:
            return False
        if self._weights(at[0], weights) is None:
            return False
        self.add(at)
        return True

    def weights(
        self, length_bucket: LengthBucket, weights: Sequence[jax.Array]
    ) -> Sequence[jax.Array]:
        """`weights` of a length bucket, as its quick executables take them: in the same memory."""
        found = self._weights(length_bucket, weights)
        assert found is not None, "it was compiled to where weights are copied"
        return found

    def _weights(
        self, length_bucket: LengthBucket, weights: Sequence[jax.Array]
    ) -> list[jax.Array] | None:
        if length_bucket not in self._shared:
            self._shared[length_bucket] = shared(weights)
        return self._shared[length_bucket]

    def drop_weights(self) -> None:
        """Forgets the weights, so that their memory can be given back."""
        self._shared = {}
