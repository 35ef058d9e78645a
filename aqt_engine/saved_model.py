"""A bundle's graphs as a TensorFlow SavedModel, for whoever serves those. It needs TensorFlow.

The graph goes in as it is, in the op `XlaCallModule`, and the weights as variables. TensorFlow
compiles it with the XLA that it brings, so the promise of a bundle does not go with it: integer
sums are the same, and what is computed in float may differ in its last bits. So the witness is
tried in TensorFlow when the SavedModel is written, and what differs is said.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aqt_engine import witness
from aqt_engine.bundle import Bundle
from aqt_engine.manifest import LengthBucket, TensorSpec, bucket_name
from aqt_engine.witness import Verdict

SERVING_DEFAULT = "serving_default"


class SavedModelError(ValueError):
    """A SavedModel cannot be written; the message says what is missing."""


def write(bundle: Bundle, path: Path) -> dict[str, Verdict]:
    """Writes `bundle` as a SavedModel to the new directory `path`; what its witnesses say of it.

    A signature has the inputs and outputs of the manifest by their names, and takes any number of
    rows: they are computed tile by tile. A model with length buckets has a signature for each,
    named as `signature_name` says, whose inputs are padded by the caller.

    Raises:
      SavedModelError: TensorFlow is not installed, or JAX's `jax2tf` cannot work with it.
      FileExistsError: `path` exists.
    """
    tf, jax2tf = _tensorflow()
    path.mkdir(parents=True)
    module: Any = tf.Module()
    # Four bits have no variables there; the graph is given the integers that they are.
    values = list(bundle.weights)
    module.weights = [tf.Variable(_plain(value), trainable=False) for value in values]
    dtypes = [value.dtype for value in values]
    functions: dict[str, Any] = {}
    for bucket, graph in bundle.graphs.items():

        def at_tile(weights: list[Any], rows: list[Any], graph: Any = graph) -> list[Any]:
            given = [w.astype(dtype) for w, dtype in zip(weights, dtypes, strict=True)]
            return list(graph.call(given, rows))

        converted = jax2tf.convert(
            at_tile, with_gradient=False, native_serialization_platforms=graph.platforms
        )
        functions[signature_name(bundle, bucket)] = _function(tf, converted, module, bundle, bucket)
    tf.saved_model.save(module, str(path), signatures=functions)
    return verify(bundle, path)


def verify(bundle: Bundle, path: Path) -> dict[str, Verdict]:
    """What the witnesses of `bundle` say of the SavedModel at `path`, by signature.

    Raises:
      SavedModelError: TensorFlow is not installed.
    """
    tf, _ = _tensorflow()
    signatures = tf.saved_model.load(str(path)).signatures
    verdicts: dict[str, Verdict] = {}
    for bucket, kept in bundle.witnesses.items():
        name = signature_name(bundle, bucket)
        answers = signatures[name](**{k: tf.constant(a) for k, a in kept.inputs.items()})
        found = {k: np.asarray(a) for k, a in answers.items()}
        verdicts[name] = witness.compare(found, kept.outputs)
    return verdicts


def signature_name(bundle: Bundle, bucket: LengthBucket) -> str:
    """`serving_default`, or what a length bucket is called: "length_16_width_8"."""
    sizes = bundle.manifest.sizes(bucket)
    return bucket_name(sizes).replace("=", "_").replace(",", "_") or SERVING_DEFAULT


def _function(tf: Any, converted: Any, module: Any, bundle: Bundle, bucket: LengthBucket) -> Any:
    """The concrete function of inputs by name, of any number of rows."""
    manifest = bundle.manifest
    tile, outputs = manifest.tile, manifest.outputs
    sizes = manifest.sizes(bucket)

    def serve(**inputs: Any) -> dict[str, Any]:
        rows = tf.shape(inputs[manifest.inputs[0].name])[0]
        tiles = (rows + tile - 1) // tile

        def in_tiles(x: Any) -> Any:
            filled = tf.pad(x, [[0, tiles * tile - rows]] + [[0, 0]] * (len(x.shape) - 1))
            return tf.reshape(filled, [tiles, tile, *x.shape[1:]])

        def one(rows: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(converted(list(module.weights), list(rows)))

        answers = tf.map_fn(
            one,
            tuple(in_tiles(inputs[spec.name]) for spec in manifest.inputs),
            fn_output_signature=tuple(
                tf.TensorSpec([tile, *_shape(spec, sizes)], spec.dtype) for spec in outputs
            ),
            parallel_iterations=1,
        )
        return {
            spec.name: tf.reshape(answer, [tiles * tile, *_shape(spec, sizes)])[:rows]
            for spec, answer in zip(outputs, answers, strict=True)
        }

    specs = {
        spec.name: tf.TensorSpec([None, *_shape(spec, sizes)], spec.dtype, name=spec.name)
        for spec in manifest.inputs
    }
    return tf.function(serve, autograph=False).get_concrete_function(**specs)


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return spec.with_rows(1, sizes).shape[1:]


def _plain(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    narrow = jax.numpy.issubdtype(value.dtype, jax.numpy.integer) and value.dtype.kind == "V"
    return value.astype(np.int8) if narrow else value


def _tensorflow() -> tuple[Any, Any]:
    try:
        tf = importlib.import_module("tensorflow")
        from jax.experimental import jax2tf
    except ImportError as error:
        raise SavedModelError(
            f"a SavedModel is written by TensorFlow, which cannot be imported ({error}): install "
            f"tensorflow, or tensorflow-cpu, beside aqt-engine"
        ) from error
    return tf, jax2tf
