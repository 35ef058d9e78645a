"""Serving conversion: a trained model becomes a bundle.

What a model is, `aqt_engine.convertible` says: a training forward, and a serving forward with the
weights that it may read. Of those only what it does read goes into the bundle, and so no float copy
of a weight that has been quantized. The witness is the training forward itself, compiled at the
tile. Before the bundle becomes visible it is loaded back from disk and has to give the witness's
bits, in every bucket, in any order of rows and beside any neighbors; what does not is refused here,
and so never reaches a server.
"""

import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aqt_engine import bundle, graphs, heap, named_axes, portability, proof, tiles
from aqt_engine.bundle import Arrays, Bundle
from aqt_engine.convertible import ConversionError as ConversionError
from aqt_engine.convertible import Convertible, Leaf, LinenModel, ModelFactory, Serving, leaves_of
from aqt_engine.convertible import Stored as Stored
from aqt_engine.execution import Program
from aqt_engine.functions import QuantizedFunction
from aqt_engine.functions.folding import Function as Function
from aqt_engine.manifest import Axes, LengthBucket
from aqt_engine.provenance import Quantized
from aqt_engine.rows import Op, counting, first_mixing, mixing
from aqt_engine.signature import Signature as Signature
from aqt_engine.spool import spool
from aqt_engine.streaming import Keep, as_it_is, frugal

DEFAULT_TILE = 16
_MAX_FINDINGS = 10
_PLAIN = Signature()


