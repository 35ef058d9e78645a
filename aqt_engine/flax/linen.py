"""Quantized contractions as Flax linen modules.

A module's mode says what it does with each of its two sides. In TRAIN both are quantized on every
call. In CONVERT a side is also stored, quantized, in the collection `quant_collection`, as `qlhs`
or `qrhs`, and marked with the configuration that did it. In SERVE a side is read from there, if its
mark is of the same configuration, and the float operand only lends its shape. Set the mode of the
side that is the weight: the right one in `nn.Dense`, either one in an einsum.

A side whose calibration keeps statistics keeps them in `statistics_collection`. It learns them in
CALIBRATE, and in TRAIN where the calibration says so and the collection is mutable. In CONVERT it
stores its scale rather than its values, and in SERVE reads it: give such a side, an activation,
the mode too.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.core
from jax.typing import DTypeLike

from aqt_engine.config import DotGeneral, Tensor
from aqt_engine.context import Context
from aqt_engine.flax import marks
from aqt_engine.modes import QuantMode
from aqt_engine.ops import tiled
from aqt_engine.ops.axes import Axes, DimensionNumbers, DotAxes
from aqt_engine.ops.dot_general import quantize_lhs, quantize_rhs
from aqt_engine.ops.einsum import contract, plan
from aqt_engine.ops.operand import Operand
from aqt_engine.ops.tiled import tiled_dot_general
from aqt_engine.ops.tiling import Tiling
from aqt_engine.provenance import Quantized
from aqt_engine.qtensor import QTensor, Scale
from aqt_engine.quantizer import shared_axes
from aqt_engine.static import StaticSide
from aqt_engine.statistics import Statistics, StatisticsCalibration


class AqtDotGeneral(nn.Module):
    """A quantized drop-in for `jax.lax.dot_general`: `nn.Dense(8, dot_general=AqtDotGeneral(c))`.

    `config` None contracts in float. Noise is drawn with the key stream `prng_name`, if the caller
    gives one. One instance may serve several layers: each call stores under a name of its own.
    With `tiling` it contracts as `aqt_engine.ops.tiled_dot_general`, and stores tiles.
    """

    config: DotGeneral | None = None
    lhs_quant_mode: QuantMode = QuantMode.TRAIN
    rhs_quant_mode: QuantMode = QuantMode.TRAIN
    prng_name: str | None = "params"
    quant_collection: str = "aqt"
    statistics_collection: str = "aqt_statistics"
    lhs_var_name: str = "qlhs"
    rhs_var_name: str = "qrhs"
    tiling: Tiling | None = None

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
            another shape or was converted by another configuration.
        """
        config = self.configuration()
        if config is None:
            return jax.lax.dot_general(
                lhs,
                rhs,
                dimension_numbers,
                precision=precision,
                preferred_element_type=preferred_element_type,
            )
        call = self.calls.next()
        axes = DotAxes.parse(dimension_numbers, lhs.ndim, rhs.ndim)
        left, left_scale = self.side(
            self.lhs_quant_mode,
            numbered(self.lhs_var_name, call),
            lhs,
            config.fwd.lhs,
            (axes.lhs_contracting, axes.lhs_batch),
            functools.partial(self._quantize_lhs, config, lhs, rhs, dimension_numbers),
        )
        right, right_scale = self.side(
            self.rhs_quant_mode,
            numbered(self.rhs_var_name, call),
            rhs,
            config.fwd.rhs,
            (axes.rhs_contracting, axes.rhs_batch),
            functools.partial(self._quantize_rhs, config, lhs, rhs, dimension_numbers),
        )
        contraction: Callable[..., jax.Array] = config
        if self.tiling is not None:
            contraction = functools.partial(tiled_dot_general, config=config, tiling=self.tiling)
        return contraction(
            left,
            right,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            context=Context(key=self.key()),
            lhs_scale=left_scale,
            rhs_scale=right_scale,
        )

    def _quantize_lhs(
        self, config: DotGeneral, lhs: jax.Array, rhs: jax.Array, numbers: DimensionNumbers
    ) -> QTensor:
        if self.tiling is None:
            return quantize_lhs(lhs, rhs.ndim, numbers, config=config)
        return tiled.quantize_lhs(lhs, rhs, numbers, config=config, tiling=self.tiling)

    def _quantize_rhs(
        self, config: DotGeneral, lhs: jax.Array, rhs: jax.Array, numbers: DimensionNumbers
    ) -> QTensor:
        if self.tiling is None:
            return quantize_rhs(rhs, lhs.ndim, numbers, config=config)
        return tiled.quantize_rhs(rhs, lhs, numbers, config=config, tiling=self.tiling)

    def configuration(self) -> DotGeneral | None:
        """`config`. An interceptor of linen methods may give another, as rules and searches do."""
        return self.config

    def key(self) -> jax.Array | None:
        """A fresh key of the stream `prng_name`, if the caller gave one."""
        name = self.prng_name
        return self.make_rng(name) if name is not None and self.has_rng(name) else None

    def side(
        self,
        mode: QuantMode,
        name: str,
        operand: jax.Array,
        tensor: Tensor,
        axes: tuple[Axes, Axes],
        quantize: Callable[[], QTensor],
    ) -> tuple[Operand, Scale | None]:
        """The operand, quantized already where it is stored so, and the scale if that is static."""
        if isinstance(tensor.calibration, StatisticsCalibration) and tensor.is_quantized:
            return operand, self._static_scale(mode, name, operand, tensor, axes)
        if mode in (QuantMode.TRAIN, QuantMode.CALIBRATE):
            return operand, None
        if mode is QuantMode.CONVERT:
            stored = quantize()
            self.store(name, stored)
            return stored, None
        stored = self._stored(name, quantize)
        expected = jax.eval_shape(quantize)
        if stored.shape != expected.shape:
            raise ValueError(
                f"{'/'.join((*self.path, name))} was stored with shape {stored.shape} and is used "
                f"where the model has {expected.shape}: convert again with this model"
            )
        if _described(stored) != _described(expected):
            raise ValueError(
                f"{'/'.join((*self.path, name))} was stored as {_described(stored)}, and the "
                f"model's configuration gives {_described(expected)}: serve with the one that it "
                f"was converted with"
            )
        return stored, None

    def _static_scale(
        self,
        mode: QuantMode,
        name: str,
        operand: jax.Array,
        tensor: Tensor,
        axes: tuple[Axes, Axes],
    ) -> Scale:
        assert isinstance(tensor.calibration, StatisticsCalibration)
        calibration = tensor.calibration
        config = self.configuration()
        if self.tiling is not None or (config is not None and config.fwd.local_aqt is not None):
            raise ValueError(
                f"{'/'.join(self.path)} has tiles (`local_aqt` or a tiling) and "
                f"{type(calibration).__name__}, which keeps no statistics by tile: use one of them"
            )
        calibration_axes = tensor.shared_by(operand.ndim, *axes)
        shared = shared_axes(tensor.calib_shared_axes, calibration_axes, operand.ndim)
        static = StaticSide(tensor, calibration, shared)

        def empty() -> Statistics:
            return calibration.empty(operand, shared)

        if mode is QuantMode.SERVE:
            return self._stored(name, lambda: static.current(empty(), operand))
        collection = self.statistics_collection
        if not self.is_initializing() and not (
            self.has_variable(collection, name) or self.is_mutable_collection(collection)
        ):
            raise ValueError(
                f"{'/'.join(self.path)} has {type(calibration).__name__} and the collection "
                f"{collection!r} holds no {name!r} for it: initialize the model with it, or pass "
                f"the collection as mutable"
            )
        statistics = self.variable(collection, name, empty)
        learns = mode is QuantMode.CALIBRATE or (
            mode is QuantMode.TRAIN and calibration.learns_in_training
        )
        before = statistics.value
        if learns and self.is_mutable_collection(collection) and not self.is_initializing():
            statistics.value = calibration.update(before, operand, shared)
        # A delayed scale is that of the calls before; in CALIBRATE there is no reason to wait.
        used = statistics.value if mode is QuantMode.CALIBRATE else before
        scale = static.current(used, operand)
        if mode is QuantMode.CONVERT:
            count = before["count"]
            if not isinstance(count, jax.core.Tracer) and int(count) == 0:
                raise ValueError(
                    f"{'/'.join((*self.path, name))} was never calibrated: run the model on "
                    f"typical data in QuantMode.CALIBRATE before it is converted"
                )
            self.store(name, scale)
        return scale

    def store(self, name: str, value: QTensor | Scale) -> None:
        """Keeps what CONVERT made. An interceptor of linen methods sees what is stored by it."""
        if not self.is_mutable_collection(self.quant_collection):
            raise ValueError(
                f"{'/'.join(self.path)} is in QuantMode.CONVERT and cannot store {name!r}: apply "
                f"the model with `mutable=[{self.quant_collection!r}]`, and name the collection in "
                f"the `variable_axes` of an nn.scan or nn.vmap around the layer"
            )
        self.variable(self.quant_collection, name, lambda: value).value = value
        marks.mark(self, self.quant_collection, name, self._configured())

    def stored_by(self, name: str) -> tuple[str, Quantized]:
        """The path of what is stored under `name`, and how it was quantized."""
        config = self.configuration()
        assert config is not None
        left = name == self.lhs_var_name or name.startswith(f"{self.lhs_var_name}_")
        path = "/".join((self.quant_collection, *self.path, name))
        return path, Quantized("lhs" if left else "rhs", config)

    def _stored(self, name: str, otherwise: Callable[[], Any]) -> Any:
        """What CONVERT stored under `name`; while initializing, a fresh one of `otherwise`."""
        if not self.is_initializing() and not self.has_variable(self.quant_collection, name):
            raise ValueError(
                f"{'/'.join(self.path)} is in QuantMode.SERVE and the collection "
                f"{self.quant_collection!r} holds no {name!r} for it: run the model once in "
                f"QuantMode.CONVERT and serve with the variables that gives"
            )
        if self.is_initializing():
            marks.mark(self, self.quant_collection, name, self._configured())
        else:
            marks.check(self, self.quant_collection, name, self._configured())
        return self.variable(self.quant_collection, name, otherwise).value

    def _configured(self) -> DotGeneral:
        config = self.configuration()
        assert config is not None
        return config


