"""How long batches of one version take to compute: an exponential average of those that were."""

import math
from collections.abc import Hashable

_WEIGHT = 0.2
"""Of the newest batch in the average, and in that of the deviations."""
_DEVIATIONS = 3.0
"""That are allowed for where a time must not be missed: were they normal, 1 % would take longer."""

_DRIFT = 0.15
"""The share by which all batches ahead may take longer, until it is known how many come late."""
_DRIFTS = 0.05, 2.0
"""The least and the most of it: with the most, a queue takes up a third of the time there is."""
_STEP = 0.04
"""That it grows by for each that comes late."""
_LATE = 0.003
"""Of those that are taken, so many may come late: fewer than the hundredth that p99 leaves out."""


class ServiceTime:
    """Averages by group and number of rows, rounded up to a power of two, as executables are.

    Beside the average goes the mean deviation from it, as TCP has it for round trips (RFC 6298).
    What batches have in common, as when the machine has other work too, shows in requests that come
    late: each makes more room before the deadline, and each that does not makes a little less. Room
    costs next to nothing under overload: a shorter queue fills the same batches.
    """

    def __init__(self):
        self._averages: dict[Hashable, dict[int, tuple[float, float]]] = {}
        self._drift = _DRIFT

    def add(self, group: Hashable, rows: int, seconds: float) -> None:
        """Counts a batch of `rows` rows that took so long."""
        averages = self._averages.setdefault(group, {})
        size = _size(rows)
        # One that was slow once would be refused for ever, where only smaller ones are taken then.
        for other, (mean, deviation) in averages.items():
            averages[other] = mean, deviation * (1 - _WEIGHT)
        before, deviation = averages.get(size, (seconds, 0.0))
        off = seconds - before
        averages[size] = before + _WEIGHT * off, deviation + _WEIGHT * abs(off)

    def expected(self, group: Hashable, rows: int) -> float:
        """Seconds that a batch of `rows` rows takes in the mean.

        Where no batch of that size was computed, those of the largest smaller size that was, or 0.
        """
        return self._known(group, rows)[0]

    def most(self, group: Hashable, rows: int) -> float:
        """Seconds in which a batch of `rows` rows is all but certain to be computed."""
        mean, deviation = self._known(group, rows)
        return mean + _DEVIATIONS * deviation

    def taken(self, *, late: bool) -> None:
        """Counts a request that was taken as one that would be in time, and was, or came late."""
        least, most = _DRIFTS
        step = _STEP if late else -_STEP * _LATE
        self._drift = min(most, max(least, self._drift + step))

    def behind(self, group: Hashable, ahead: int, rows: int, most: int) -> tuple[float, float]:
        """Seconds until `rows` rows behind `ahead` others begin to be computed, and until they end.

        The first is the mean, the second what is all but certain. Batches are of `most` rows.
        Behind a whole one there is a crowd, which fills the next too.
        """
        whole = ahead // most
        start = whole * self.expected(group, most)
        together = ahead + rows if ahead < most else most
        mean, deviation = self._known(group, max(rows, min(together, most)))
        # Deviations of one batch and of another partly cancel, and a drift does not.
        late = self._drift * start + _DEVIATIONS * deviation * math.sqrt(whole + 1)
        return start, start + mean + late

    def _known(self, group: Hashable, rows: int) -> tuple[float, float]:
        averages = self._averages.get(group, {})
        known = [size for size in averages if size <= _size(rows)]
        return averages[max(known)] if known else (0.0, 0.0)


def _size(rows: int) -> int:
    return max(0, rows - 1).bit_length()
