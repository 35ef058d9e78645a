"""The tile is chosen by measurement: what a lone row costs, and what a row costs under load."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export, lax

from aqt_engine import calling_thread, graphs, pieces
from aqt_engine.convertible import Serving
from aqt_engine.kernels.packing import Packing
from aqt_engine.kernels.substitution import Substituted, substituted
from aqt_engine.manifest import TileCost

CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
_LOAD_ROWS = 64
_MEASURED_S = 0.2
_LEAST_TURNS, _MOST_TURNS = 3, 50

Timer = Callable[[Sequence[Callable[[], None]]], Sequence[float]]
"""The seconds that each of some calls takes; it may call each more than once."""
Measure = Callable[[Serving, Mapping[str, np.ndarray[Any, Any]]], Mapping[int, TileCost]]
"""What each tile costs for a serving forward, tried on inputs of some rows."""


def measured(
    serving: Serving,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    *,
    timer: Timer | None = None,
    candidates: Sequence[int] = CANDIDATES,
) -> dict[int, TileCost]:
    """What each of `candidates` costs on this machine.

    A tile is paid twice: a request of one row computes a whole tile, which speaks for small ones;
    under load, 64 rows are computed as tiles one after the other, which speaks for large ones. The
    cost is the larger of the two times, each in multiples of the shortest that any candidate has:
    what a tile takes longer at most, whether few ask or many. On a CPU they are cut into pieces as
    a server does (`pieces`).
    """
    possible = calling_thread.is_possible()
    with calling_thread.chosen() if possible else contextlib.nullcontext():
        return _measured(serving, inputs, timer or best_times, candidates)


def _measured(
    serving: Serving,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    timer: Timer,
    candidates: Sequence[int],
) -> dict[int, TileCost]:
    forward = graphs.named(serving.forward)
    weights = _Weights([leaf.value for leaf in serving.leaves])
    tiles = {tile: math.ceil(_LOAD_ROWS / tile) for tile in candidates}
    took = timer(
        [
            run
            for tile in candidates
            for run in _runs(forward, weights, inputs, tile, (1, tiles[tile]))
        ]
    )
    seconds = {
        tile: (took[2 * i], took[2 * i + 1] / (tiles[tile] * tile))
        for i, tile in enumerate(candidates)
    }
    least = [min(of[i] for of in seconds.values()) for i in range(2)]
    return {
        tile: TileCost(one_row_s=one, per_row_s=each, cost=max(one / least[0], each / least[1]))
        for tile, (one, each) in seconds.items()
    }


def cheapest(costs: Mapping[int, TileCost]) -> int:
    """The tile of least cost; of equal ones the smallest."""
    return min(costs, key=lambda tile: (costs[tile].cost, tile))


def best_times(runs: Sequence[Callable[[], None]]) -> Sequence[float]:
    """The shortest of many calls of each, in seconds.

    They take turns, so that what slows the machine down for a while slows all of them.
    """
    for run in runs:
        run()
    best = [math.inf] * len(runs)
    began = time.perf_counter()
    for turn in range(_MOST_TURNS):
        if turn >= _LEAST_TURNS and time.perf_counter() - began > _MEASURED_S * len(runs):
            break
        for i, run in enumerate(runs):
            started = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - started)
    return best


class _Weights:
    """Weights on the device, each once in every form in which graphs take it."""

    def __init__(self, values: Sequence[jax.Array]):
        self.values = values
        self._placed: dict[tuple[int, Packing | None], jax.Array] = {}

    def taken_by(self, served: Substituted) -> list[jax.Array]:
        """As `served` takes them."""
        return [self._as(index, served.packed.get(index)) for index in range(len(self.values))]

    def _as(self, index: int, packing: Packing | None) -> jax.Array:
        if (index, packing) not in self._placed:
            value = self.values[index]
            # The array is shared by both of a CPU's clients: what is given is its memory.
            there = np.asarray(value) if calling_thread.is_possible() else value
            packed = packing(np.asarray(value)) if packing else there
            self._placed[index, packing] = jax.device_put(packed)
        return self._placed[index, packing]


def _runs(
    forward: graphs.NamedForward,
    weights: _Weights,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    tile: int,
    counts: Sequence[int],
) -> list[Callable[[], None]]:
    """Calls that compute so many tiles as a server does, and wait for them."""

    def rows(*shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct((*shape, *array.shape[1:]), array.dtype)
            for name, array in inputs.items()
        }

    graph = export.export(jax.jit(forward))(weights.values, rows(tile))
    served = substituted(graph, len(weights.values))
    placed = weights.taken_by(served)

    @jax.jit
    def mapped(weights: Sequence[jax.Array], batch: dict[str, jax.Array]) -> Any:
        def at_tile(rows: dict[str, jax.Array]) -> Any:
            return served.graph.call(weights, rows)

        return lax.map(at_tile, batch)

    possible = calling_thread.is_possible()

    @functools.cache
    def lowered(size: int) -> Any:
        return mapped.lower(placed, rows(size, tile))

    @functools.cache
    def compiled(size: int) -> Callable[..., Any]:
        return calling_thread.compiled(lowered(size)) if possible else lowered(size).compile()

    def run(tiles: int) -> Callable[[], None]:
        cut = pieces.whole((tiles,))
        if possible:
            cut = pieces.cut(pieces.nbytes_accessed(lowered(1)), tiles, pieces.threads())
        sizes = cut.pieces(tiles)
        batches = [
            {
                name: jax.device_put(np.resize(array, (size, tile, *array.shape[1:])))
                for name, array in inputs.items()
            }
            for size in sizes
        ]
        for size in sizes:
            compiled(size)

        def piece(number: int) -> None:
            jax.block_until_ready(compiled(sizes[number])(placed, batches[number]))

        return lambda: pieces.compute(piece, len(sizes), cut.threads)

    return [run(tiles) for tiles in counts]
