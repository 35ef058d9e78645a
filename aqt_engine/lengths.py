"""Length buckets: a request is padded to the smallest that holds it, and its answer cut back.

Which bucket that is follows from the request alone, and so does every bit of its answer: the
training forward of a request is the one at the request's own bucket.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from aqt_engine.manifest import LengthBucket, Manifest

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


def lengths_of(manifest: Manifest, inputs: Arrays) -> dict[str, int]:
    """The size of each symbolic dimension in `inputs`, by name.

    Raises:
      ValueError: two inputs, or two axes of one, give a dimension different sizes.
    """
    found: dict[str, int] = {}
    for spec in manifest.inputs:
        for axis, name in spec.axes.items():
            size = inputs[spec.name].shape[axis]
            if found.setdefault(name, size) != size:
                raise ValueError(
                    f"input {spec.name!r} has {name} {size}, and another has {found[name]}: one "
                    f"request has one {name}"
                )
    return found


def smallest(manifest: Manifest, lengths: Mapping[str, int]) -> LengthBucket:
    """The smallest bucket that holds `lengths`, dimension by dimension.

    Raises:
      ValueError: one is longer than the longest bucket.
    """
    bucket: list[int] = []
    for name, sizes in manifest.lengths.items():
        if lengths[name] > sizes[-1]:
            raise ValueError(
                f"{name} is {lengths[name]}, and the model takes at most {sizes[-1]}: send less, "
                f"or convert it with a longer bucket"
            )
        bucket.append(next(size for size in sizes if size >= lengths[name]))
    return tuple(bucket)


def pad(manifest: Manifest, inputs: Arrays, bucket: LengthBucket) -> dict[str, Array]:
    """`inputs` with their symbolic dimensions filled up to `bucket` with each input's pad value."""
    sizes = manifest.sizes(bucket)
    padded: dict[str, Array] = {}
    for spec in manifest.inputs:
        array = inputs[spec.name]
        whole = spec.with_rows(len(array), sizes)
        if array.shape != whole.shape:
            filled = np.full(whole.shape, manifest.pads.get(spec.name, 0), whole.dtype)
            filled[tuple(map(slice, array.shape))] = array
            array = filled
        padded[spec.name] = array
    return padded


def cut(manifest: Manifest, outputs: Arrays, lengths: Mapping[str, int]) -> dict[str, Array]:
    """`outputs` with their symbolic dimensions cut back to `lengths`."""
    parts: dict[str, Array] = {}
    for spec in manifest.outputs:
        array = outputs[spec.name]
        if spec.axes:
            window = [slice(None)] * array.ndim
            for axis, name in spec.axes.items():
                window[axis] = slice(lengths[name])
            array = np.ascontiguousarray(array[tuple(window)])
        parts[spec.name] = array
    return parts