def convert(
    model: ModelFactory | Convertible | QuantizedFunction,
    variables: Any,
    example: Arrays,
    path: str | os.PathLike[str],
    *,
    signature: Signature = _PLAIN,
    tile: int | tiles.Measure = DEFAULT_TILE,
    portable: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> bundle.Manifest:
    """Writes the model as a bundle at `path` (`.../NAME/VERSION`) and returns its manifest.

    Args:
      model: a function that gives the linen module for a mode: `model(QuantMode.TRAIN)` is what
        was trained, and the mode is to be set on the side of each contraction that is the weight.
        Or `Function(fn)` of any `fn(variables, **inputs)` that contracts with our ops; or what
        `aqt_engine.functions.quantize` made of one; or `Stored(fn)`, where the variables hold
        tensors that are quantized already; or another `Convertible`.
      variables: what was trained: for linen Flax collections, `{"params": ...}` and others.
      example: typical inputs by the names of the model's arguments, each of shape (rows, ...).
        They fix the signature, and the first 256 rows become the witness.
      path: the directory to write, which must not exist.
      signature: symbolic dimensions with their buckets, and inputs that are one scalar per request.
      tile: the number of rows at which the model is compiled, here and on every server; or how to
        measure what each costs, `tiles.measured`, and the cheapest is taken. The default is a
        number, so that the same call gives the same bits everywhere.
      portable: whether answers shall have the same bits on every platform, and not only those of
        the training forward on the same one. Scales have to be powers of two (`po2_scale`).
      on_stage: told what is being done, for whoever watches.

    Raises:
      ConversionError: the example has no rows or unequal ones, or does not fit the signature; an
        output is no array with the rows of its inputs; nothing is quantized; answers depend on how
        many rows there are; they are not exact: an operation mixes the rows of a batch, or the
        proof finds that they differ from training or depend on other rows; or they shall be
        `portable` and an operation is not. The operation is named as far as it can be found.
      FileExistsError: `path` exists.
    """
    if isinstance(tile, int) and tile < 1:
        raise ConversionError(f"`tile` is a number of rows, at least 1, got {tile}")
    with spool(Path(path)) as spooled:
        # On other devices arrays are in the memory of those.
        keep = spooled.keep if jax.default_backend() == "cpu" else as_it_is
        return _converted(
            as_convertible(model),
            variables,
            example,
            path,
            signature,
            tile,
            portable,
            on_stage,
            keep,
        )


def _converted(
    model: Convertible,
    variables: Any,
    example: Arrays,
    path: str | os.PathLike[str],
    signature: Signature,
    tile: int | tiles.Measure,
    portable: bool,
    on_stage: Callable[[str], None],
    keep: Keep,
) -> bundle.Manifest:
    inputs = signature.canonical(example)
    specs = signature.specs(inputs)
    variables = jax.tree.map(jax.device_put, variables)

    on_stage("Quantizing the weights")
    first = signature.witness(inputs, signature.buckets[0], DEFAULT_TILE)
    at_once = {k: a[:DEFAULT_TILE] for k, a in first.items()}
    serving = model.serving(variables, at_once, keep)

    costs: Mapping[int, tiles.TileCost] = {}
    if not isinstance(tile, int):
        on_stage("Measuring what each tile costs")
        costs = tile(serving, signature.witness(inputs, signature.buckets[-1], DEFAULT_TILE))
        tile = tiles.cheapest(costs)

    on_stage("Running the training forward for the witness")
    forward = graphs.named(model.train)
    train = frugal(forward)
    rows = {bucket: signature.witness(inputs, bucket, tile) for bucket in signature.buckets}

    def structs(bucket: LengthBucket, rows: int = tile) -> dict[str, jax.ShapeDtypeStruct]:
        return {s.name: s.with_rows(rows, signature.sizes(bucket)) for s in specs}

    # Of one row alone nothing shows what would be done with two.
    _refuse_mixing(forward, variables, structs(signature.buckets[0], max(tile, 2)))
    outputs = signature.output_specs(lambda b: jax.eval_shape(train, variables, structs(b)))
    witnesses = {
        bucket: bundle.Witness(inputs=of, outputs=proof.in_tiles(train, variables, of, tile))
        for bucket, of in rows.items()
    }

    _refuse_counting(forward, variables, witnesses[signature.buckets[0]], tile)

    if portable:
        on_stage("Looking for operations that are not portable")
        for bucket in signature.buckets:
            _refuse_if_not_portable(serving, structs(bucket))

    on_stage("Exporting the serving graph")
    made = graphs.exported(serving, {bucket: structs(bucket) for bucket in signature.buckets})

    def refuse_if_inexact(written: Bundle) -> None:
        on_stage("Proving exactness: every bucket, any order, any neighbors")
        most = max(len(array) for of in rows.values() for array in of.values())
        # By XLA alone, which computes the bundle wherever it goes.
        program = Program(written, max_rows=most, kernel=False)
        for trial, verdict in proof.of_witnesses(
            program, written.manifest, written.witnesses, rows=most
        ):
            if not verdict.exact:
                tried = {k: a[: max(tile, 2)] for k, a in rows[signature.buckets[0]].items()}
                raise ConversionError(
                    f"the converted model cannot be served exactly; {trial}, it is {verdict}. "
                    f"{_suspect(first_mixing(forward, variables, tried))}"
                )

    heap.give_back()
    return bundle.write(
        path,
        graph=made.at_tile,
        batched=made.batched,
        not_batched=made.not_batched,
        inputs=specs,
        outputs=outputs,
        lengths={name: tuple(sizes) for name, sizes in signature.lengths.items()},
        pads=signature.pads,
        per_request=tuple(signature.per_request),
        tile=tile,
        tile_costs=costs,
        quantized=_of_weights(serving.quantized, made.weights),
        portable=portable,
        weights={leaf.name: np.asarray(leaf.value) for leaf in made.weights},
        roles={leaf.name: leaf.role for leaf in made.weights},
        axes=_axes(model.axes(variables, at_once), leaves_of(variables), made.weights),
        float_nbytes=sum(leaf.nbytes for leaf in jax.tree.leaves(variables)),
        tools={name: importlib.metadata.version(name) for name in ("aqt-engine", "jax", "flax")},
        witness=witnesses,
        check=refuse_if_inexact,
    )


def calibrate(
    model: ModelFactory | Convertible | QuantizedFunction, variables: Any, batches: Iterable[Arrays]
) -> Any:
    """`variables` with the statistics of `batches`: what static quantization freezes into scales.

    Args:
      model: as in `convert`.
      variables: what was trained.
      batches: typical inputs by the names of the model's arguments, each of shape (rows, ...).

    Raises:
      ConversionError: the model keeps no statistics, so that there is nothing to calibrate.
    """
    return as_convertible(model).calibrated(variables, map(_PLAIN.canonical, batches))


def _of_weights(
    quantized: Mapping[str, Quantized], weights: Sequence[Leaf]
) -> dict[str, Quantized]:
    """Of tensors that a weight is a part of: others are stored and not served."""
    tensors = {leaf.name.rpartition("/")[0] for leaf in weights if leaf.role != "float"}
    return {name: by for name, by in quantized.items() if name in tensors}


def _axes(
    axes: Mapping[str, Axes], variables: Sequence[Leaf], weights: Sequence[Leaf]
) -> dict[str, Axes]:
    """The names of the axes of weights, where `axes` are those of variables."""
    if not axes:
        return {}
    stored = {leaf.name: leaf.value for leaf in weights if leaf.role == "qvalue"}
    trained = {leaf.name: leaf.value for leaf in variables}
    axes = {name: of for name, of in axes.items() if name in trained}
    float_ = {leaf.name: axes[leaf.name] for leaf in weights if leaf.name in axes}
    return {**float_, **named_axes.of_stored(stored, trained, axes)}


def as_convertible(model: ModelFactory | Convertible | QuantizedFunction) -> Convertible:
    """`model`, or what stands for it: a linen model is given by its factory."""
    if isinstance(model, QuantizedFunction):
        return Function(model)
    return model if isinstance(model, Convertible) else LinenModel(model)


def _refuse_mixing(
    forward: graphs.NamedForward, variables: Any, inputs: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    found = mixing(forward, variables, inputs)
    if found:
        raise ConversionError(
            f"the model cannot be served exactly, as an answer would depend on what else is in its "
            f"batch: {'; '.join(map(str, found))}. Let each row be computed by itself: batch "
            f"normalization with running averages, no dropout, no sum or scale over the batch"
        )


def _refuse_counting(
    forward: graphs.NamedForward, variables: Any, witness: bundle.Witness, tile: int
) -> None:
    # Of many rows, as rounding moves a few of them far.
    rows = max(tile, DEFAULT_TILE)
    inputs, answers = (
        {name: array[:rows] for name, array in arrays.items()}
        for arrays in (witness.inputs, witness.outputs)
    )
    if found := counting(forward, variables, inputs, answers, tile):
        raise ConversionError(
            f"answers change with the number of rows that are computed at once: {found}. A server "
            f"computes {tile} at once, whatever was trained with: let no answer depend on how many "
            f"rows there are, as on `x.shape[0]`"
        )


def _suspect(op: Op | None) -> str:
    if op is None:
        return (
            "No operation, computed alone, makes a row depend on the others: it is what the "
            "compiler makes of them together, or training and serving differ; `aqt verify "
            "--against` compares the two"
        )
    return (
        f"The first operation whose result for a row depends on the other rows, or on where the "
        f"row lies, is {op}"
    )


def _refuse_if_not_portable(serving: Serving, inputs: graphs.Structs) -> None:
    found = portability.findings(serving, inputs)
    if found:
        raise ConversionError(
            "the model cannot have the same bits on every platform: "
            + "; ".join(map(str, found[:_MAX_FINDINGS]))
            + (f"; and {len(found) - _MAX_FINDINGS} more" if len(found) > _MAX_FINDINGS else "")
        )
