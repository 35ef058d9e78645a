"""How the stored values of a version are distributed, for whoever looks at it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from aqt_engine.bundle import Bundle

_Array = np.ndarray[Any, Any]
_BARS = 64
# At once, so that the copies which numpy makes to count stay small beside the weights.
_VALUES = 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram of one array: `counts` of bars that are alike wide, from `low` to `high`.

    What is infinite or NaN is in no bar.
    """

    low: float
    high: float
    counts: tuple[int, ...]


def distributions(loaded: Bundle) -> Mapping[str, Distribution]:
    """Those of the weights by name, without arrays of what is no number and those of no value."""
    named = zip(loaded.manifest.weights, loaded.weights, strict=True)
    found = ((spec.name, distribution(array)) for spec, array in named)
    return {name: of for name, of in found if of}


def distribution(array: _Array) -> Distribution | None:
    """That of `array`; None if it has no finite number.

    Integers of up to 8 bits have bars at the whole range of their type, so that what clips is seen.
    """
    kind: Any = array.dtype
    if jnp.issubdtype(kind, jnp.integer) and (least := int(jnp.iinfo(kind).min)) >= -128:
        most = int(jnp.iinfo(kind).max)
        if most < 256:
            # As many codes in each bar: both are powers of two.
            bars = min(_BARS, most - least + 1)
            return _counted(array, least, most + 1, bars)
    elif not (jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.floating)):
        return None
    ends = [(part.min(), part.max()) for part in _parts(array) if part.size]
    if not ends:
        return None
    low, high = float(min(e[0] for e in ends)), float(max(e[1] for e in ends))
    if not math.isfinite(high - low):
        return None
    return _counted(array, low, high, _BARS)


def _counted(array: _Array, low: float, high: float, bars: int) -> Distribution:
    counts = np.zeros(bars, np.int64)
    for part in _parts(array):
        counts += np.histogram(part, bars, (low, high))[0]
    return Distribution(low, high, tuple(counts.tolist()))


def _parts(array: _Array) -> Iterator[_Array]:
    """The finite values as float64, some at a time."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _VALUES):
        part = flat[start : start + _VALUES].astype(np.float64)
        yield part[np.isfinite(part)]
