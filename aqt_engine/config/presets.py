"""Configurations that AQT users know by name, and a function that changes one."""

import dataclasses
import fnmatch
from typing import Any, Literal

import jax.numpy as jnp

from aqt_engine.config.contraction import (
    DotGeneral,
    DotGeneralRaw,
    LocalAqt,
    LocalAqtBySize,
    Tensor,
)
from aqt_engine.numerics import Fp8Numerics, IntNumerics, Noise, Numerics, Uniform

_SIDES = tuple(f"{c}.{side}" for c in ("fwd", "dlhs", "drhs") for side in ("lhs", "rhs"))


def int_numerics(bits: int, *, noise_fn: Noise | None = None) -> IntNumerics:
    """Integers of `bits` bits with AQT's defaults.

    Zero is kept, the scale maps the largest magnitude onto the edge of the last bucket, values
    beyond the last centre are clipped, and gradients pass straight through. Up to 8 bits are
    stored as int4 or int8; one bit, and more than 8, in the input's float dtype.
    """
    return IntNumerics(
        bits=bits,
        preserve_zero=bits > 1,
        preserve_max_val=False,
        clip=True,
        clip_gradient=False,
        round=True,
        noise_fn=noise_fn,
        dtype=None if bits == 1 or bits > 8 else jnp.int4 if bits == 4 else jnp.int8,
    )


def int_tensor(bits: int | None, *, noise_fn: Noise | None = None) -> Tensor:
    """A side of `int_numerics(bits)`, absmax calibrated; None leaves it in float."""
    return Tensor() if bits is None else Tensor(numerics=int_numerics(bits, noise_fn=noise_fn))


def raw(lhs: Tensor, rhs: Tensor) -> DotGeneralRaw:
    """A contraction of `lhs` and `rhs`, in the dtypes that hardware is fast in.

    Where both sides are whole numbers, they are contracted in int8 with an int32 accumulator;
    where one is fp8, the accumulator is float32.
    """
    dtypes = [t.numerics.dtype for t in (lhs, rhs) if isinstance(t.numerics, Numerics)]
    if lhs.is_whole and rhs.is_whole and None not in dtypes:
        in_dtype, accumulator_dtype = jnp.int8, jnp.int32
    elif any(d is not None and jnp.issubdtype(d, jnp.floating) for d in dtypes):
        in_dtype, accumulator_dtype = None, jnp.float32
    else:
        in_dtype, accumulator_dtype = None, None
    return DotGeneralRaw(
        lhs=lhs, rhs=rhs, dg_in_dtype=in_dtype, dg_accumulator_dtype=accumulator_dtype
    )


def fully_quantized(
    fwd_bits: int | None = 8,
    bwd_bits: int | None = 8,
    use_fwd_quant: bool = True,
    use_stochastic_rounding: bool = True,
) -> DotGeneral:
    """All three contractions quantized, on both sides.

    The backward pass takes the operands as the forward quantized them, and rounds stochastically;
    a call that is differentiated then needs a PRNG key.
    """
    forward = int_tensor(fwd_bits)
    gradient = int_tensor(bwd_bits, noise_fn=Uniform() if use_stochastic_rounding else None)
    backward = raw(gradient, dataclasses.replace(gradient, use_fwd_quant=use_fwd_quant))
    return DotGeneral(fwd=raw(forward, forward), dlhs=backward, drhs=backward)


def config_v4(
    fwd_bits: int | None = 8,
    dlhs_bits: int | None = 8,
    drhs_bits: int | None = None,
    *,
    use_stochastic_rounding: bool = True,
    dlhs_local_aqt: LocalAqt | LocalAqtBySize | None = None,
    drhs_local_aqt: LocalAqt | LocalAqtBySize | None = None,
) -> DotGeneral:
    """Only incoming gradients are rounded stochastically; the right side's gradient is in float.

    The backward contractions quantize the forward's float operands anew. This is the preset that
    AQT recommends for training.
    """

    noise_fn = Uniform() if use_stochastic_rounding else None

    def backward(bits: int | None, local_aqt: LocalAqt | LocalAqtBySize | None) -> DotGeneralRaw:
        contraction = raw(int_tensor(bits, noise_fn=noise_fn), int_tensor(bits))
        return dataclasses.replace(contraction, local_aqt=local_aqt)

    forward = int_tensor(fwd_bits)
    return DotGeneral(
        fwd=raw(forward, forward),
        dlhs=backward(dlhs_bits, dlhs_local_aqt),
        drhs=backward(drhs_bits, drhs_local_aqt),
    )


config_v3 = config_v4
"""The older name: for the arguments that it takes here, the two are the same."""


def config_fwd_fp8(fwd_bits: Literal["e4m3", "e5m2"] = "e4m3") -> DotGeneral:
    """The forward contraction in 8-bit floats, accumulated in float32; gradients in float.

    Raises:
      ValueError: `fwd_bits` names another format.
    """
    formats = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
    if fwd_bits not in formats:
        raise ValueError(f"`fwd_bits` must be one of {', '.join(formats)}, got {fwd_bits!r}")
    tensor = Tensor(numerics=Fp8Numerics(dtype=formats[fwd_bits]))
    return DotGeneral(fwd=raw(tensor, tensor))


def weight_only(bits: int = 8) -> DotGeneral:
    """The right side quantized and returned to float before contracting; the left in float."""
    return DotGeneral(fwd=raw(Tensor(), dataclasses.replace(int_tensor(bits), use_fake_quant=True)))


def update(config: DotGeneral, where: str, **changes: Any) -> DotGeneral:
    """`config` with `changes` to the fields of what `where` names.

    `where` is a contraction, "fwd", "dlhs" or "drhs", to change its `DotGeneralRaw`; or a
    contraction and a side, such as "fwd.rhs", to change its `Tensor`. "*" stands for each:
    `update(c, "fwd.*", calibration=AbsMaxCalibration(0.9))`.

    Raises:
      ValueError: `where` names nothing, or the result contradicts itself.
      TypeError: a change is to no field.
    """
    if not any(fnmatch.fnmatchcase(name, where) for name in (*_SIDES, "fwd", "dlhs", "drhs")):
        raise ValueError(
            f"{where!r} names no part of a configuration: give 'fwd', 'dlhs' or 'drhs', and after "
            f"a dot 'lhs' or 'rhs' for a side"
        )

    def updated(name: str, contraction: DotGeneralRaw) -> DotGeneralRaw:
        if "." not in where:
            return (
                dataclasses.replace(contraction, **changes)
                if fnmatch.fnmatchcase(name, where)
                else contraction
            )
        sides = {
            side: dataclasses.replace(getattr(contraction, side), **changes)
            for side in ("lhs", "rhs")
            if fnmatch.fnmatchcase(f"{name}.{side}", where)
        }
        return dataclasses.replace(contraction, **sides)

    return DotGeneral(
        fwd=updated("fwd", config.fwd),
        dlhs=updated("dlhs", config.dlhs),
        drhs=updated("drhs", config.drhs),
    )
