"""How a batch on a CPU is cut into pieces of a few tiles, and its cores compute them together.

Tiles do not depend on each other, so a batch of several has more to do at the same time than any
operation in it. XLA shares out every single operation among its threads, which wait for each other
at the end of each; threads that take one piece after the other wait for each other once in a batch.
What is computed of a row is the same, whichever thread takes its tile and whatever lies beside it.

How a batch is cut is told by the bytes that a tile reads and writes, and not by a clock: so the
same is compiled in every start, and a cache has it.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

ALONE_NBYTES = 2**24
"""A batch that reads and writes no more is one piece: another thread would come too late.

They are counted before XLA joins operations, and are about a quarter of a millisecond."""
ALONE_TILES = 32
"""In a loop over more, beginning operations takes longer than their bytes tell."""
PIECE_NBYTES = 2**32
"""A piece of so many takes tens of milliseconds, beside which it is nothing to begin it."""


def threads() -> int:
    """Those that compute pieces: one for each core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """How batches are cut: into pieces of `sizes` tiles, ascending, for so many `threads`.

    One of up to `alone` tiles is a single piece.
    """

    sizes: tuple[int, ...]
    alone: int
    threads: int

    def pieces(self, tiles: int) -> tuple[int, ...]:
        """The sizes of the pieces of a batch of `tiles` tiles; the last may have room for more."""
        found: list[int] = []
        while tiles > self.alone:
            fair = max(self.sizes[0], math.ceil(tiles / self.threads))
            size = max(size for size in self.sizes if size <= fair)
            several = min(self.threads, tiles // size)
            found += [size] * several
            tiles -= several * size
        if tiles:
            found.append(self._holding(tiles))
        return tuple(found)

    def _holding(self, tiles: int) -> int:
        return next(size for size in self.sizes if size >= tiles)


def whole(sizes: tuple[int, ...]) -> Cut:
    """Every batch as one piece."""
    return Cut(sizes, alone=sizes[-1], threads=1)


def cut(nbytes: float, most_tiles: int, threads: int) -> Cut:
    """That of batches of up to `most_tiles`, of which a tile reads and writes `nbytes`."""
    most_tiles = 2 ** (most_tiles - 1).bit_length()
    alone = min(ALONE_TILES, most_tiles, _power_below(ALONE_NBYTES / max(1, nbytes)))
    fair = _power_below(math.ceil(most_tiles / threads))
    worth = 2 * _power_below(PIECE_NBYTES / max(1, nbytes)) or 1
    largest = max(alone, min(fair, worth))
    return Cut(tuple(2**i for i in range(largest.bit_length())), alone, threads)


def nbytes_accessed(lowered: Any) -> float:
    """What the operations of a `jax.stages.Lowered` read and write; a loop's once."""
    return (lowered.cost_analysis() or {}).get("bytes accessed", math.inf)


def compute(piece: Callable[[int], None], count: int, threads: int) -> None:
    """Calls `piece` with each number below `count`, in up to `threads` threads: this and idle ones.

    It returns when all have been called, and raises what one of them raised.
    """
    taken = itertools.count()

    def take() -> None:
        while (number := next(taken)) < count:
            piece(number)

    # Which is each thread's own; the stubs do not know of it.
    in_64_bits = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]

    def help_out() -> None:
        with jax.enable_x64(in_64_bits):
            take()

    helping = [_HELPERS.submit(help_out) for _ in range(min(count, threads) - 1)]
    try:
        take()
    finally:
        # Those that have not begun would find nothing left to take.
        begun = [future for future in helping if not future.cancel()]
        failed = [future.exception() for future in begun]
    for error in failed:
        if error:
            raise error


_HELPERS = ThreadPoolExecutor(max(1, threads() - 1), thread_name_prefix="piece")
"""Of all programs together: there are no more cores for several than for one."""


def _power_below(bound: float) -> int:
    """The largest power of two up to `bound`; 0 below 1."""
    return 2 ** (int(bound).bit_length() - 1) if bound >= 1 else 0
