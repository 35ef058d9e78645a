"""Quantized contractions in tiles: sub-channel quantization, on any axes and either side.

Each tile of a contracted axis has scales of its own, and is contracted to a result of its own; the
results are summed in float. Each tile of a remaining axis is a contraction of its own, which
matters backward, where that axis is summed.
"""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
from jax import lax
from jax.typing import DTypeLike

from aqt_engine.context import Context
from aqt_engine.ops.axes import DimensionNumbers
from aqt_engine.ops.dot_general import dot_general
from aqt_engine.ops.einsum import contract, plan
from aqt_engine.ops.operand import Operand, quantize_forward
from aqt_engine.ops.tiling import TiledContraction, Tiling
from aqt_engine.qtensor import QTensor, Scale

if TYPE_CHECKING:
    from aqt_engine.config import DotGeneral


def tiled_dot_general(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    config: "DotGeneral",
    tiling: Tiling,
    context: Context = Context(),
    lhs_scale: Scale | None = None,
    rhs_scale: Scale | None = None,
) -> jax.Array:
    """`aqt_engine.ops.dot_general` in the tiles of `tiling`, with the same result's shape.

    `dimension_numbers` are those of the operands when they are whole. A `QTensor`, or a given
    scale, has the tiles of each tiled axis in an axis before it, and so has an operand whose
    `calib_shared_axes` are given: count those from the end. The results of the tiles are summed in
    the dtype of the result.

    Bits: as in `dot_general`, but for the sum over tiles: that is one of floats, and its last bit
    may depend on what is compiled with it.

    Raises:
      TypeError: an operand is not float.
      ValueError: the tiling does not fit the operands; and all that `dot_general` raises.
    """
    tiled = _tiled(config, tiling, lhs, rhs, dimension_numbers)
    out = dot_general(
        tiled.lhs_operand(lhs),
        tiled.rhs_operand(rhs),
        tiled.dimension_numbers,
        precision,
        preferred_element_type,
        config=config,
        context=context,
        lhs_scale=None if lhs_scale is None else tiled.lhs_operand(lhs_scale),
        rhs_scale=None if rhs_scale is None else tiled.rhs_operand(rhs_scale),
        tiled=True,
    )
    return tiled.whole(out)


def tiled_einsum(
    equation: str,
    lhs: Operand,
    rhs: Operand,
    *,
    tile_sizes: Mapping[str, int],
    config: "DotGeneral",
    context: Context = Context(),
) -> jax.Array:
    """`aqt_engine.ops.einsum` in tiles of `tile_sizes[letter]` values of a letter's axis.

    Raises:
      ValueError: a letter is not in the equation; and all that `einsum` and `tiled_dot_general`
        raise.
    """
    operands = equation.split("->")[0].split(",")
    ranks = [
        x.ndim - (isinstance(x, QTensor) and sum(letter in labels for letter in tile_sizes))
        for x, labels in zip((lhs, rhs), operands, strict=False)
    ]
    p = plan(equation, *ranks) if len(ranks) == 2 else plan(equation, lhs.ndim, rhs.ndim)
    tiling = Tiling.of_letters(p.lhs_kept, p.rhs_kept, tile_sizes)
    contraction = functools.partial(
        tiled_dot_general,
        config=config.swapped() if p.swap else config,
        tiling=tiling.swapped() if p.swap else tiling,
        context=context,
    )
    return contract(p, lhs, rhs, contraction)


def quantize_lhs(
    x: jax.Array,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    *,
    config: "DotGeneral",
    tiling: Tiling,
) -> QTensor:
    """`x` in tiles, as the forward pass quantizes its left side: what is stored."""
    tiled = _tiled(config, tiling, x, rhs, dimension_numbers)
    kinds = tiled.lhs.kinds(tiled.axes.lhs_contracting, tiled.axes.lhs_batch)
    return quantize_forward(config.fwd.lhs, tiled.lhs.split(x), *kinds, None)[0]


def quantize_rhs(
    x: jax.Array,
    lhs: Operand,
    dimension_numbers: DimensionNumbers,
    *,
    config: "DotGeneral",
    tiling: Tiling,
) -> QTensor:
    """`x` in tiles, as the forward pass quantizes its right side: what is stored."""
    tiled = _tiled(config, tiling, lhs, x, dimension_numbers)
    kinds = tiled.rhs.kinds(tiled.axes.rhs_contracting, tiled.axes.rhs_batch)
    return quantize_forward(config.fwd.rhs, tiled.rhs.split(x), *kinds, None)[0]


def _tiled(
    config: "DotGeneral",
    tiling: Tiling,
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
) -> TiledContraction:
    if config.fwd.local_aqt is not None:
        raise ValueError(
            "a tiling and `fwd.local_aqt` both split the forward contraction: use one of them"
        )
    return TiledContraction.of(tiling, lhs, rhs, dimension_numbers)
