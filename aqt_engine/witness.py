"""The witness: does a program here compute, bit for bit, what the training forward computed?"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aqt_engine.bundle import Arrays, Witness


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


def check(program: Callable[[Mapping[str, np.ndarray[Any, Any]]], Arrays], w: Witness) -> Verdict:
    """Runs `program` on the witness's inputs and compares with what training answered."""
    return compare(program(w.inputs), w.outputs)


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
