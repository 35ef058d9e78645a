"""What is quantized, and how: the frozen configuration of a contraction.

A contraction happens three times: once forward, and once backward for each side, because the
gradient of a contraction is two contractions. Each of the three has its own `DotGeneralRaw`, and
each side of each its own `Tensor`. In both backward contractions the incoming gradient stands on
the left. To change a configuration, make another with `dataclasses.replace`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aqt_engine.calibration import AbsMaxCalibration, Calibration
from aqt_engine.context import Context
from aqt_engine.modes import CalibrationMode, DequantMode
from aqt_engine.numerics import IntNumerics, NoNumerics, Numerics
from aqt_engine.ops.axes import Axes, DimensionNumbers
from aqt_engine.ops.dot_general import dot_general
from aqt_engine.ops.operand import Operand, require_no_out_sharding
from aqt_engine.qtensor import Scale
from aqt_engine.quantizer import Quantizer, SharedAxes


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """How one side of one contraction is quantized.

    `calib_shared_axes`, where it is not None, takes the place of the axes of `calibration_mode`.
    `use_fake_quant` is short for `dequant_mode=DequantMode.THIS_INPUT`. `use_fwd_quant`, on the
    right side of a backward contraction, takes the operand as the forward pass quantized it: the
    gradient is multiplied by its scale and contracted with its integers.

    Raises:
      ValueError: the scale would vary along axes where `dequant_mode` cannot multiply it back in.
    """

    numerics: Numerics | NoNumerics = NoNumerics()
    calib_shared_axes: SharedAxes = None
    scale_stop_grad: bool = True
    calibration: Calibration = AbsMaxCalibration()
    po2_scale: bool = False
    use_fake_quant: bool = False
    use_fwd_quant: bool = False
    scale_dtype: DTypeLike | None = None
    calibration_mode: CalibrationMode = CalibrationMode.CONTRACTING_AXIS
    dequant_mode: DequantMode = DequantMode.OUTPUT

    def __post_init__(self):
        # One spelling, so that equal configurations are equal and hash alike.
        if self.scale_dtype is not None:
            object.__setattr__(self, "scale_dtype", jnp.dtype(self.scale_dtype))
        if isinstance(self.calib_shared_axes, list):
            object.__setattr__(self, "calib_shared_axes", tuple(self.calib_shared_axes))
        if self.use_fake_quant and self.dequant_mode is DequantMode.OTHER_INPUT:
            raise ValueError(
                "`use_fake_quant` multiplies the scale into this operand and "
                "`DequantMode.OTHER_INPUT` into the other: leave one of them out"
            )
        if isinstance(self.numerics, NoNumerics) or self.calib_shared_axes is not None:
            return
        mode = (self.calibration_mode, self.dequantized_at)
        if mode == (CalibrationMode.REMAINING_AXIS, DequantMode.OUTPUT):
            raise ValueError(
                "a scale shared along the remaining axes varies along the contracted ones, and "
                "cannot be multiplied into the output: use `DequantMode.THIS_INPUT` or OTHER_INPUT"
            )
        if mode == (CalibrationMode.CONTRACTING_AXIS, DequantMode.OTHER_INPUT):
            raise ValueError(
                "a scale shared along the contracted axes varies along the remaining ones, which "
                "the other operand does not have: use `DequantMode.OUTPUT` or THIS_INPUT"
            )

    @property
    def dequantized_at(self) -> DequantMode:
        """`dequant_mode`, or what `use_fake_quant` is short for."""
        return DequantMode.THIS_INPUT if self.use_fake_quant else self.dequant_mode

    @property
    def is_quantized(self) -> bool:
        """Whether there are numerics."""
        return not isinstance(self.numerics, NoNumerics)

    @property
    def is_whole(self) -> bool:
        """Whether what is contracted of this side are whole numbers."""
        return (
            isinstance(self.numerics, IntNumerics)
            and self.numerics.preserve_zero
            and self.numerics.round
            and self.dequantized_at is not DequantMode.THIS_INPUT
        )

    def shared_by(self, ndim: int, contracting: Axes, batch: Axes) -> Axes:
        """The axes of `calibration_mode`, for an operand of these axes."""
        match self.calibration_mode:
            case CalibrationMode.CONTRACTING_AXIS:
                return contracting
            case CalibrationMode.REMAINING_AXIS:
                return tuple(a for a in range(ndim) if a not in (*contracting, *batch))
            case CalibrationMode.ALL_AXES:
                return tuple(range(ndim))

    def quantizer(self, key: jax.Array | None) -> Quantizer:
        """The quantizer that does it, drawing noise with `key`."""
        return Quantizer(
            numerics=self.numerics,
            calib_shared_axes=self.calib_shared_axes,
            scale_stop_grad=self.scale_stop_grad,
            calibration=self.calibration,
            po2_scale=self.po2_scale,
            context=Context(key=key),
            scale_dtype=self.scale_dtype,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class LocalAqt:
    """Quantizes the first contracted axis in `contraction_axis_shard_count` pieces.

    Each piece has scales of its own; their results are summed in float. In the forward pass this
    is sub-channel quantization, and what conversion stores has the pieces as its first axis.
    """

    contraction_axis_shard_count: int

    def __post_init__(self):
        if self.contraction_axis_shard_count < 1:
            raise ValueError(
                f"`contraction_axis_shard_count` must be at least 1, got "
                f"{self.contraction_axis_shard_count}"
            )

    def shards(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Which of the contracted axes, of these sizes, is split, and into how many pieces.

        Raises:
          ValueError: the pieces would not be equal.
        """
        if sizes[0] % self.contraction_axis_shard_count:
            raise ValueError(
                f"a contracted axis of {sizes[0]} cannot be split into "
                f"`contraction_axis_shard_count={self.contraction_axis_shard_count}` equal shards"
            )
        return 0, self.contraction_axis_shard_count


