"""Contenders take turns, and each round gives the ratios of its own times.

What slows the machine down for a while slows all of a round. The order is another in each.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.peers.process import Seconds

# A turn lasts about so long, so that neither the clock nor the pipe matters.
TURN_S = 0.03
# Between turns: threads of the last one, which wait for work in a loop, have gone to sleep.
PAUSE_S = 0.003

Turn = Callable[[int], Seconds]
"""Runs so many calls, and gives the seconds of one."""


def interleaved(turns: Mapping[str, Turn], rounds: int) -> dict[str, list[Seconds]]:
    """The seconds that one call of each took, in each round."""
    calls = {name: _calls(turn) for name, turn in turns.items()}
    order = np.random.default_rng(0)
    found: dict[str, list[Seconds]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name in order.permutation(list(turns)):
            time.sleep(PAUSE_S)
            found[name].append(turns[name](calls[name]))
    return found


def _calls(turn: Turn) -> int:
    turn(3)
    return max(1, math.ceil(TURN_S / turn(3).elapsed))


def ratios(times: Mapping[str, list[Seconds]], ours: str) -> dict[str, dict[str, Any]]:
    """Of each contender: milliseconds, and how many times as long as `ours` it takes.

    The median of the rounds and its quartiles: of elapsed time, and of processor time.
    """
    base = np.array(times[ours])
    found: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        low, middle, high = np.percentile(np.array(seconds) / base, (25, 50, 75), axis=0).tolist()
        found[name] = {
            "ms": 1e3 * float(np.median([s.elapsed for s in seconds])),
            "ratio": middle[0],
            "quartiles": [low[0], high[0]],
            "processor_ratio": middle[1],
            "processor_quartiles": [low[1], high[1]],
            "seconds": seconds,
        }
    return found
