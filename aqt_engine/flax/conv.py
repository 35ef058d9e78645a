"""Quantized convolution as a Flax linen module."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from aqt_engine.context import Context
from aqt_engine.flax.linen import AqtDotGeneral, numbered
from aqt_engine.ops.conv import conv_general_dilated, quantize_lhs, quantize_rhs
from aqt_engine.ops.operand import Operand
from aqt_engine.ops.windows import ConvAxes


class AqtConvGeneralDilated(AqtDotGeneral):
    """A quantized drop-in for `jax.lax.conv_general_dilated`, as `AqtDotGeneral` is for its op.

    `nn.Conv(8, (3, 3), conv_general_dilated=AqtConvGeneralDilated(config))`. The fields and the
    modes are those of `AqtDotGeneral`; the kernel is the right side.
    """

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]: it stands for another op
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array:
        """The convolution, as `aqt_engine.ops.conv_general_dilated` defines it.

        Raises:
          ValueError: a side is in SERVE and nothing was stored for it, or what was stored has
            another shape; or there is a `tiling`.
        """
        if self.tiling is not None:
            raise ValueError("a convolution is not tiled: leave `tiling` None")
        convolution: Callable[..., jax.Array] = jax.lax.conv_general_dilated
        left: Operand = lhs
        right: Operand = rhs
        config = self.configuration()
        if config is not None:
            call = self.calls.next()
            axes = ConvAxes.parse(
                lhs.shape,
                rhs.shape,
                window_strides,
                padding,
                lhs_dilation,
                rhs_dilation,
                dimension_numbers,
                feature_group_count,
                batch_group_count,
            )
            left, left_scale = self.side(
                self.lhs_quant_mode,
                numbered(self.lhs_var_name, call),
                lhs,
                config.fwd.lhs,
                (axes.lhs_contracting, ()),
                functools.partial(quantize_lhs, lhs, axes, config=config),
            )
            right, right_scale = self.side(
                self.rhs_quant_mode,
                numbered(self.rhs_var_name, call),
                rhs,
                config.fwd.rhs,
                (axes.rhs_contracting, ()),
                functools.partial(quantize_rhs, rhs, axes, config=config),
            )
            convolution = functools.partial(
                conv_general_dilated,
                config=config,
                context=Context(key=self.key()),
                lhs_scale=left_scale,
                rhs_scale=right_scale,
            )
        return convolution(
            left,
            right,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
            precision,
            preferred_element_type,
        )
