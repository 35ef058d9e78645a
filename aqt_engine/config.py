"""What is quantized, and how: frozen configurations, and the presets that make them.

A contraction happens three times: once forward, and once backward for each side, because the
gradient of a contraction is two contractions. Each of the three has its own `DotGeneralRaw`, and
each side of each its own `Tensor`. In both backward contractions the incoming gradient stands on
the left. To change a configuration, make another with `dataclasses.replace`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aqt_engine.calibration import AbsMaxCalibration, Calibration
from aqt_engine.context import Context
from aqt_engine.numerics import IntNumerics, Noise, NoNumerics, Numerics, Uniform
from aqt_engine.ops.dot_general import DimensionNumbers, Operand, dot_general
from aqt_engine.quantizer import Quantizer, SharedAxes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """How one side of one contraction is quantized.

    `calib_shared_axes` None shares a scale along the contracted axes. `use_fake_quant` returns the
    rounded values to float before contracting. `use_fwd_quant`, on the right side of a backward
    contraction, takes the operand as the forward pass quantized it: the gradient is multiplied by
    its scale and contracted with its integers.
    """

    numerics: Numerics | NoNumerics = NoNumerics()
    calib_shared_axes: SharedAxes = None
    scale_stop_grad: bool = True
    calibration: Calibration = AbsMaxCalibration()
    po2_scale: bool = False
    use_fake_quant: bool = False
    use_fwd_quant: bool = False

    def quantizer(self, key: jax.Array | None) -> Quantizer:
        """The quantizer that does it, drawing noise with `key`."""
        return Quantizer(
            numerics=self.numerics,
            calib_shared_axes=self.calib_shared_axes,
            scale_stop_grad=self.scale_stop_grad,
            calibration=self.calibration,
            po2_scale=self.po2_scale,
            context=Context(key=key),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LocalAqt:
    """Quantizes the first contracted axis in `contraction_axis_shard_count` pieces.

    Each piece has scales of its own; their results are summed in float.
    """

    contraction_axis_shard_count: int

    def __post_init__(self):
        if self.contraction_axis_shard_count < 1:
            raise ValueError(
                f"`contraction_axis_shard_count` must be at least 1, got "
                f"{self.contraction_axis_shard_count}"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DotGeneralRaw:
    """One contraction: its sides, and what it is computed in.

    The quantized values are cast to `dg_in_dtype` (None: left as they are) and summed in
    `dg_accumulator_dtype` (None: the dtype that `jax.lax.dot_general` chooses).

    Raises:
      ValueError: an integer accumulator is asked for sides that are not integers.
    """

    lhs: Tensor = Tensor()
    rhs: Tensor = Tensor()
    dg_in_dtype: DTypeLike | None = None
    dg_accumulator_dtype: DTypeLike | None = None
    local_aqt: LocalAqt | None = None

    def __post_init__(self):
        for name, dtype in (
            ("dg_in_dtype", self.dg_in_dtype),
            ("dg_accumulator_dtype", self.dg_accumulator_dtype),
        ):
            if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
                continue
            for side, tensor in (("lhs", self.lhs), ("rhs", self.rhs)):
                if not _is_whole(tensor):
                    raise ValueError(
                        f"`{name}={jnp.dtype(dtype).name}` needs whole numbers on both sides, and "
                        f"`{side}` has {tensor.numerics} with use_fake_quant="
                        f"{tensor.use_fake_quant}: quantize it to integers with `preserve_zero` "
                        f"and `round`, or leave `{name}` None"
                    )

    def swapped(self) -> "DotGeneralRaw":
        """The same with left and right exchanged."""
        return dataclasses.replace(self, lhs=self.rhs, rhs=self.lhs)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DotGeneral:
    """A contraction and its two gradients. Called, it contracts.

    Raises:
      ValueError: `use_fwd_quant` stands anywhere but on the right of a backward contraction, or
        the forward is split by `local_aqt`.
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
        if self.fwd.local_aqt is not None:
            raise ValueError("`local_aqt` is for `dlhs` and `drhs`; `fwd` has one scale a row")

    def __call__(
        self,
        lhs: Operand,
        rhs: Operand,
        dimension_numbers: DimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
        *,
        context: Context = Context(),
    ) -> jax.Array:
        """`aqt_engine.ops.dot_general` with this configuration; a drop-in for `jax.lax`'s."""
        return dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            config=self,
            context=context,
        )

    def swapped(self) -> "DotGeneral":
        """The configuration that does to (rhs, lhs) what this one does to (lhs, rhs)."""
        return DotGeneral(fwd=self.fwd.swapped(), dlhs=self.drhs, drhs=self.dlhs)


def int_tensor(bits: int | None, *, noise_fn: Noise | None = None) -> Tensor:
    """A side of `bits` bits with AQT's defaults; None leaves it in float.

    Zero is kept, the scale maps the largest magnitude onto the edge of the last bucket, values
    beyond the last centre are clipped, and gradients pass straight through. Up to 8 bits are
    stored as int4 or int8; one bit, and more than 8, in the input's float dtype.
    """
    if bits is None:
        return Tensor()
    dtype = None if bits == 1 or bits > 8 else jnp.int4 if bits == 4 else jnp.int8
    return Tensor(
        numerics=IntNumerics(
            bits=bits,
            preserve_zero=bits > 1,
            preserve_max_val=False,
            clip=True,
            clip_gradient=False,
            round=True,
            noise_fn=noise_fn,
            dtype=dtype,
        )
    )


def raw(lhs: Tensor, rhs: Tensor) -> DotGeneralRaw:
    """A contraction of `lhs` and `rhs`: in int8 with an int32 accumulator where both are whole."""
    integers = all(_is_whole(t) and _numerics_dtype(t) is not None for t in (lhs, rhs))
    return DotGeneralRaw(
        lhs=lhs,
        rhs=rhs,
        dg_in_dtype=jnp.int8 if integers else None,
        dg_accumulator_dtype=jnp.int32 if integers else None,
    )


def fully_quantized(
    fwd_bits: int | None = 8,
    bwd_bits: int | None = 8,
    use_fwd_quant: bool = True,
    use_stochastic_rounding: bool = True,
) -> DotGeneral:
    """All three contractions quantized, on both sides: AQT's preset of the same name.

    The backward pass takes the operands as the forward quantized them, and rounds stochastically;
    a call that is differentiated then needs a PRNG key.
    """
    forward = int_tensor(fwd_bits)
    gradient = int_tensor(bwd_bits, noise_fn=Uniform() if use_stochastic_rounding else None)
    backward = raw(gradient, dataclasses.replace(gradient, use_fwd_quant=use_fwd_quant))
    return DotGeneral(fwd=raw(forward, forward), dlhs=backward, drhs=backward)


def _is_whole(tensor: Tensor) -> bool:
    numerics = tensor.numerics
    return (
        isinstance(numerics, IntNumerics)
        and numerics.preserve_zero
        and numerics.round
        and not tensor.use_fake_quant
    )


def _numerics_dtype(tensor: Tensor) -> DTypeLike | None:
    return None if isinstance(tensor.numerics, NoNumerics) else tensor.numerics.dtype
