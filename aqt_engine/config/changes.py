"""Changes to configurations that are more than one `update`.

Each returns another configuration. AQT's functions of these names begin with `set_` and change the
configuration that they are given; a call of one of these whose result is dropped does nothing, so
they have names of their own.
"""

import dataclasses
from collections.abc import Callable

from aqt_engine.calibration import AbsMaxCalibration
from aqt_engine.config.contraction import DotGeneral, DotGeneralRaw, Tensor
from aqt_engine.config.presets import int_numerics, int_tensor, raw
from aqt_engine.numerics import (
    FloatNumerics,
    Fp8Numerics,
    IntNumerics,
    Noise,
    NoNumerics,
    Numerics,
    Uniform,
)


def with_bits(
    config: DotGeneral,
    fwd_lhs_bit: int | None,
    fwd_rhs_bit: int | None,
    dlhs_lhs_bit: int | None,
    dlhs_rhs_bit: int | None,
    drhs_lhs_bit: int | None,
    drhs_rhs_bit: int | None,
) -> DotGeneral:
    """`config` with integers of these bits on each side, absmax calibrated; None for float.

    Dtypes and accumulators are those of `config.raw`; noise and `use_fwd_quant` are gone, and what
    else a side or a contraction has (modes, axes, shards) stays.
    """

    def changed(old: DotGeneralRaw, lhs: int | None, rhs: int | None) -> DotGeneralRaw:
        def side(tensor: Tensor, bits: int | None) -> Tensor:
            new = int_tensor(bits)
            return dataclasses.replace(
                tensor, numerics=new.numerics, calibration=new.calibration, use_fwd_quant=False
            )

        made = raw(side(old.lhs, lhs), side(old.rhs, rhs))
        return dataclasses.replace(made, local_aqt=old.local_aqt)

    return DotGeneral(
        fwd=changed(config.fwd, fwd_lhs_bit, fwd_rhs_bit),
        dlhs=changed(config.dlhs, dlhs_lhs_bit, dlhs_rhs_bit),
        drhs=changed(config.drhs, drhs_lhs_bit, drhs_rhs_bit),
    )


def with_stochastic_rounding(
    config: DotGeneral,
    vjp_lhs_stochastic_rounding: bool,
    vjp_rhs_stochastic_rounding: bool,
    noise_fn: Noise | None = None,
) -> DotGeneral:
    """`config` whose backward contractions round their left and right sides so, or to nearest.

    The left side is the incoming gradient. Integers draw `noise_fn`, or else `Uniform()`; floats
    draw noise of their own.
    """
    drawn = Uniform() if noise_fn is None else noise_fn

    def rounded(numerics: Numerics | NoNumerics, stochastic: bool) -> Numerics | NoNumerics:
        match numerics:
            case IntNumerics():
                return dataclasses.replace(numerics, noise_fn=drawn if stochastic else None)
            case Fp8Numerics() | FloatNumerics():
                return dataclasses.replace(numerics, stochastic_rounding=stochastic)
            case _:
                return numerics

    def changed(contraction: DotGeneralRaw) -> DotGeneralRaw:
        left = rounded(contraction.lhs.numerics, vjp_lhs_stochastic_rounding)
        right = rounded(contraction.rhs.numerics, vjp_rhs_stochastic_rounding)
        return dataclasses.replace(
            contraction,
            lhs=dataclasses.replace(contraction.lhs, numerics=left),
            rhs=dataclasses.replace(contraction.rhs, numerics=right),
        )

    return dataclasses.replace(config, dlhs=changed(config.dlhs), drhs=changed(config.drhs))


def with_absmax_calib_scale(config: DotGeneral, scale: float) -> DotGeneral:
    """`config` whose absmax calibrations take `scale` times the largest magnitude.

    Below 1 it clips, so integers stop gradients where a value was clipped.

    Raises:
      ValueError: `scale` is not positive, or a quantized side has another calibration.
    """

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_quantized:
            return tensor
        if not isinstance(tensor.calibration, AbsMaxCalibration):
            raise ValueError(
                f"every quantized side must have an AbsMaxCalibration, and one has "
                f"{tensor.calibration}: use `config.update` for the sides that have one"
            )
        numerics = tensor.numerics
        if scale < 1 and isinstance(numerics, IntNumerics):
            numerics = dataclasses.replace(numerics, clip_gradient=True)
        calibration = AbsMaxCalibration(scale)
        return dataclasses.replace(tensor, numerics=numerics, calibration=calibration)

    return _with_sides(config, changed)


def with_int_numerics_preserve_zero(config: DotGeneral, preserve_zero: bool) -> DotGeneral:
    """`config` whose integers have zero among their buckets, or are half-integers.

    Half-integers are stored and summed in float; integers as `config.int_numerics` says.
    """

    def changed(tensor: Tensor) -> Tensor:
        numerics = tensor.numerics
        if not isinstance(numerics, IntNumerics):
            return tensor
        dtype = int_numerics(numerics.bits).dtype if preserve_zero else None
        numerics = dataclasses.replace(numerics, preserve_zero=preserve_zero, dtype=dtype)
        return dataclasses.replace(tensor, numerics=numerics)

    def remade(contraction: DotGeneralRaw) -> DotGeneralRaw:
        made = raw(changed(contraction.lhs), changed(contraction.rhs))
        return dataclasses.replace(made, local_aqt=contraction.local_aqt)

    return DotGeneral(fwd=remade(config.fwd), dlhs=remade(config.dlhs), drhs=remade(config.drhs))


def _with_sides(config: DotGeneral, changed: Callable[[Tensor], Tensor]) -> DotGeneral:
    def both(contraction: DotGeneralRaw) -> DotGeneralRaw:
        return dataclasses.replace(
            contraction, lhs=changed(contraction.lhs), rhs=changed(contraction.rhs)
        )

    return DotGeneral(fwd=both(config.fwd), dlhs=both(config.dlhs), drhs=both(config.drhs))
