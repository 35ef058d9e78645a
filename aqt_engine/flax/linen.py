"""Quantized contractions as Flax linen modules.

A module's mode says what it does with each of its two sides. In TRAIN both are quantized on every
call. In CONVERT a side is also stored, quantized, in the collection `quant_collection`, as `qlhs`
or `qrhs`. In SERVE a side is read from there, and the float operand only lends its shape. Set the
mode of the side that is the weight: the right one in `nn.Dense`, either one in an einsum.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from aqt_engine.config import DotGeneral
from aqt_engine.context import Context
from aqt_engine.modes import QuantMode
from aqt_engine.ops.axes import DimensionNumbers
from aqt_engine.ops.dot_general import Operand, quantize_lhs, quantize_rhs
from aqt_engine.ops.einsum import contract, plan
from aqt_engine.qtensor import QTensor


class AqtDotGeneral(nn.Module):
    """A quantized drop-in for `jax.lax.dot_general`: `nn.Dense(8, dot_general=AqtDotGeneral(c))`.

    `config` None contracts in float. Noise is drawn with the key stream `prng_name`, if the caller
    gives one. One instance may serve several layers: each call stores under a name of its own.
    """

    config: DotGeneral | None = None
    lhs_quant_mode: QuantMode = QuantMode.TRAIN
    rhs_quant_mode: QuantMode = QuantMode.TRAIN
    prng_name: str | None = "params"
    quant_collection: str = "aqt"
    lhs_var_name: str = "qlhs"
    rhs_var_name: str = "qrhs"

    def setup(self):
        """Starts the count of calls; Flax does this once for each run of the model."""
        self.calls = _Calls()

    @nn.compact
    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array:
        """The contraction of `lhs` and `rhs`, as `aqt_engine.ops.dot_general` defines it.

        Raises:
          ValueError: a side is in SERVE and nothing was stored for it, or what was stored has
            another shape.
        """
        if self.config is None:
            return jax.lax.dot_general(
                lhs,
                rhs,
                dimension_numbers,
                precision=precision,
                preferred_element_type=preferred_element_type,
            )
        name = self.prng_name
        key = self.make_rng(name) if name is not None and self.has_rng(name) else None
        call = self.calls.next()
        quantize = functools.partial(quantize_lhs, lhs, rhs.ndim, dimension_numbers)
        left = self._side(self.lhs_quant_mode, _numbered(self.lhs_var_name, call), lhs, quantize)
        quantize = functools.partial(quantize_rhs, rhs, lhs.ndim, dimension_numbers)
        right = self._side(self.rhs_quant_mode, _numbered(self.rhs_var_name, call), rhs, quantize)
        return self.config(
            left,
            right,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            context=Context(key=key),
        )

    def _side(
        self, mode: QuantMode, name: str, operand: jax.Array, quantize: Callable[..., QTensor]
    ) -> Operand:
        if mode in (QuantMode.TRAIN, QuantMode.CALIBRATE):
            return operand
        if mode is QuantMode.CONVERT:
            stored = quantize(config=self.config)
            self.variable(self.quant_collection, name, lambda: stored).value = stored
            return stored
        if not self.is_initializing() and not self.has_variable(self.quant_collection, name):
            raise ValueError(
                f"{'/'.join(self.path)} is in QuantMode.SERVE and the collection "
                f"{self.quant_collection!r} holds no {name!r} for it: run the model once in "
                f"QuantMode.CONVERT and serve with the variables that gives"
            )
        stored = self.variable(self.quant_collection, name, lambda: quantize(config=self.config))
        return _checked(stored.value, operand, "/".join((*self.path, name)))


class _Calls:
    """How often a module was called in one run of the model."""

    def __init__(self):
        self._count = 0

    def next(self) -> int:
        self._count += 1
        return self._count - 1


def _numbered(name: str, call: int) -> str:
    return name if call == 0 else f"{name}_{call}"


class AqtEinsum(nn.Module):
    """A quantized `jax.numpy.einsum` of two operands: `AqtEinsum(config)("ab,bc->ac", x, w)`.

    The modes and names of the two sides are those of the equation's operands, in its order.
    """

    config: DotGeneral | None = None
    lhs_quant_mode: QuantMode = QuantMode.TRAIN
    rhs_quant_mode: QuantMode = QuantMode.TRAIN
    prng_name: str | None = "params"
    quant_collection: str = "aqt"

    @nn.compact
    def __call__(self, equation: str, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The einsum, as `aqt_engine.ops.einsum` defines it."""
        p = plan(equation, lhs.ndim, rhs.ndim)
        modes = (self.lhs_quant_mode, self.rhs_quant_mode)
        names = ("qlhs", "qrhs")
        config = self.config
        if p.swap:
            modes, names = modes[::-1], names[::-1]
            config = None if config is None else config.swapped()
        dot_general = AqtDotGeneral(
            config,
            lhs_quant_mode=modes[0],
            rhs_quant_mode=modes[1],
            prng_name=self.prng_name,
            quant_collection=self.quant_collection,
            lhs_var_name=names[0],
            rhs_var_name=names[1],
        )
        return contract(p, lhs, rhs, dot_general)


def _checked(stored: QTensor, operand: jax.Array, path: str) -> QTensor:
    if stored.shape != operand.shape:
        raise ValueError(
            f"{path} was stored with shape {stored.shape} and is used where the model has "
            f"{operand.shape}: convert again with this model"
        )
    return stored
