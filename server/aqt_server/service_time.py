"""How long batches of one version take to compute: an exponential average of those that were."""

from collections.abc import Hashable

_WEIGHT = 0.2
"""Of the newest batch in the average."""


class ServiceTime:
    """Averages by group and number of rows, rounded up to a power of two, as executables are."""

    def __init__(self):
        self._averages: dict[Hashable, dict[int, float]] = {}

    def add(self, group: Hashable, rows: int, seconds: float) -> None:
        """Counts a batch of `rows` rows that took so long."""
        averages = self._averages.setdefault(group, {})
        size = _size(rows)
        before = averages.get(size, seconds)
        averages[size] = before + _WEIGHT * (seconds - before)

    def expected(self, group: Hashable, rows: int) -> float:
        """Seconds that a batch of `rows` rows takes, at the least.

        Where no batch of that size was computed, those of the largest smaller size that was, or 0.
        """
        averages = self._averages.get(group, {})
        known = [size for size in averages if size <= _size(rows)]
        return averages[max(known)] if known else 0.0

    def behind(self, group: Hashable, ahead: int, rows: int, most: int) -> tuple[float, float]:
        """Seconds until `rows` rows behind `ahead` others begin to be computed, and until they end.

        Batches are of `most` rows. Behind a whole one there is a crowd, which fills the next too.
        """
        start = ahead // most * self.expected(group, most)
        together = ahead + rows if ahead < most else most
        return start, start + self.expected(group, max(rows, min(together, most)))


def _size(rows: int) -> int:
    return max(0, rows - 1).bit_length()
