"""What a trainer called the axes of variables, and which axes of what is stored those are.

Names come from partition metadata, or from the sharding that an array has. They are of axes of a
mesh where rules say which logical axis is which, and else as the trainer gave them. A quantized
tensor has those of the variable that it was made of as it stands: of its shape, with its signs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aqt_engine.manifest import Axes

# At once, so that what differs soon is seen soon, and no array is there a second time.
_VALUES = 2**16


def of_spec(spec: PartitionSpec | Sequence[Any] | None, ndim: int) -> Axes | None:
    """The names in `spec` for each of `ndim` axes, or None if it has none."""
    entries = [*(spec or ()), *[None] * ndim][:ndim]
    axes = tuple(e if e is None or isinstance(e, str) else tuple(map(str, e)) for e in entries)
    return axes if any(axes) else None


def of_array(array: Any) -> Axes | None:
    """The names of the mesh axes over which `array` lies, or None if there are none."""
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return of_spec(sharding.spec, array.ndim)


def of_stored(
    stored: Mapping[str, jax.Array], variables: Mapping[str, jax.Array], axes: Mapping[str, Axes]
) -> dict[str, Axes]:
    """The names of the axes of integers in `stored`, where `axes` are those of `variables`."""
    found: dict[str, Axes] = {}
    for name, values in stored.items():
        made = [of for source, of in axes.items() if _made_as_it_stands(values, variables[source])]
        # Of several that agree, as where both are ones, none says more than another.
        if made and all(of == made[0] for of in made):
            found[name] = made[0]
    return found


def _made_as_it_stands(stored: jax.Array, variable: jax.Array) -> bool:
    """Whether `stored` has the sign of `variable`, or is 0, in each place."""
    if stored.shape != variable.shape:
        return False
    a, b = np.asarray(stored).reshape(-1), np.asarray(variable).reshape(-1)
    agrees = False
    for start in range(0, a.size, _VALUES):
        some = slice(start, start + _VALUES)
        # In float, as there are integers of 4 bits too.
        signs = np.sign(a[some].astype(np.float32)) * np.sign(b[some].astype(np.float32))
        if not (signs >= 0).all():
            return False
        agrees = agrees or bool(signs.any())
    return agrees