@dataclasses.dataclass(frozen=True, slots=True)
class LocalAqtBySize:
    """Quantizes the largest contracted axis in pieces of `contraction_axis_shard_size` values.

    Otherwise as `LocalAqt`. Of axes of equal size it is the first.
    """

    contraction_axis_shard_size: int

    def __post_init__(self):
        if self.contraction_axis_shard_size < 1:
            raise ValueError(
                f"`contraction_axis_shard_size` must be at least 1, got "
                f"{self.contraction_axis_shard_size}"
            )

    def shards(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Which of the contracted axes, of these sizes, is split, and into how many pieces.

        Raises:
          ValueError: the pieces would not be of that size.
        """
        largest = max(sizes)
        if largest % self.contraction_axis_shard_size:
            raise ValueError(
                f"a contracted axis of {largest} cannot be split into shards of "
                f"`contraction_axis_shard_size={self.contraction_axis_shard_size}`"
            )
        return list(sizes).index(largest), largest // self.contraction_axis_shard_size


@dataclasses.dataclass(frozen=True, slots=True)
class DotGeneralRaw:
    """One contraction: its sides, and what it is computed in.

    The quantized values are cast to `dg_in_dtype` (None: left as they are) and summed in
    `dg_accumulator_dtype` (None: the dtype that `jax.lax.dot_general` chooses).

    Raises:
      ValueError: an integer accumulator is asked for sides that are not integers, or a side is
        to be scaled into another that is not float.
    """

    lhs: Tensor = Tensor()
    rhs: Tensor = Tensor()
    dg_in_dtype: DTypeLike | None = None
    dg_accumulator_dtype: DTypeLike | None = None
    local_aqt: LocalAqt | LocalAqtBySize | None = None

    def __post_init__(self):
        for side, tensor, other in (
            ("lhs", self.lhs, self.rhs),
            ("rhs", self.rhs, self.lhs),
        ):
            if (
                tensor.is_quantized
                and tensor.dequantized_at is DequantMode.OTHER_INPUT
                and other.is_quantized
                and other.dequantized_at is not DequantMode.THIS_INPUT
            ):
                raise ValueError(
                    f"`{side}` has `DequantMode.OTHER_INPUT`, which multiplies its scale into the "
                    f"other side, and that is quantized: leave the other side in float"
                )
        for name, dtype in (
            ("dg_in_dtype", self.dg_in_dtype),
            ("dg_accumulator_dtype", self.dg_accumulator_dtype),
        ):
            if dtype is None:
                continue
            object.__setattr__(self, name, jnp.dtype(dtype))
            if not jnp.issubdtype(dtype, jnp.integer):
                continue
            for side, tensor in (("lhs", self.lhs), ("rhs", self.rhs)):
                if not tensor.is_whole:
                    raise ValueError(
                        f"`{name}={jnp.dtype(dtype).name}` needs whole numbers on both sides, and "
                        f"`{side}` has {tensor.numerics} with use_fake_quant="
                        f"{tensor.use_fake_quant}: quantize it to integers with `preserve_zero` "
                        f"and `round`, or leave `{name}` None"
                    )

    def swapped(self) -> "DotGeneralRaw":
        """The same with left and right exchanged."""
        return dataclasses.replace(self, lhs=self.rhs, rhs=self.lhs)


@dataclasses.dataclass(frozen=True, slots=True)
class DotGeneral:
    """A contraction and its two gradients. Called, it contracts.

    Raises:
      ValueError: `use_fwd_quant` stands anywhere but on the right of a backward contraction, or
        there for an operand whose forward scale cannot be multiplied into the gradient.
    """

    fwd: DotGeneralRaw = DotGeneralRaw()
    dlhs: DotGeneralRaw = DotGeneralRaw()
    drhs: DotGeneralRaw = DotGeneralRaw()

    def __post_init__(self):
        for name, tensor in (
            ("fwd.lhs", self.fwd.lhs),
            ("fwd.rhs", self.fwd.rhs),
            ("dlhs.lhs", self.dlhs.lhs),
            ("drhs.lhs", self.drhs.lhs),
        ):
            if tensor.use_fwd_quant:
                raise ValueError(
                    f"`{name}` has `use_fwd_quant`, but only `dlhs.rhs` and `drhs.rhs` are "
                    f"operands that the forward pass has quantized"
                )
        for name, forward, backward in (
            ("drhs", self.fwd.lhs, self.drhs),
            ("dlhs", self.fwd.rhs, self.dlhs),
        ):
            mode = forward.calibration_mode
            if backward.rhs.use_fwd_quant and mode is CalibrationMode.REMAINING_AXIS:
                raise ValueError(
                    f"`{name}.rhs` has `use_fwd_quant`, but the forward's scale for it is shared "
                    f"along the remaining axes and cannot be multiplied into the gradient: set "
                    f"`use_fwd_quant=False`"
                )

    def __call__(
        self,
        lhs: Operand,
        rhs: Operand,
        dimension_numbers: DimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
        *,
        out_sharding: None = None,
        context: Context = Context(),
        lhs_scale: Scale | None = None,
        rhs_scale: Scale | None = None,
    ) -> jax.Array:
        """`aqt_engine.ops.dot_general` with this configuration; a drop-in for `jax.lax`'s."""
        require_no_out_sharding(out_sharding)
        return dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            config=self,
            context=context,
            lhs_scale=lhs_scale,
            rhs_scale=rhs_scale,
        )

    def swapped(self) -> "DotGeneral":
        """The configuration that does to (rhs, lhs) what this one does to (lhs, rhs)."""
        return DotGeneral(fwd=self.fwd.swapped(), dlhs=self.drhs, drhs=self.dlhs)
