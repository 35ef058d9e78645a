"""What the quantized ops have in common about their operands."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from aqt_engine.calibration import AbsMaxCalibration, ConstantCalibration
from aqt_engine.materialization import materialized, materialized_on_cpu
from aqt_engine.numerics import IntNumerics
from aqt_engine.ops.axes import Axes
from aqt_engine.qtensor import QTensor, Scale
from aqt_engine.quantizer import Gradient, shared_axes

if TYPE_CHECKING:
    from aqt_engine.config import Tensor

Operand = jax.Array | QTensor
Key = jax.Array | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "lhs_scale", "rhs_scale"],
    meta_fields=["tiled"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """What an op is given beside its operands, and no gradient flows into.

    `tiled` says that its result is to be summed over tiles.
    """

    key: Key
    lhs_scale: Scale | None
    rhs_scale: Scale | None
    tiled: bool = False


def require_float(lhs: Operand, rhs: Operand) -> None:
    """Refuses operands that are not float.

    Raises:
      TypeError: one is not.
    """
    for side, operand in (("lhs", lhs), ("rhs", rhs)):
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            raise TypeError(
                f"`{side}` has dtype {operand.dtype}, and only floating-point tensors are "
                f"quantized: cast it, or use the op of `jax.lax` for it"
            )


def require_no_out_sharding(out_sharding: None) -> None:
    """Refuses an `out_sharding`, which layers pass on whether they were given one or not.

    Raises:
      ValueError: it is not None.
    """
    if out_sharding is not None:
        raise ValueError(
            f"a quantized op has no `out_sharding`, got {out_sharding}: apply "
            f"`jax.lax.with_sharding_constraint` to what it returns"
        )


def require_shared(side: str, scale: jax.Array, contracting: Axes) -> None:
    """Refuses a scale that varies along contracted axes.

    Raises:
      ValueError: it does.
    """
    if any(scale.shape[a] != 1 for a in contracting):
        raise ValueError(
            f"the scale of `{side}`, of shape {scale.shape}, varies along contracted axes "
            f"{contracting}: add them to `calib_shared_axes`, or set `use_fake_quant`"
        )


def require_taken_out(side: str, q: QTensor, contracting: Axes) -> None:
    """Refuses an operand whose scale or bias varies along contracted axes.

    Raises:
      ValueError: one does.
    """
    for part in (q.scale, q.bias):
        if part is not None:
            require_shared(side, part, contracting)


def quantize(
    tensor: "Tensor",
    x: jax.Array,
    contracting: Axes,
    batch: Axes,
    key: Key,
    scale: Scale | None = None,
) -> tuple[QTensor, Gradient]:
    """`x` quantized, with `scale` if it is given, and its gradient."""
    quantizer = tensor.quantizer(key)
    if scale is not None and tensor.is_quantized:
        return quantizer.quant_with(jax.tree.map(lax.stop_gradient, scale), x)
    return quantizer.quant(x, calibration_axes=tensor.shared_by(x.ndim, contracting, batch))


def quantize_forward(
    tensor: "Tensor",
    x: jax.Array,
    contracting: Axes,
    batch: Axes,
    key: Key,
    scale: Scale | None = None,
) -> tuple[QTensor, Gradient]:
    """As `quantize`, and all that uses the scale is compiled as behind a scale that is stored.

    For what is served, and so not for a backward pass. A constant is one wherever it stands.
    """
    quantizer = tensor.quantizer(key)
    if not tensor.is_quantized or isinstance(tensor.calibration, ConstantCalibration):
        return quantize(tensor, x, contracting, batch, key, scale)
    if scale is None:
        shared = tensor.shared_by(x.ndim, contracting, batch)
        found = quantizer.calibrate(jnp.asarray(x), calibration_axes=shared)
    else:
        found: Scale = jax.tree.map(lax.stop_gradient, scale)
    # Before its inverse is taken, too: one thing after the other, which XLA:CPU then computes in
    # one thread, and does not wake another for.
    return quantizer.quant_with(dataclasses.replace(found, scale=materialized(found.scale)), x)


def quantize_apart(
    tensor: "Tensor",
    x: jax.Array,
    contracting: Axes,
    batch: Axes,
    key: Key,
    scale: Scale | None = None,
) -> tuple[QTensor, Gradient]:
    """As `quantize_forward`, and on CPU compiled apart from `x` where a kernel could do it all.

    What computes `x` then does not depend on whether one does.
    """
    if scale is None and _is_in_one_pass(tensor, x, contracting, batch):
        x = materialized_on_cpu(x)
    return quantize_forward(tensor, x, contracting, batch, key, scale)


def _is_in_one_pass(tensor: "Tensor", x: jax.Array, contracting: Axes, batch: Axes) -> bool:
    """Whether rows of `x` become int8 by their largest magnitudes, and nothing else is done."""
    numerics = tensor.numerics
    if not isinstance(numerics, IntNumerics) or type(tensor.calibration) is not AbsMaxCalibration:
        return False
    if numerics.dtype != jnp.int8 or numerics.noise_fn is not None or tensor.po2_scale:
        return False
    if x.dtype != jnp.float32 or tensor.scale_dtype not in (None, jnp.dtype(jnp.float32)):
        return False
    shared = shared_axes(
        tensor.calib_shared_axes, tensor.shared_by(x.ndim, contracting, batch), x.ndim
    )
    return bool(shared) and shared == tuple(range(x.ndim - len(shared), x.ndim)) and x.size > 0


def as_forward_quantized(
    g: jax.Array,
    other: Operand,
    contracting: Axes,
    to_output: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The gradient times the other operand's scale, and that operand's integers in float.

    An operand that is no `QTensor` is taken as it is.

    Raises:
      ValueError: the operand has a bias, or a scale that varies along `contracting`.
    """
    if not isinstance(other, QTensor):
        return g, other
    if other.scale is None:
        return g, other.qvalue
    if other.bias is not None:
        raise ValueError(
            "`use_fwd_quant` takes the forward's integers without their bias, and this side is "
            "calibrated with one: set `use_fwd_quant=False`, or calibrate symmetrically"
        )
    require_shared("the forward's operand", other.scale, contracting)
    scaled = g * to_output(other.scale).astype(g.dtype)
    return scaled, other.qvalue.astype(other.dequant_dtype)


def refuse_gradient(*_: Any) -> Any:
    """The gradient of an op with a stored operand: none.

    Raises:
      TypeError: always. Plain differentiation would go through the rounding and give zeros.
    """
    raise TypeError(
        "an op with a stored QTensor has no gradient: differentiate the model in QuantMode.TRAIN"
    )
