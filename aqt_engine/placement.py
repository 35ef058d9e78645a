"""Weights in the memory of the devices that compute with them, and nowhere else.

Each device is given its own part of a weight, read from the bundle for it: what is in the memory of
the host meanwhile is one part, and no host reads a part that only devices of another hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from aqt_engine.arrays import Cut, Stored
from aqt_engine.kernels.packing import Packing
from aqt_engine.manifest import LengthBucket

Packed = Mapping[LengthBucket, Mapping[int, Packing]]
"""The weights that each graph takes packed, by their index."""


def placed(
    weights: Stored, places: Sequence[tuple[tuple[int, ...], Sharding] | None], packed: Packed
) -> dict[LengthBucket, list[jax.Array]]:
    """The weights in their places, as each graph takes them; what several take is there once.

    A place is the shape of a weight and how it is spread, or None for the first device. What was
    read is dropped before the next is read, where it has become another array.
    """
    there: dict[tuple[int, Packing | None], jax.Array] = {}

    def place(index: int, packing: Packing | None) -> jax.Array:
        if (index, packing) not in there:
            if where := places[index]:
                there[index, packing] = _spread(weights, index, *where)
            else:
                weight = weights[index]
                there[index, packing] = jax.device_put(packing(weight) if packing else weight)
        return there[index, packing]

    return {
        bucket: [place(i, packing.get(i)) for i in range(len(weights))]
        for bucket, packing in packed.items()
    }


def _spread(weights: Stored, index: int, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """A weight over devices, of which this process has some: each part is read once, for them."""
    held: dict[tuple[Any, ...], tuple[Cut, list[Any]]] = {}
    for device, cut in sharding.addressable_devices_indices_map(shape).items():
        assert cut is not None
        bounds = tuple((of.start, of.stop) for of in cut)
        held.setdefault(bounds, (cut, []))[1].append(device)
    parts: list[jax.Array] = []
    for cut, devices in held.values():
        part = weights.part(index, cut)
        parts += [jax.device_put(part, device) for device in devices]
        # Else the next would be read while this one is still on its way.
        jax.block_until_ready(parts)
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)
