"""What requests are drawn from: rows of the zoo's models, each with what training answers to it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from aqt_engine import witness
from examples.entry import Arrays, Forward, Model
from examples.zoo import MODELS, SMALL, convert_untrained

ROWS = 128
SHORT = 16
"""The one length bucket of a model that would take seconds otherwise."""
HOSTILE = 32
"""The last rows of each pool: full of zeros, extremes, infinities or NaNs, or with some of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Rows of one length; what is one for a whole request is one for the pool."""

    inputs: Arrays
    answers: Arrays

    def request(self, rows: Sequence[int]) -> Arrays:
        return {name: a[rows] if len(a) == ROWS else a for name, a in self.inputs.items()}

    def answer(self, rows: Sequence[int]) -> Arrays:
        return {name: a[rows] for name, a in self.answers.items()}


def convert_all(
    names: Sequence[str], repository: Path, lengths: Sequence[int] = (), tile: int | None = None
) -> dict[str, list[Pool]]:
    """Converts the models, with weights that were not trained, and gives the pools of each.

    `lengths` are buckets for the small ones in place of their own, and `tile` for all.
    """
    pools: dict[str, list[Pool]] = {}
    for name in names:
        sizes = lengths if name in SMALL else (SHORT,)
        model = MODELS[name].with_lengths(*sizes) if sizes else MODELS[name]
        if tile is not None:
            model = dataclasses.replace(model, tile=tile)
        forward = convert_untrained(model, repository)
        pools[name] = _pools(model, forward)
    return pools


def _pools(model: Model, forward: Forward) -> list[Pool]:
    rng = np.random.default_rng(1)
    inputs = [pool for length in _lengths(model) for pool in _inputs(model, length, rng)]
    return [Pool(inputs=pool, answers=forward(pool)) for pool in inputs]


def _lengths(model: Model) -> Iterator[int]:
    """Each bucket full, nearly full and least: one more than the bucket before it."""
    for shorter, size in zip((0, *model.lengths), model.lengths, strict=False):
        yield from sorted({size, max(size - 3, 0), min(shorter + 1, size)})


def _inputs(model: Model, length: int, rng: np.random.Generator) -> Iterator[Arrays]:
    """A pool of inputs; for each hostile scalar of a request one more."""
    inputs = {
        name: array if name in model.signature.per_request else _hostile(array, rng)
        for name, array in model.inputs(rng, ROWS, length).items()
    }
    yield inputs
    for neighbor in witness.NEIGHBORS if model.signature.per_request else ():
        scalars = {
            name: witness.overwritten(inputs[name], np.arange(1), neighbor)
            for name in model.signature.per_request
        }
        yield {**inputs, **scalars}


def _hostile(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`array` with its last rows overwritten: each kind of value in all places, then in some."""
    changed = array.copy()
    last = range(ROWS - HOSTILE, ROWS)
    for number, row in enumerate(last):
        neighbor = witness.NEIGHBORS[number % len(witness.NEIGHBORS)]
        full = witness.overwritten(array, np.array([row]), neighbor)[row]
        everywhere = number < len(witness.NEIGHBORS)
        places = np.ones(full.shape, bool) if everywhere else rng.random(full.shape) < 0.1
        changed[row] = np.where(places, full, array[row])
    return changed


def rows_of(rng: np.random.Generator, most: int) -> list[int]:
    """Rows of a request: few or many, of good ones, some hostile ones, or such alone."""
    many = rng.random() < 0.05
    count = min(int(rng.integers(1, most + 1)) if many else int(rng.geometric(0.3)), most)
    hostile = rng.random(count) < rng.choice([0.0, 0.2, 1.0], p=[0.5, 0.4, 0.1])
    good = rng.integers(0, ROWS - HOSTILE, count)
    return np.where(hostile, rng.integers(ROWS - HOSTILE, ROWS, count), good).tolist()


def values(answer: Mapping[str, np.ndarray]) -> int:
    return sum(array.size for array in answer.values())
