"""The contractions of a jaxpr: where each stands, what it is called, and ours in its place."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.extend.core import primitives as p

from aqt_engine.config import DotGeneral
from aqt_engine.context import Context
from aqt_engine.functions import jaxprs
from aqt_engine.functions.jaxprs import Path
from aqt_engine.ops import conv_general_dilated, dot_general, ragged_dot
from aqt_engine.ops.axes import Axes, DotAxes
from aqt_engine.ops.windows import ConvAxes
from aqt_engine.qtensor import MARKS, Scale
from aqt_engine.rules import Contraction, operand

_Sides = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]
_CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """A contraction. `turns` are the lengths of the scans around it, from the outermost.

    `inside` names a primitive around it in which no statistics can be kept.
    """

    contraction: Contraction
    eqn: JaxprEqn
    turns: tuple[int, ...]
    inside: str | None

    @property
    def sides(self) -> _Sides:
        """The contracting and the batch axes of its two operands."""
        lhs, rhs = self.contraction.lhs.shape, self.contraction.rhs.shape
        params = self.eqn.params
        if self.contraction.op == "dot_general":
            axes = DotAxes.parse(params["dimension_numbers"], len(lhs), len(rhs))
            return (
                (axes.lhs_contracting, axes.lhs_batch),
                (axes.rhs_contracting, axes.rhs_batch),
            )
        if self.contraction.op == "ragged_dot":
            return ((1,), ()), ((1,), (0,))
        axes = ConvAxes.parse(lhs, rhs, *(params[name] for name in _CONV_PARAMETERS))
        return (axes.lhs_contracting, ()), (axes.rhs_contracting, ())

    def quantized(
        self,
        config: DotGeneral,
        args: Sequence[Any],
        context: Context,
        scales: Mapping[str, Scale],
    ) -> jax.Array:
        """The contraction of its operands, by our op; `scales` are `lhs_scale` and `rhs_scale`."""
        params, (lhs, rhs, *more) = self.eqn.params, args
        common: dict[str, Any] = {
            "precision": params["precision"],
            "preferred_element_type": _aval(self.eqn.outvars[0]).dtype,
            "config": config,
            "context": context,
            **scales,
        }
        if self.contraction.op == "dot_general":
            return dot_general(lhs, rhs, params["dimension_numbers"], **common)
        if self.contraction.op == "ragged_dot":
            return ragged_dot(lhs, rhs, *more, **common)
        convolution = {name: params[name] for name in _CONV_PARAMETERS}
        return conv_general_dilated(lhs, rhs, **convolution, **common)


_CONV_PARAMETERS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
)


def find(jaxpr: ClosedJaxpr) -> dict[Path, Site]:
    """The float contractions of `jaxpr` and of all within it, by path, in their order.

    One is called after the `jax.named_scope`s that it stands in, and its number among those that
    stand there: "encoder/mlp/0". Those that are ours already are left out.
    """
    sites: dict[Path, Site] = {}
    counts: Counter[str] = Counter()

    def visit(
        jaxpr: core.Jaxpr,
        path: Path,
        scope: str,
        turns: tuple[int, ...] = (),
        inside: str | None = None,
        hint: str | None = None,
    ) -> None:
        for index, eqn in enumerate(jaxpr.eqns):
            at, here = (*path, index), _joined(scope, str(eqn.source_info.name_stack))
            if eqn.primitive.name in _CONTRACTIONS:
                if all(jnp.issubdtype(_aval(v).dtype, jnp.floating) for v in eqn.invars[:2]):
                    name = _joined(here, str(counts[here]))
                    counts[here] += 1
                    contraction = _contraction(eqn, name, hint)
                    sites[at] = Site(contraction, eqn, turns, inside)
            elif eqn.primitive is p.scan_p:
                length = eqn.params["length"]
                visit(eqn.params["jaxpr"].jaxpr, at, here, (*turns, length), inside, hint)
            elif eqn.primitive is p.while_p:
                visit(eqn.params["body_jaxpr"].jaxpr, (*at, 0), here, turns, "while_loop", hint)
                visit(eqn.params["cond_jaxpr"].jaxpr, (*at, 1), here, turns, "while_loop", hint)
            elif eqn.primitive is p.cond_p:
                for i, branch in enumerate(eqn.params["branches"]):
                    visit(branch.jaxpr, (*at, i), here, turns, inside, hint)
            elif not is_ours(eqn):
                hinted = hint or _hint(eqn)
                within = "shard_map" if eqn.primitive.name == "shard_map" else inside
                for inner in core.jaxprs_in_params(eqn.params):
                    visit(inner, at, here, turns, within, hinted)

    visit(jaxpr.jaxpr, (), "")
    return sites


def is_ours(eqn: JaxprEqn) -> bool:
    """Whether an equation is an op of this library: one with a gradient of its own, and marks."""
    if eqn.primitive is not p.custom_vjp_call_p:
        return False
    inner = jaxprs.equations(eqn.params["call_jaxpr"].jaxpr)
    return any(e.primitive is p.name_p and e.params["name"] in MARKS for e in inner)


def _contraction(eqn: JaxprEqn, name: str, hint: str | None) -> Contraction:
    op = eqn.primitive.name
    if op == "ragged_dot_general":
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        plain = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
        if eqn.params["group_offset"] is None and _lists(numbers) == _lists(plain):
            op = "ragged_dot"
        else:
            hint = hint or "of ragged contractions only `jax.lax.ragged_dot` has a quantized one"
    lhs, rhs = (operand(_aval(v)) for v in eqn.invars[:2])
    return Contraction(path=name, op=op, lhs=lhs, rhs=rhs, hint=hint)


def _aval(atom: Any) -> Any:
    return atom.aval


def _lists(numbers: Any) -> tuple[Any, ...]:
    (contracting, batch) = numbers.dot_dimension_numbers
    return (
        *(tuple(axes) for axes in (*contracting, *batch)),
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    )


def _hint(eqn: JaxprEqn) -> str | None:
    """What to do about a contraction inside `eqn`; None if it is reached there."""
    if eqn.primitive in (p.custom_jvp_call_p, p.custom_vjp_call_p):
        return (
            "it is inside a function with a derivative of its own, which would not be that of the "
            "quantized one: contract there with `aqt_engine.dot_general`"
        )
    if jaxprs.called(eqn) is not None or eqn.primitive.name == "shard_map":
        return None
    return f"it is inside `{eqn.primitive.name}`: contract with `aqt_engine.dot_general` there"


def _joined(*scopes: str) -> str:
    """Scopes as one path, without what JAX adds: names of transformations, einsum equations."""
    path = "/".join(scopes)
    while (inner := re.sub(r"[\w.<>-]+\(([^()]*)\)", r"\1", path)) != path:
        path = inner
    return "/".join(scope for scope in path.split("/") if scope and "->" not in scope)
