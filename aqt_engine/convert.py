"""Serving conversion: a trained model becomes a bundle.

What a model is, `aqt_engine.convertible` says: a training forward, and a serving forward with the
weights that it may read. Of those only what it does read goes into the bundle, and so no float copy
of a weight that has been quantized. The witness is the training forward itself, compiled at the
tile. Before the bundle becomes visible it is loaded back from disk and has to give the witness's
bits, in every bucket, in any order of rows and beside any neighbors; what does not is refused here,
and so never reaches a server.
"""

import importlib.metadata
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from aqt_engine import bundle, witness
from aqt_engine.bundle import Arrays, Bundle, TensorSpec
from aqt_engine.convertible import ConversionError as ConversionError
from aqt_engine.convertible import Convertible, Inputs, Leaf, LinenModel, ModelFactory, Serving
from aqt_engine.execution import Program

DEFAULT_TILE = 16
PLATFORMS = ("cpu", "cuda", "tpu")
MAX_WITNESS_ROWS = 256


def convert(
    model: ModelFactory | Convertible,
    variables: Any,
    example: Arrays,
    path: str | os.PathLike[str],
    *,
    tile: int = DEFAULT_TILE,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> bundle.Manifest:
    """Writes the model as a bundle at `path` (`.../NAME/VERSION`) and returns its manifest.

    Args:
      model: a `Convertible`, or a function that gives the linen module for a mode:
        `model(QuantMode.TRAIN)` is what was trained, and the mode is to be set on the side of each
        contraction that is the weight.
      variables: what was trained: for linen Flax collections, `{"params": ...}` and others.
      example: typical inputs by the names of the model's arguments, each of shape (rows, ...).
        They fix the signature, and the first 256 rows become the witness.
      path: the directory to write, which must not exist.
      tile: the number of rows at which the model is compiled, here and on every server.
      on_stage: told what is being done, for whoever watches.

    Raises:
      ConversionError: the example has no rows or unequal ones; an output is no array with the rows
        of its inputs; nothing is quantized; or answers are not exact: they differ from training or
        depend on the other rows of a batch.
      FileExistsError: `path` exists.
    """
    if tile < 2:
        raise ConversionError(f"`tile` must be at least 2, got {tile}: XLA computes one row apart")
    inputs = _canonical(example)
    rows = {name: _tiled(array, tile) for name, array in inputs.items()}
    first = {name: array[:tile] for name, array in rows.items()}
    variables = jax.tree.map(jnp.asarray, variables)
    model = _convertible(model)

    on_stage("Quantizing the weights")
    serving = model.serving(variables, first)

    on_stage("Running the training forward for the witness")
    train = jax.jit(_named(model.train))
    answers = [train(variables, _slice(rows, i, tile)) for i in range(0, _rows(rows), tile)]
    outputs = {k: np.concatenate([np.asarray(a[k]) for a in answers]) for k in answers[0]}

    on_stage("Exporting the serving graph")
    graph, weights = _export(serving, first)

    def refuse_if_inexact(written: Bundle) -> None:
        on_stage("Proving exactness: every bucket, any order, any neighbors")
        program = Program(written, max_rows=_rows(rows))
        for trial, verdict in witness.prove(program, written.witness).items():
            if not verdict.exact:
                raise ConversionError(
                    f"the converted model cannot be served exactly; {trial}, it is {verdict}. "
                    f"Does a row depend on the others (batch normalization in training mode, a "
                    f"mean over the batch), or does the model draw random numbers?"
                )

    return bundle.write(
        path,
        graph=graph,
        inputs=_specs(first),
        outputs=_specs(outputs),
        tile=tile,
        weights={leaf.name: np.asarray(leaf.value) for leaf in weights},
        roles={leaf.name: leaf.role for leaf in weights},
        float_nbytes=sum(leaf.nbytes for leaf in jax.tree.leaves(variables)),
        tools={name: importlib.metadata.version(name) for name in ("aqt-engine", "jax", "flax")},
        witness=bundle.Witness(inputs=rows, outputs=outputs),
        check=refuse_if_inexact,
    )


def calibrate(model: ModelFactory | Convertible, variables: Any, batches: Iterable[Arrays]) -> Any:
    """`variables` with the statistics of `batches`: what static quantization freezes into scales.

    Args:
      model: as in `convert`.
      variables: what was trained.
      batches: typical inputs by the names of the model's arguments, each of shape (rows, ...).

    Raises:
      ConversionError: the model keeps no statistics, so that there is nothing to calibrate.
    """
    return _convertible(model).calibrated(variables, map(_canonical, batches))


def _convertible(model: ModelFactory | Convertible) -> Convertible:
    return model if isinstance(model, Convertible) else LinenModel(model)


def _canonical(example: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """The example in the dtypes that JAX computes in: float64 becomes float32, int64 int32."""
    if not example:
        raise ConversionError("the example holds no input: give one array for each argument")
    inputs: dict[str, np.ndarray[Any, Any]] = {}
    for name, array in example.items():
        if array.ndim == 0 or len(array) == 0:
            raise ConversionError(
                f"example input {name!r} has shape {list(array.shape)}, and needs a first "
                f"dimension that counts at least one row"
            )
        inputs[name] = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
        if array.dtype.kind in "iu" and (inputs[name] != array).any():
            raise ConversionError(
                f"example input {name!r} has {array.dtype} values that do not fit "
                f"{inputs[name].dtype}, which JAX computes in: use smaller values"
            )
    if len({len(array) for array in inputs.values()}) > 1:
        sizes = ", ".join(f"{name!r} has {len(array)}" for name, array in inputs.items())
        raise ConversionError(f"example inputs must have the same number of rows: {sizes}")
    return inputs


def _tiled(array: np.ndarray[Any, Any], tile: int) -> np.ndarray[Any, Any]:
    """The first rows, repeated from the start until they fill whole tiles."""
    rows = math.ceil(min(len(array), MAX_WITNESS_ROWS) / tile) * tile
    return array[np.arange(rows) % len(array)]


def _rows(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _slice(arrays: Arrays, start: int, count: int) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array[start : start + count]) for name, array in arrays.items()}


def _specs(arrays: Arrays) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=name, dtype=array.dtype.name, shape=(bundle.BATCH, *array.shape[1:]))
        for name, array in arrays.items()
    )


