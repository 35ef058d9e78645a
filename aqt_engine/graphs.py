"""Serving forwards become graphs: StableHLO over flat weights and inputs, for every platform."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from aqt_engine.convertible import ConversionError, Inputs, Leaf, Serving
from aqt_engine.manifest import LengthBucket
from aqt_engine.proof import NamedForward as NamedForward

PLATFORMS = ("cpu", "cuda", "tpu")

Structs = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """The graphs at the tile and, if the model allows it, at any number of rows, by length bucket.

    They take the values of `weights`, which are the leaves that one of them reads. `not_batched`
    says why there are none for any number of rows; None where there are.
    """

    at_tile: Mapping[LengthBucket, export.Exported]
    batched: Mapping[LengthBucket, export.Exported]
    not_batched: str | None
    weights: Sequence[Leaf]


def named(forward: Callable[[Any, Inputs], Any]) -> NamedForward:
    """The forward with its outputs by name.

    It raises ConversionError where an output is no array with the rows of the inputs.
    """

    def named_forward(variables: Any, inputs: Inputs) -> dict[str, jax.Array]:
        answer = forward(variables, inputs)
        if isinstance(answer, Mapping):
            by_name = {str(name): value for name, value in answer.items()}
        elif isinstance(answer, tuple):
            by_name = {f"output_{i}": value for i, value in enumerate(answer)}
        else:
            by_name = {"output": answer}
        rows = next(iter(inputs.values())).shape[0]
        for name, value in by_name.items():
            if not isinstance(value, jax.Array) or value.ndim == 0 or value.shape[0] != rows:
                shape = getattr(value, "shape", type(value).__name__)
                raise ConversionError(
                    f"the model's {name!r} is {shape} for inputs of {rows} rows; an output must "
                    f"be an array whose first dimension counts the rows of the inputs"
                )
        # The order in which jax.jit gives a dict back.
        return dict(sorted(by_name.items()))

    return named_forward


def exported(serving: Serving, inputs: Mapping[LengthBucket, Structs]) -> Graphs:
    """The graphs of `serving` for inputs of these shapes, in which all rows are a tile."""
    leaves = serving.leaves
    everything = range(len(leaves))
    read = {
        i
        for structs in inputs.values()
        for i in _graph(serving, everything, structs).module_kept_var_idx
        if i in everything
    }
    kept = sorted(read)
    batched, not_batched = _batched(serving, kept, inputs)
    return Graphs(
        at_tile={bucket: _graph(serving, kept, structs) for bucket, structs in inputs.items()},
        batched=batched,
        not_batched=not_batched,
        weights=[leaves[i] for i in kept],
    )


def _batched(
    serving: Serving, kept: Sequence[int], inputs: Mapping[LengthBucket, Structs]
) -> tuple[dict[LengthBucket, export.Exported], str | None]:
    """The graphs for any number of rows, or why there are none."""
    (rows,) = export.symbolic_shape("rows")
    try:
        graphs = {
            bucket: _graph(
                serving,
                kept,
                {
                    k: jax.ShapeDtypeStruct((rows, *s.shape[1:]), s.dtype)
                    for k, s in structs.items()
                },
            )
            for bucket, structs in inputs.items()
        }
    except Exception as error:
        # Whatever a model's own code does with a number of rows that is a symbol. It is served in
        # mode exact all the same.
        first, *_ = [*str(error).splitlines(), ""]
        return {}, f"{type(error).__name__}: {first}"
    return graphs, None


def _graph(serving: Serving, kept: Sequence[int], inputs: Structs) -> export.Exported:
    """The graph that is given the leaves `kept`."""
    leaves, serve = serving.leaves, named(serving.forward)

    def flat(weights: list[jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
        # What is not read still has to be there: Flax looks at its shape.
        values: list[Any] = [jnp.zeros(x.value.shape, x.value.dtype) for x in leaves]
        for position, weight in zip(kept, weights, strict=True):
            values[position] = weight
        by_name = dict(zip(inputs, arrays, strict=True))
        return list(serve(values, by_name).values())

    weights = [jax.ShapeDtypeStruct(leaves[i].value.shape, leaves[i].value.dtype) for i in kept]
    return export.export(jax.jit(flat), platforms=PLATFORMS)(weights, list(inputs.values()))
