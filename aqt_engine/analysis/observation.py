"""What happens in each contraction of a linen model: operands, buckets, errors.

The model runs in CONVERT, where it computes what it does in TRAIN and says which side is a weight.
Each quantized contraction is watched as it is called; its sums leave the computation by a callback,
so that layers that are scanned, rematerialized or jitted are seen as well.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from aqt_engine.analysis.measurement import Sums, bits, error, measure, ratio_db
from aqt_engine.config import Tensor
from aqt_engine.convertible import ModelFactory
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.flax.overriding import LayerInterceptor, op_name
from aqt_engine.modes import QuantMode
from aqt_engine.numerics import NoNumerics
from aqt_engine.qtensor import QTensor, Scale

Variables = Mapping[str, Any]
Place = tuple[str, str]
"""The path of a layer, and the name of a contraction in it."""
Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One quantized side of a contraction.

    `shape` is that of one call; `bits` those of one value. `is_weight` says that it is stored,
    which takes `nbytes`, scales included.
    """

    shape: tuple[int, ...]
    bits: int
    is_weight: bool
    nbytes: int
    sums: Sums

    @property
    def values(self) -> int:
        """How many values there are."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contraction:
    """One contraction, over all calls and batches that were observed.

    `path` is that of the layer it belongs to, "encoder/Dense_0", and `op` names the contraction in
    it, as rules do. A side that stays in float is
    None. `sqnr_db` compares its output with the same contraction of the operands in float.
    `macs` are the multiplications of all its calls.
    """

    path: str
    op: str
    lhs: Operand | None
    rhs: Operand | None
    sqnr_db: float
    macs: int
    calls: int

    @property
    def place(self) -> Place:
        """What tells it from the others."""
        return self.path, self.op

    @property
    def operands(self) -> Mapping[str, Operand]:
        """The quantized sides by name."""
        sides = {"lhs": self.lhs, "rhs": self.rhs}
        return {side: operand for side, operand in sides.items() if operand is not None}


def observe(
    model: ModelFactory, variables: Variables, batches: Iterable[Arrays]
) -> tuple[Contraction, ...]:
    """The quantized contractions of a model on `batches`, in the order of their first call.

    Args:
      model: gives the linen module for a mode, as `aqt_engine.convert.convert` takes it.
      variables: what was trained, and calibrated where it is quantized statically.
      batches: inputs by the names of the module's arguments.

    Raises:
      ValueError: the model quantizes no contraction.
    """
    module = model(QuantMode.CONVERT)
    records: dict[tuple[str, str], _Record] = {}

    @jax.jit
    def run(variables: Variables, inputs: Arrays) -> Any:
        with nn.intercept_methods(_Watch(records)):
            return module.apply(variables, inputs, method=_call, mutable=True)[0]

    for batch in batches:
        jax.block_until_ready(run(variables, dict(batch)))
    jax.effects_barrier()
    if not records:
        raise ValueError(
            "the model quantizes no contraction: give its layers an AqtDotGeneral, or rules"
        )
    return tuple(record.contraction(*key) for key, record in records.items())


def _call(module: nn.Module, inputs: Arrays) -> Any:
    return module(**inputs)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """What tracing tells of a side; its sums come with each call."""

    shape: tuple[int, ...]
    bits: int
    is_weight: bool
    nbytes: int


@dataclasses.dataclass(slots=True, kw_only=True)
class _Record:
    """What is known of a contraction so far."""

    sides: Mapping[str, _Side]
    macs: int = 0
    calls: int = 0
    power: float = 0.0
    noise: float = 0.0
    sums: dict[str, Sums] = dataclasses.field(default_factory=dict[str, Sums])

    def add(self, macs: int, power: Any, noise: Any, sums: Mapping[str, Sums]) -> None:
        self.macs += macs
        self.calls += 1
        self.power += float(power)
        self.noise += float(noise)
        for side, found in sums.items():
            self.sums[side] = self.sums[side] + found if side in self.sums else found

    def contraction(self, path: str, op: str) -> Contraction:
        operands = {
            name: Operand(
                shape=side.shape,
                bits=side.bits,
                is_weight=side.is_weight,
                nbytes=side.nbytes,
                sums=self.sums[name],
            )
            for name, side in self.sides.items()
        }
        return Contraction(
            path=path,
            op=op,
            lhs=operands.get("lhs"),
            rhs=operands.get("rhs"),
            sqnr_db=ratio_db(self.power, self.noise),
            macs=self.macs,
            calls=self.calls,
        )


class _Watch(LayerInterceptor):
    """Records the quantized contractions of a run."""

    def __init__(self, records: dict[tuple[str, str], _Record]):
        super().__init__()
        self._records = records
        self._sides: dict[str, tuple[_Side, Sums]] = {}

    def contraction(
        self,
        module: AqtDotGeneral,
        method: str,
        next_method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Answers as the model does."""
        answer = next_method(*args, **kwargs)
        if method == "side":
            self._side(answer, *args, **kwargs)
        elif method == "__call__" and self._sides:
            self._contraction(module, answer, args, kwargs)
        return answer

    def _side(
        self,
        answer: tuple[jax.Array | QTensor, Scale | None],
        mode: QuantMode,
        name: str,
        operand: jax.Array,
        tensor: Tensor,
        axes: Any,
        quantize: Callable[[], QTensor],
    ) -> None:
        if isinstance(tensor.numerics, NoNumerics):
            return
        found, scale = answer
        if isinstance(found, QTensor):
            q = found
        elif scale is not None:
            q = tensor.quantizer(None).quant_with(scale, operand)[0]
        else:
            q = quantize()
        stored = mode is QuantMode.CONVERT and scale is None
        width = bits(tensor.numerics)
        side = _Side(
            shape=operand.shape,
            bits=width,
            is_weight=stored,
            nbytes=-(-operand.size * width // 8) + _nbytes(q.scale) + _nbytes(q.bias),
        )
        self._sides["lhs" if name.startswith("qlhs") else "rhs"] = (
            side,
            measure(operand, q, tensor),
        )

    def _contraction(
        self,
        module: AqtDotGeneral,
        answer: jax.Array,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        sides, self._sides = self._sides, {}
        path, op = self.place
        lax_op = op_name(module)
        in_float: Callable[..., jax.Array] = getattr(jax.lax, lax_op)
        exact = in_float(*args, **kwargs)
        record = self._records.setdefault(
            (path, op), _Record(sides={name: side for name, (side, _) in sides.items()})
        )
        bound = inspect.signature(in_float).bind(*args, **kwargs)
        bound.apply_defaults()
        power, noise = error(exact, answer)
        jax.debug.callback(
            functools.partial(record.add, answer.size * _summed(lax_op, bound.arguments)),
            power,
            noise,
            {name: sums for name, (_, sums) in sides.items()},
        )


def _summed(op: str, arguments: Mapping[str, Any]) -> int:
    """How many products each value of the output sums."""
    lhs, rhs, numbers = arguments["lhs"], arguments["rhs"], arguments["dimension_numbers"]
    if op == "dot_general":
        return math.prod(lhs.shape[a] for a in numbers[0][0])
    layout = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
    return rhs.size // rhs.shape[layout.rhs_spec[0]]


def _nbytes(array: jax.Array | None) -> int:
    return 0 if array is None else array.size * array.dtype.itemsize
