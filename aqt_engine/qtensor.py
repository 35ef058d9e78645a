"""A quantized tensor, and parts of one.

A cache of keys or values is a `QTensor` with a scale for each position:

    cache = QTensor.zeros((batch, length, heads, depth), calibration_axes=(-1,))
    cache = dynamic_update_slice(cache, quantized, (0, position, 0, 0))
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

Index = int | slice | jax.Array

MARKS: Mapping[str, Literal["qvalue", "scale", "bias"]] = {
    "aqt_qvalue": "qvalue",
    "aqt_scale": "scale",
    "aqt_bias": "bias",
}
"""The names that `jax.ad_checkpoint` knows what was quantized by, and what they are the names of.

Conversion finds it by them; a policy of `jax.checkpoint` may save it by them. They are in the
jaxpr alone: nothing is compiled of them.
"""

POWER_OF_TWO = "aqt_power_of_two"
"""The name, in the same manner, of what is computed and is a power of two."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "bias"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """How a tensor is mapped onto buckets: q = (x + bias) / scale.

    Both have the rank of the tensor, with 1 in the axes that share a scale. A `bias` of None is 0.
    """

    scale: jax.Array
    bias: jax.Array | None = None

    def marked(self) -> "Scale":
        """The same, under the names `aqt_scale` and `aqt_bias`."""
        bias = None if self.bias is None else checkpoint_name(self.bias, "aqt_bias")
        return Scale(checkpoint_name(self.scale, "aqt_scale"), bias)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["qvalue", "scale", "bias"],
    meta_fields=["dequant_dtype"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class QTensor:
    """`qvalue` times `scale`, minus `bias`.

    `scale` and `bias` have the rank of `qvalue`, with 1 in the axes that share a scale; None means
    1 and 0. `dequant_dtype` is the float dtype of the tensor that was quantized.
    """

    qvalue: jax.Array
    scale: jax.Array | None
    dequant_dtype: np.dtype
    bias: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that was quantized."""
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        """The rank of the tensor that was quantized."""
        return self.qvalue.ndim

    @property
    def dtype(self) -> np.dtype:
        """The dtype that `dequant` gives."""
        return self.dequant_dtype

    @staticmethod
    def zeros(
        shape: Sequence[int],
        calibration_axes: Sequence[int],
        qvalue_dtype: DTypeLike = jnp.int8,
        dequant_dtype: DTypeLike = jnp.float32,
    ) -> "QTensor":
        """Zeros with a scale of 1 for each group along `calibration_axes`: an empty cache."""
        axes = {axis % len(shape) for axis in calibration_axes}
        reduced = [1 if axis in axes else size for axis, size in enumerate(shape)]
        dtype = jnp.dtype(dequant_dtype)
        return QTensor(jnp.zeros(shape, qvalue_dtype), jnp.ones(reduced, dtype), dtype)

    def __getitem__(self, index: "Index | tuple[Index, ...]") -> "QTensor":
        """The part of the tensor at `index` of its first axes: numbers, slices and arrays.

        Raises:
          IndexError: there are more indices than axes.
        """
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) > self.ndim:
            raise IndexError(f"{len(indices)} indices for a QTensor of {self.ndim} dimensions")

        def part(x: jax.Array) -> jax.Array:
            return x[tuple(_shared(i, x.shape[a]) for a, i in enumerate(indices))]

        return dataclasses.replace(
            self,
            qvalue=jnp.asarray(self.qvalue)[indices],
            scale=None if self.scale is None else part(self.scale),
            bias=None if self.bias is None else part(self.bias),
        )

    def dequant(self) -> jax.Array:
        """The float tensor, of `dequant_dtype`, each value rounded to its bucket."""
        x = jnp.asarray(self.qvalue).astype(self.dequant_dtype)
        if self.scale is not None:
            x = x * self.scale
        if self.bias is not None:
            x = x - self.bias
        return x.astype(self.dequant_dtype)


def dynamic_slice(
    x: QTensor, start_indices: Sequence[ArrayLike], slice_sizes: Sequence[int]
) -> QTensor:
    """`jax.lax.dynamic_slice` of a quantized tensor: its values, and their scales with them."""

    def part(array: jax.Array) -> jax.Array:
        starts = [_shared(start, n) for start, n in zip(start_indices, array.shape, strict=True)]
        sizes = [min(size, n) for size, n in zip(slice_sizes, array.shape, strict=True)]
        return lax.dynamic_slice(array, starts, sizes)

    return dataclasses.replace(
        x,
        qvalue=lax.dynamic_slice(x.qvalue, start_indices, slice_sizes),
        scale=None if x.scale is None else part(x.scale),
        bias=None if x.bias is None else part(x.bias),
    )


def dynamic_update_slice(
    x: QTensor, update: QTensor, start_indices: Sequence[ArrayLike]
) -> QTensor:
    """`jax.lax.dynamic_update_slice` of a quantized tensor: of its values, and of their scales.

    Raises:
      ValueError: the two are not quantized alike, or the update is only a part of the values that
        share a scale, whose others it would rescale.
    """
    kinds, others = (
        (q.qvalue.dtype, q.dequant_dtype, q.scale is not None, q.bias is not None)
        for q in (x, update)
    )
    if kinds != others:
        raise ValueError(
            f"a QTensor of (dtype, dequantized dtype, has scale, has bias) {kinds} is updated with "
            f"one of {others}: quantize both alike"
        )
    for part, new in ((x.scale, update.scale), (x.bias, update.bias)):
        if part is None or new is None:
            continue
        for axis, (size, whole) in enumerate(zip(update.shape, x.shape, strict=True)):
            shared = part.shape[axis] == 1 and whole != 1
            expected = 1 if part.shape[axis] == 1 else size
            if new.shape[axis] != expected or (shared and size != whole):
                raise ValueError(
                    f"an update of shape {update.shape} with scales of shape {new.shape} does not "
                    f"fit a QTensor of shape {x.shape} with scales of shape {part.shape}: along "
                    f"axis {axis} it must have a scale for each of the values that have one there, "
                    f"or be whole"
                )

    def updated(old: jax.Array, new: jax.Array) -> jax.Array:
        starts = [_shared(start, n) for start, n in zip(start_indices, old.shape, strict=True)]
        return lax.dynamic_update_slice(old, new, starts)

    scale, bias = jax.tree.map(updated, (x.scale, x.bias), (update.scale, update.bias))
    qvalue = lax.dynamic_update_slice(x.qvalue, update.qvalue, start_indices)
    return dataclasses.replace(x, qvalue=qvalue, scale=scale, bias=bias)


def _shared(index: Any, size: int) -> Any:
    """An index of the tensor, for a scale of this size along the axis: all share the one there."""
    if size != 1:
        return index
    return slice(None) if isinstance(index, slice) else jnp.zeros_like(index)
