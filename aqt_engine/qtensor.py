"""A quantized tensor."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

MARKS: Mapping[str, Literal["qvalue", "scale", "bias"]] = {
    "aqt_qvalue": "qvalue",
    "aqt_scale": "scale",
    "aqt_bias": "bias",
}
"""The names that `jax.ad_checkpoint` knows what was quantized by, and what they are the names of.

Conversion finds it by them; a policy of `jax.checkpoint` may save it by them. They are in the
jaxpr alone: nothing is compiled of them.
"""


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

    def dequant(self) -> jax.Array:
        """The float tensor, of `dequant_dtype`, each value rounded to its bucket."""
        x = jnp.asarray(self.qvalue).astype(self.dequant_dtype)
        if self.scale is not None:
            x = x * self.scale
        if self.bias is not None:
            x = x - self.bias
        return x.astype(self.dequant_dtype)
