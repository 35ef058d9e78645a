"""Quantized ops as Flax nnx modules: with keys and statistics of their own."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from aqt_engine.config import DotGeneral
from aqt_engine.context import Context
from aqt_engine.modes import QuantMode
from aqt_engine.ops.axes import Axes, DimensionNumbers, DotAxes
from aqt_engine.ops.conv import conv_general_dilated
from aqt_engine.ops.einsum import contract, plan
from aqt_engine.ops.operand import require_no_out_sharding
from aqt_engine.ops.windows import ConvAxes
from aqt_engine.qtensor import Scale
from aqt_engine.static import StaticSide


class AqtStatistic(nnx.Variable[Any]):
    """One array of what a static calibration has learned."""


class AqtDotGeneral(nnx.Module):
    """A quantized drop-in for `jax.lax.dot_general`, with a key and statistics of its own.

    `nnx.Linear(8, 8, dot_general=nnx.data(AqtDotGeneral(config, rngs=rngs)), rngs=rngs)`. Noise is
    drawn with the stream `aqt` of `rngs`, or with the default one; without `rngs` there is none,
    and a plain `config` does as well as this.

    A side whose calibration keeps statistics learns them in `QuantMode.CALIBRATE`, and in TRAIN
    where the calibration says so, unless `model.eval()` was called. They are made in the first
    call: let that be one outside of `nnx.jit`.
    """

    def __init__(self, config: DotGeneral, *, rngs: nnx.Rngs | None = None):
        self.config = config
        self.quant_mode = QuantMode.TRAIN
        self.use_running_average = False
        self.rngs = nnx.data(None if rngs is None else rngs.aqt.fork())
        self.statistics = nnx.data(nnx.Dict())

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
        *,
        out_sharding: None = None,
    ) -> jax.Array:
        """The contraction, as `aqt_engine.ops.dot_general` defines it."""
        return self._contract(
            self.config,
            ("lhs", "rhs"),
            precision,
            preferred_element_type,
            lhs,
            rhs,
            dimension_numbers,
            out_sharding=out_sharding,
        )

    def _contract(
        self,
        config: DotGeneral,
        names: tuple[str, str],
        precision: jax.lax.PrecisionLike,
        preferred_element_type: DTypeLike | None,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DimensionNumbers,
        out_sharding: None = None,
    ) -> jax.Array:
        axes = DotAxes.parse(dimension_numbers, lhs.ndim, rhs.ndim)
        sides = (
            (axes.lhs_contracting, axes.lhs_batch),
            (axes.rhs_contracting, axes.rhs_batch),
        )
        return config(
            lhs,
            rhs,
            dimension_numbers,
            precision,
            preferred_element_type,
            out_sharding=out_sharding,
            context=self.context(),
            **self.scales(config, names, (lhs, rhs), sides),
        )

    def context(self) -> Context:
        """A fresh key, if there are `rngs`."""
        return Context(key=None if self.rngs is None else self.rngs())

    def scales(
        self,
        config: DotGeneral,
        names: tuple[str, str],
        operands: tuple[jax.Array, jax.Array],
        sides: tuple[tuple[Axes, Axes], tuple[Axes, Axes]],
    ) -> dict[str, Scale]:
        """`lhs_scale` and `rhs_scale` of those sides that are static; `names` are for statistics.

        `sides` are the contracting and batch axes of the operands.
        """
        scales: dict[str, Scale] = {}
        for side, name, x, axes in zip(("lhs", "rhs"), names, operands, sides, strict=True):
            static = StaticSide.of(config, side, x.ndim, axes)
            if static is not None:
                scales[f"{side}_scale"] = self._static_scale(static, name, x)
        return scales

    def _static_scale(self, static: StaticSide, name: str, x: jax.Array) -> Scale:
        if name not in self.statistics:
            empty = static.empty(jax.ShapeDtypeStruct(x.shape, x.dtype), ())
            self.statistics[name] = nnx.Dict({k: AqtStatistic(v) for k, v in empty.items()})
        held = self.statistics[name]
        before = after = {k: v[...] for k, v in held.items()}
        learns = self.quant_mode is QuantMode.CALIBRATE or (
            self.quant_mode is QuantMode.TRAIN
            and static.calibration.learns_in_training
            and not self.use_running_average
        )
        if learns:
            after = static.observed(before, x)
            for k, v in after.items():
                held[k][...] = v
        if self.quant_mode is QuantMode.SERVE:
            return static.scale(before, x)
        # A delayed scale is that of the calls before; in CALIBRATE there is no reason to wait.
        return static.current(after if self.quant_mode is QuantMode.CALIBRATE else before, x)


class AqtEinsum(AqtDotGeneral):
    """A quantized `jax.numpy.einsum` of two operands: `AqtEinsum(config)("ab,bc->ac", x, w)`.

    The sides of `config` are the equation's operands, in its order.
    """

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]: it stands for another op
        self,
        equation: str,
        lhs: jax.Array,
        rhs: jax.Array,
        *,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
        out_sharding: None = None,
    ) -> jax.Array:
        """The einsum, as `aqt_engine.ops.einsum` defines it."""
        p = plan(equation, lhs.ndim, rhs.ndim)
        contraction = functools.partial(
            self._contract,
            self.config.swapped() if p.swap else self.config,
            ("rhs", "lhs") if p.swap else ("lhs", "rhs"),
            precision,
            preferred_element_type,
            out_sharding=out_sharding,
        )
        return contract(p, lhs, rhs, contraction)


class AqtConvGeneralDilated(AqtDotGeneral):
    """A quantized drop-in for `jax.lax.conv_general_dilated`; the kernel is the right side."""

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
        *,
        out_sharding: None = None,
    ) -> jax.Array:
        """The convolution, as `aqt_engine.ops.conv_general_dilated` defines it."""
        require_no_out_sharding(out_sharding)
        geometry = (
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
        )
        axes = ConvAxes.parse(lhs.shape, rhs.shape, *geometry)
        sides = ((axes.lhs_contracting, ()), (axes.rhs_contracting, ()))
        return conv_general_dilated(
            lhs,
            rhs,
            *geometry,
            precision,
            preferred_element_type,
            config=self.config,
            context=self.context(),
            **self.scales(self.config, ("lhs", "rhs"), (lhs, rhs), sides),
        )