def _described(q: Any) -> str:
    parts = {"values": q.qvalue, "scale": q.scale, "bias": q.bias}
    return ", ".join(
        f"{name} {x.dtype}{list(x.shape)}" for name, x in parts.items() if x is not None
    )


class _Calls:
    """How often a module was called in one run of the model."""

    def __init__(self):
        self._count = 0

    def next(self) -> int:
        self._count += 1
        return self._count - 1


def numbered(name: str, call: int) -> str:
    """The name under which the `call`-th call of a module stores."""
    return name if call == 0 else f"{name}_{call}"


class AqtEinsum(nn.Module):
    """A quantized `jax.numpy.einsum` of two operands: `AqtEinsum(config)("ab,bc->ac", x, w)`.

    The modes and names of the two sides are those of the equation's operands, in its order. With
    `tile_sizes`, by letters, it contracts as `aqt_engine.ops.tiled_einsum`, and stores tiles.
    """

    config: DotGeneral | None = None
    lhs_quant_mode: QuantMode = QuantMode.TRAIN
    rhs_quant_mode: QuantMode = QuantMode.TRAIN
    prng_name: str | None = "params"
    quant_collection: str = "aqt"
    statistics_collection: str = "aqt_statistics"
    tile_sizes: Mapping[str, int] | None = None

    @nn.compact
    def __call__(
        self,
        equation: str,
        lhs: jax.Array,
        rhs: jax.Array,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array:
        """The einsum, as `aqt_engine.ops.einsum` defines it."""
        p = plan(equation, lhs.ndim, rhs.ndim)
        modes = (self.lhs_quant_mode, self.rhs_quant_mode)
        names = ("qlhs", "qrhs")
        config = self.config
        tiling = None
        if self.tile_sizes is not None:
            tiling = Tiling.of_letters(p.lhs_kept, p.rhs_kept, self.tile_sizes)
        if p.swap:
            modes, names = modes[::-1], names[::-1]
            tiling = None if tiling is None else tiling.swapped()
            config = None if config is None else config.swapped()
        dot_general = AqtDotGeneral(
            config,
            lhs_quant_mode=modes[0],
            rhs_quant_mode=modes[1],
            prng_name=self.prng_name,
            quant_collection=self.quant_collection,
            statistics_collection=self.statistics_collection,
            lhs_var_name=names[0],
            rhs_var_name=names[1],
            tiling=tiling,
        )
        contraction = functools.partial(
            dot_general, precision=precision, preferred_element_type=preferred_element_type
        )
        return contract(p, lhs, rhs, contraction)
