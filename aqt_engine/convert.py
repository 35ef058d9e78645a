"""Serving conversion: a trained Flax linen model becomes a bundle.

The model is run once in CONVERT, which stores its quantized weights, and traced in SERVE, which
reads them. Of all its variables only those that the SERVE forward reads go into the bundle: a
float weight that has been quantized is read for its shape alone, and is left out. The witness is
the training forward itself, compiled at the tile. Before the bundle becomes visible it is loaded
back from disk and has to give the witness's bits, in every bucket, in any order of rows and beside
any neighbors; what does not is refused here, and so never reaches a server.
"""

import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList
from jax import export

from aqt_engine import bundle, witness
from aqt_engine.bundle import Arrays, Bundle, TensorSpec
from aqt_engine.execution import Program
from aqt_engine.modes import QuantMode
from aqt_engine.qtensor import QTensor, Scale

DEFAULT_TILE = 16
PLATFORMS = ("cpu", "cuda", "tpu")
MAX_WITNESS_ROWS = 256
STATISTICS = "aqt_statistics"

ModelFactory = Callable[[QuantMode], nn.Module]
Variables = Mapping[str, Any]
_Forward = Callable[[Variables, Mapping[str, jax.Array]], dict[str, jax.Array]]


class ConversionError(ValueError):
    """A model cannot be converted so that it answers exactly; the message says what prevents it."""


def convert(
    model: ModelFactory,
    variables: Variables,
    example: Arrays,
    path: str | os.PathLike[str],
    *,
    tile: int = DEFAULT_TILE,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> bundle.Manifest:
    """Writes the model as a bundle at `path` (`.../NAME/VERSION`) and returns its manifest.

    Args:
      model: gives the linen module for a mode; `model(QuantMode.TRAIN)` is what was trained. The
        mode is to be set on the side of each contraction that is the weight.
      variables: what was trained: Flax collections, `{"params": ...}` and others that are read.
      example: typical inputs by the names of the module's arguments, each of shape (rows, ...).
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

    on_stage("Quantizing the weights")
    stored = _stored(model, variables, first)

    on_stage("Running the training forward for the witness")
    train = jax.jit(_forward(model(QuantMode.TRAIN)))
    answers = [train(variables, _slice(rows, i, tile)) for i in range(0, _rows(rows), tile)]
    outputs = {k: np.concatenate([np.asarray(a[k]) for a in answers]) for k in answers[0]}

    on_stage("Exporting the serving graph")
    graph, weights = _export(_forward(model(QuantMode.SERVE)), {**variables, **stored}, first)

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


def calibrate(model: ModelFactory, variables: Variables, batches: Iterable[Arrays]) -> Variables:
    """`variables` with the statistics of `batches`: what static quantization freezes into scales.

    Args:
      model: gives the linen module for a mode, as in `convert`.
      variables: what was trained.
      batches: typical inputs by the names of the module's arguments, each of shape (rows, ...).

    Raises:
      ConversionError: the model keeps no statistics, so that there is nothing to calibrate.
    """
    module = model(QuantMode.CALIBRATE)
    calibrated = dict(variables)

    @jax.jit
    def observe(current: Variables, inputs: Arrays) -> Variables:
        kept = DenyList(tuple(set(variables) - {STATISTICS}))
        return cast(
            tuple[Any, Variables], module.apply(current, inputs, method=_call, mutable=kept)
        )[1]

    for batch in batches:
        found = observe(calibrated, _canonical(batch))
        if STATISTICS not in found:
            raise ConversionError(
                "the model keeps no statistics in QuantMode.CALIBRATE: give the activations' sides "
                "a calibration such as MeanOfAbsMaxCalibration, or convert without calibrating"
            )
        calibrated[STATISTICS] = found[STATISTICS]
    return calibrated


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


def _call(module: nn.Module, inputs: Mapping[str, jax.Array]) -> Any:
    return module(**inputs)


def _forward(module: nn.Module) -> _Forward:
    """The module as a function of variables and named inputs, to outputs by name."""

    def forward(variables: Variables, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        answer: Any = module.apply(variables, inputs, method=_call)
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

    return forward


def _stored(model: ModelFactory, variables: Variables, inputs: Arrays) -> Mapping[str, Any]:
    """The collections that CONVERT fills beside those that the model came with."""
    fresh = DenyList(tuple(variables))
    module = model(QuantMode.CONVERT)

    # Compiled, as training is: a search for the best scale depends on the order of its sums.
    @jax.jit
    def run(variables: Variables, inputs: Arrays) -> Variables:
        return cast(
            tuple[Any, Variables], module.apply(variables, inputs, method=_call, mutable=fresh)
        )[1]

    stored = run(variables, dict(inputs))
    counts = [
        leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(variables.get(STATISTICS, {}))[0]
        if jax.tree_util.keystr(path[-1:], simple=True) == "count"
    ]
    if STATISTICS in stored or any(int(count) == 0 for count in counts):
        raise ConversionError(
            "the model quantizes with learned statistics, and was never calibrated: run "
            "`calibrate` on typical data first (`aqt convert --calibration FILE`)"
        )
    if not any(map(_is_qtensor, jax.tree.leaves(stored, is_leaf=_is_qtensor))):
        raise ConversionError(
            "the model stored no quantized weight in QuantMode.CONVERT: pass the mode that the "
            "factory is given to each AqtDotGeneral or AqtEinsum, as `rhs_quant_mode` where the "
            "weight is on the right and `lhs_quant_mode` where it is on the left"
        )
    return dict(stored)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Leaf:
    name: str
    value: jax.Array
    role: bundle.Role


def _leaves(variables: Variables) -> list[_Leaf]:
    """The arrays of `variables` in the order in which JAX flattens them."""
    leaves: list[_Leaf] = []
    for path, value in jax.tree_util.tree_flatten_with_path(variables, is_leaf=_is_stored)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not _is_stored(value):
            leaves.append(_Leaf(name=name, value=value, role="float"))
            continue
        if isinstance(value, QTensor):
            leaves.append(_Leaf(name=f"{name}/qvalue", value=value.qvalue, role="qvalue"))
        if value.scale is not None:
            leaves.append(_Leaf(name=f"{name}/scale", value=value.scale, role="scale"))
        if value.bias is not None:
            leaves.append(_Leaf(name=f"{name}/bias", value=value.bias, role="bias"))
    return leaves


def _export(
    serve: _Forward, variables: Variables, inputs: Arrays
) -> tuple[export.Exported, list[_Leaf]]:
    """The graph over flat weights and inputs, and the weights, which are those that it reads."""
    leaves, tree = _leaves(variables), jax.tree.structure(variables)

    def graph_over(kept: Sequence[int]) -> export.Exported:
        def flat(weights: list[jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
            # What is not read still has to be there: Flax looks at its shape.
            values: list[Any] = [jnp.zeros(x.value.shape, x.value.dtype) for x in leaves]
            for position, weight in zip(kept, weights, strict=True):
                values[position] = weight
            named = dict(zip(inputs, arrays, strict=True))
            return list(serve(jax.tree.unflatten(tree, values), named).values())

        return export.export(jax.jit(flat), platforms=PLATFORMS)(
            [_struct(leaves[i].value) for i in kept], [_struct(x) for x in inputs.values()]
        )

    everything = range(len(leaves))
    read = [i for i in graph_over(everything).module_kept_var_idx if i in everything]
    return graph_over(read), [leaves[i] for i in read]


def _is_qtensor(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, QTensor | Scale)


def _struct(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
