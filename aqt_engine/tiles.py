"""The tile is chosen by measurement: what a lone row costs, and what a row costs under load."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export, lax

from aqt_engine import graphs
from aqt_engine.convertible import Serving
from aqt_engine.kernels.substitution import substituted
from aqt_engine.manifest import TileCost

CANDIDATES = (2, 4, 8, 16, 32, 64)
_LOAD_ROWS = 64
_MEASURED_S = 0.2
_MOST_RUNS = 50

Timer = Callable[[Callable[[], None]], float]
"""The seconds that a call takes; it may call more than once."""
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
    cost is the geometric mean of the two times, each in multiples of the shortest that any
    candidate has. So a tile that is twice as slow for a lone row must be more than twice as fast
    per row under load to be chosen, and the unit of neither counts.
    """
    timer = timer or best_time
    forward = graphs.named(serving.forward)
    weights = [leaf.value for leaf in serving.leaves]
    seconds: dict[int, tuple[float, float]] = {}
    for tile in candidates:
        tiles = math.ceil(_LOAD_ROWS / tile)
        alone = _runs(forward, weights, inputs, tile, 1)
        loaded = _runs(forward, weights, inputs, tile, tiles)
        seconds[tile] = timer(alone), timer(loaded) / (tiles * tile)
    least = [min(of[i] for of in seconds.values()) for i in range(2)]
    return {
        tile: TileCost(
            one_row_s=one, per_row_s=each, cost=math.sqrt(one / least[0] * each / least[1])
        )
        for tile, (one, each) in seconds.items()
    }


def cheapest(costs: Mapping[int, TileCost]) -> int:
    """The tile of least cost; of equal ones the smallest."""
    return min(costs, key=lambda tile: (costs[tile].cost, tile))


def best_time(run: Callable[[], None]) -> float:
    """The shortest of many runs, in seconds, after one that does not count."""
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _MEASURED_S and len(times) < _MOST_RUNS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def _runs(
    forward: graphs.NamedForward,
    weights: Sequence[jax.Array],
    inputs: Mapping[str, np.ndarray[Any, Any]],
    tile: int,
    tiles: int,
) -> Callable[[], None]:
    """A call that computes `tiles` tiles as a server does, and waits for them."""
    structs = {
        name: jax.ShapeDtypeStruct((tile, *array.shape[1:]), array.dtype)
        for name, array in inputs.items()
    }
    graph = export.export(jax.jit(forward))(weights, structs)
    served = substituted(graph, len(weights))

    @jax.jit
    def mapped(weights: Sequence[jax.Array], batch: dict[str, jax.Array]) -> Any:
        def at_tile(rows: dict[str, jax.Array]) -> Any:
            return served.graph.call(weights, rows)

        return lax.map(at_tile, batch)

    placed = [
        jax.device_put(served.packed[i](np.asarray(w)) if i in served.packed else w)
        for i, w in enumerate(weights)
    ]
    batch = {
        name: jax.device_put(np.resize(array, (tiles, tile, *array.shape[1:])))
        for name, array in inputs.items()
    }

    def run() -> None:
        jax.block_until_ready(mapped(placed, batch))

    return run
