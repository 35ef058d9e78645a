"""Where serving leaves training: both forwards, computed side by side, one operation at a time.

They share their contractions: each is known by its module and its number there. The first of them
whose operands or result differ is where a difference comes from, or right after it. Operations are
computed alone, so that what the compiler makes of several together is not seen here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from aqt_engine import graphs, witness
from aqt_engine.bundle import Bundle
from aqt_engine.convertible import Convertible
from aqt_engine.functions import jaxprs
from aqt_engine.rows import Op
from aqt_engine.rows.states import op_of
from aqt_engine.witness import Verdict

# Loops are compared whole: what they contract is within.
_COMPARED = frozenset(
    ("dot_general", "conv_general_dilated", "ragged_dot_general", "scan", "while", "cond")
)
_Key = tuple[str, str, int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first operation of which `part` is another in serving than in training, and how."""

    op: Op
    part: str
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.part} of {self.op} is the first that differs; it is {self.verdict}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Computed:
    op: Op
    parts: Mapping[str, np.ndarray[Any, Any]]


def first_divergence(model: Convertible, variables: Any, loaded: Bundle) -> Divergence | None:
    """Where serving `loaded` leaves the training forward of `variables`, on its witness's rows.

    None if no operation that the two share differs, each computed alone.
    """
    tile = loaded.manifest.tile
    stored = dict(zip((w.name for w in loaded.manifest.weights), loaded.weights, strict=True))
    for w in loaded.witnesses.values():
        inputs = {name: jnp.asarray(array[:tile]) for name, array in w.inputs.items()}
        serving = model.serving(variables, inputs)
        # What the bundle has, and of the rest, which is not read, the shapes.
        values = [jnp.asarray(stored.get(leaf.name, leaf.value)) for leaf in serving.leaves]
        trained = _computed(graphs.named(model.train), variables, inputs)
        served = _computed(graphs.named(serving.forward), values, inputs)
        for key, of_training in trained.items():
            found = _compared(of_training, served.get(key))
            if found is not None:
                return found
    return None


def _compared(trained: _Computed, served: _Computed | None) -> Divergence | None:
    for part, expected in trained.parts.items():
        found = served.parts.get(part) if served else None
        # Else the two are quantized by other means, and only their results can be compared.
        if found is None or (found.shape, found.dtype) != (expected.shape, expected.dtype):
            continue
        verdict = witness.compare({part: found[None]}, {part: expected[None]})
        if not verdict.exact:
            return Divergence(op=trained.op, part=part, verdict=verdict)
    return None


def _computed(
    forward: Callable[[Any, Mapping[str, Any]], Mapping[str, jax.Array]],
    variables: Any,
    inputs: Mapping[str, jax.Array],
) -> dict[_Key, _Computed]:
    """What each operation that is compared was given and has answered, in their order."""
    closed = jax.make_jaxpr(forward)(variables, inputs)
    computed: dict[_Key, _Computed] = {}

    def inside(within: Op | None) -> jaxprs.Step:
        def step(eqn: JaxprEqn, args: list[Any], _: jaxprs.Path) -> Sequence[Any]:
            op = op_of(eqn, within)
            inner = jaxprs.called(eqn)
            if inner is not None:
                return jaxprs.walk(inner, args, inside(op))
            results = jaxprs.carry_out(eqn, args)
            if op.primitive in _COMPARED:
                number = sum(key[:2] == (op.path, op.primitive) for key in computed)
                computed[op.path, op.primitive, number] = _Computed(op, _parts(args, results))
            return results

        return step

    jaxprs.walk(closed, jax.tree.leaves((variables, inputs)), inside(None))
    return computed


def _parts(args: Sequence[Any], results: Sequence[Any]) -> dict[str, np.ndarray[Any, Any]]:
    names = ["the left operand", "the right operand"]
    if len(args) != 2:
        names = [f"operand {i}" for i in range(len(args))]
    answers = ["the result"] if len(results) == 1 else [f"result {i}" for i in range(len(results))]
    parts = dict(zip([*names, *answers], [*args, *results], strict=True))
    return {
        name: np.asarray(value)
        for name, value in parts.items()
        if not jnp.issubdtype(jnp.asarray(value).dtype, jax.dtypes.prng_key)
    }
