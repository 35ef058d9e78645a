"""The witness: does a program here compute, bit for bit, what the training forward computed?"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from aqt_engine.bundle import Arrays, Witness

NEIGHBORS = ("zeros", "largest values", "smallest values", "infinities", "NaNs")
"""What the rows beside one may be full of, to try whether that changes it."""

Forward = Callable[[Mapping[str, np.ndarray[Any, Any]]], Arrays]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How two arrays of one output differ.

    `values` of `total` have other bits, in `rows` rows; the largest distance between two of them
    is `max_ulps` units in the last place (for integers, their difference).
    """

    output: str
    values: int
    total: int
    rows: int
    max_ulps: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of a comparison, output by output; `exact` when no bit differs."""

    differences: tuple[Difference, ...]

    @property
    def exact(self) -> bool:
        """Whether every value of every output has the same bits."""
        return all(d.values == 0 for d in self.differences)

    def __str__(self) -> str:
        if self.exact:
            return f"exact: {sum(d.total for d in self.differences)} values, 0 differ in any bit"
        return "not exact: " + "; ".join(
            f"output {d.output!r}: {d.values} of {d.total} values in {d.rows} rows differ, "
            f"by up to {d.max_ulps} ulp"
            for d in self.differences
            if d.values
        )


def compare(found: Arrays, expected: Arrays) -> Verdict:
    """Compares outputs by name, in bits: -0.0 is not 0.0, and a NaN equals itself.

    Raises:
      ValueError: the two do not have the same names, shapes and dtypes.
    """
    if {k: (v.shape, v.dtype) for k, v in found.items()} != {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }:
        raise ValueError(f"outputs {_describe(found)} cannot be compared to {_describe(expected)}")
    return Verdict(differences=tuple(_difference(k, found[k], expected[k]) for k in expected))


def check(program: Forward, w: Witness) -> Verdict:
    """Runs `program` on the witness's inputs and compares with what training answered."""
    return compare(program(w.inputs), w.outputs)


def prove(program: Forward, w: Witness) -> dict[str, Verdict]:
    """Verdicts on the witness, by the manner in which its rows were presented: all `trials`."""
    return dict(trials(program, w))


def trials(program: Forward, w: Witness) -> Iterator[tuple[str, Verdict]]:
    """Verdicts on the witness, each with the manner in which its rows were presented.

    Each row has to get the same bits in batches of every power of two, in any order, and beside
    rows of zeros, of the largest and smallest values, of infinities and of NaNs. The batches come
    first: one of them falls into each bucket.
    """
    rows = np.arange(len(next(iter(w.inputs.values()))))
    for power in range(len(rows).bit_length()):
        first = rows[: 2**power]
        yield f"with the first {2**power} rows", _present(program, w, w.inputs, first)
    yield "with all rows", _present(program, w, w.inputs, rows)
    yield "with the rows reversed", _present(program, w, w.inputs, rows[::-1])
    yield "with the rows shifted by one", _present(program, w, w.inputs, np.roll(rows, 1))
    for neighbor in NEIGHBORS:
        for parity, name in enumerate(("even", "odd")):
            others = rows[1 - parity :: 2]
            inputs = {k: overwritten(v, others, neighbor) for k, v in w.inputs.items()}
            verdict = _present(program, w, inputs, rows, compared=slice(parity, None, 2))
            yield f"with {neighbor} beside the {name} rows", verdict


def at_least(w: Witness, rows: int) -> Witness:
    """The witness, repeated as often as it takes to have `rows` rows."""
    times = -(-rows // len(next(iter(w.inputs.values()))))
    return Witness(
        inputs={k: np.concatenate([v] * times) for k, v in w.inputs.items()},
        outputs={k: np.concatenate([v] * times) for k, v in w.outputs.items()},
    )


def _present(
    program: Forward,
    w: Witness,
    inputs: Arrays,
    order: np.ndarray[Any, Any],
    compared: slice = slice(None),
) -> Verdict:
    found = program({k: v[order] for k, v in inputs.items()})
    return compare(
        {k: v[compared] for k, v in found.items()},
        {k: v[order][compared] for k, v in w.outputs.items()},
    )


def overwritten(
    array: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], neighbor: str
) -> np.ndarray[Any, Any]:
    """`array` with `rows` full of what `neighbor` names, or the nearest that its dtype has."""
    dtype = array.dtype
    if dtype.kind == "b":
        low, high, infinity, nan = False, True, True, True
    elif dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        infinity, nan = high, low
    else:
        low, high = ml_dtypes.finfo(dtype).min, ml_dtypes.finfo(dtype).max
        infinity, nan = np.inf, np.nan
    values = {
        "zeros": 0,
        "largest values": high,
        "smallest values": low,
        "infinities": infinity,
        "NaNs": nan,
    }
    changed = array.copy()
    changed[rows] = values[neighbor]
    return changed


def _difference(output: str, found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]):
    a, b = _ordered_bits(found), _ordered_bits(expected)
    differs = a != b
    # Python integers: the distance of two 64-bit patterns does not fit in 64 bits.
    ulps = [abs(int(x) - int(y)) for x, y in zip(a[differs], b[differs], strict=True)]
    return Difference(
        output=output,
        values=len(ulps),
        total=a.size,
        rows=int(differs.reshape(len(a), -1).any(axis=1).sum()) if a.size else 0,
        max_ulps=max(ulps, default=0),
    )


def _ordered_bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bit patterns as integers in the order of the values, so that neighbours are 1 apart."""
    dtype = array.dtype
    if dtype.kind in "iub":
        return array
    signed = np.ascontiguousarray(array).view(f"i{dtype.itemsize}").astype(np.int64)
    lowest = -(2 ** (8 * dtype.itemsize - 1))
    # +0.0 and -0.0 must stay apart, so negatives begin one below zero.
    return np.where(signed < 0, lowest - signed - 1, signed)


def _describe(arrays: Arrays) -> dict[str, str]:
    return {k: f"{v.dtype}{list(v.shape)}" for k, v in arrays.items()}