def _named(
    forward: Callable[[Any, Inputs], Any],
) -> Callable[[Any, Inputs], dict[str, jax.Array]]:
    """The forward with its outputs by name."""

    def named_forward(variables: Any, inputs: Inputs) -> dict[str, jax.Array]:
        answer = forward(variables, inputs)
        if isinstance(answer, Mapping):
            named = {str(name): value for name, value in answer.items()}
        elif isinstance(answer, tuple):
            named = {f"output_{i}": value for i, value in enumerate(answer)}
        else:
            named = {"output": answer}
        rows = len(next(iter(inputs.values())))
        for name, value in named.items():
            if not isinstance(value, jax.Array) or value.ndim == 0 or len(value) != rows:
                shape = getattr(value, "shape", type(value).__name__)
                raise ConversionError(
                    f"the model's {name!r} is {shape} for inputs of {rows} rows; an output must "
                    f"be an array whose first dimension counts the rows of the inputs"
                )
        # The order in which jax.jit gives a dict back.
        return dict(sorted(named.items()))

    return named_forward


def _export(serving: Serving, inputs: Arrays) -> tuple[export.Exported, list[Leaf]]:
    """The graph over flat weights and inputs, and the weights, which are those that it reads."""
    leaves, serve = serving.leaves, _named(serving.forward)

    def graph_over(kept: Sequence[int]) -> export.Exported:
        def flat(weights: list[jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
            # What is not read still has to be there: Flax looks at its shape.
            values: list[Any] = [jnp.zeros(x.value.shape, x.value.dtype) for x in leaves]
            for position, weight in zip(kept, weights, strict=True):
                values[position] = weight
            named = dict(zip(inputs, arrays, strict=True))
            return list(serve(values, named).values())

        return export.export(jax.jit(flat), platforms=PLATFORMS)(
            [_struct(leaves[i].value) for i in kept], [_struct(x) for x in inputs.values()]
        )

    everything = range(len(leaves))
    read = [i for i in graph_over(everything).module_kept_var_idx if i in everything]
    return graph_over(read), [leaves[i] for i in read]


def _struct(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
