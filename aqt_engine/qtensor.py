"""A quantized tensor."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


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

    def dequant(self) -> jax.Array:
        """The float tensor, of `dequant_dtype`, each value rounded to its bucket."""
        x = jnp.asarray(self.qvalue).astype(self.dequant_dtype)
        if self.scale is not None:
            x = x * self.scale
        if self.bias is not None:
            x = x - self.bias
        return x.astype(self.dequant_dtype)
