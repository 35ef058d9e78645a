"""The bundle: one converted model version on disk, and all that a server needs.

A bundle is a directory `NAME/VERSION/`:

    manifest.json      what it is: signature, tile, quantization, and the sha256 of every file
    graph.stablehlo    the SERVE forward at the tile, from `jax.export`; weights are arguments
    graph.batched...   the same at any number of rows, for mode fast; where the model allows it
    graphs/            instead, for symbolic dimensions, two of each length bucket: length=16....
    weights/           an Orbax checkpoint of those arguments, by their numbers in the manifest
    witness/           an Orbax checkpoint of inputs and of the training forward's outputs, bucket
                       after bucket, as the manifest has them

It is written under a temporary name and renamed, so that a reader sees a whole bundle or none.
Loading runs no code from it: the graph is StableHLO, the arrays are plain, and nothing is pickled.
A bundle whose content has changed in any byte is refused. The digests guard against damage and
careless edits, not against someone who rewrites the whole bundle: who may write it is the file
system's business.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pydantic
from jax import export

from aqt_engine import arrays
from aqt_engine.files import (
    MANIFEST,
    check_files,
    digest,
    files,
    onto,
    passes,
    sync,
    sync_entry,
    unfinished,
)
from aqt_engine.files import BundleError as BundleError
from aqt_engine.foreign_code import foreign_calls
from aqt_engine.manifest import BATCH as BATCH
from aqt_engine.manifest import MANIFEST_FORM, Axes, bucket_name
from aqt_engine.manifest import LengthBucket as LengthBucket
from aqt_engine.manifest import Manifest as Manifest
from aqt_engine.manifest import Role as Role
from aqt_engine.manifest import TensorSpec as TensorSpec
from aqt_engine.manifest import TileCost as TileCost
from aqt_engine.manifest import WeightSpec as WeightSpec
from aqt_engine.provenance import OF_NOTHING, Provenance, Quantized

FORMAT_VERSION = 3
_WEIGHTS = "weights"
_WITNESS = "witness"

_BATCHED = ".batched"
_NONE: Mapping[Any, Any] = {}
_ADDED_IN_2: Mapping[str, Any] = {
    "lengths": {},
    "pads": {},
    "per_request": [],
    "tile_costs": {},
    "provenance": {"tensors": {}, "configurations": {}, "fingerprint": OF_NOTHING},
    "portable": False,
}

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """Inputs, and what the training forward answered to them at the bundle's tile.

    Each array has the same number of rows, a multiple of the tile.
    """

    inputs: Arrays
    outputs: Arrays


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle in memory, but for its `weights`, in the manifest's order: one that is asked for is
    read, and one that nobody keeps takes no memory. (Those of formats 1 and 2 are all kept.)

    There is a graph, a witness and, where the model allows it, a graph for any number of rows
    (`batched`) for each length bucket; the only bucket is () where no dimension is symbolic.
    """

    manifest: Manifest
    graphs: Mapping[LengthBucket, export.Exported]
    batched: Mapping[LengthBucket, export.Exported]
    weights: arrays.Stored
    witnesses: Mapping[LengthBucket, Witness]

    @property
    def graph(self) -> export.Exported:
        """The graph of the shortest bucket, which mostly is the only one."""
        return self.graphs[self.manifest.length_buckets[0]]

    @property
    def witness(self) -> Witness:
        """The witness of the shortest bucket, which mostly is the only one."""
        return self.witnesses[self.manifest.length_buckets[0]]


def write(
    path: str | os.PathLike[str],
    *,
    graph: export.Exported | Mapping[LengthBucket, export.Exported],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    tile: int,
    weights: Mapping[str, np.ndarray[Any, Any]],
    roles: Mapping[str, Role],
    axes: Mapping[str, Axes] = _NONE,
    float_nbytes: int,
    tools: Mapping[str, str],
    witness: Witness | Mapping[LengthBucket, Witness],
    batched: Mapping[LengthBucket, export.Exported] = _NONE,
    not_batched: str | None = None,
    lengths: Mapping[str, tuple[int, ...]] = _NONE,
    pads: Mapping[str, float] = _NONE,
    per_request: tuple[str, ...] = (),
    tile_costs: Mapping[int, TileCost] = _NONE,
    quantized: Mapping[str, Quantized] = _NONE,
    portable: bool = False,
    check: Callable[[Bundle], None] = lambda written: None,
) -> Manifest:
    """Writes a bundle at `path`, whole or not at all, and returns its manifest.

    `graph` takes the flat list of `weights`, in their order, then the flat list of inputs, each of
    `tile` rows, and returns the flat list of outputs; graphs in `batched` do so with any number of
    rows, and `not_batched` says why there are none. With `lengths`, the sizes of each symbolic
    dimension, `graph` and `witness` are one for each length bucket. `quantized` says by which
    configuration tensors of the weights were made, by the names of their parts without `/qvalue` or
    `/scale`; `axes` are the names of the axes of weights. `check` is given the bundle as a reader
    will load it, before it becomes visible; what it raises leaves nothing behind.

    Raises:
      FileExistsError: something already stands at `path`; a version is never overwritten.
    """
    graphs: Mapping[LengthBucket, export.Exported]
    graphs = {(): graph} if isinstance(graph, export.Exported) else graph
    witnesses: Mapping[LengthBucket, Witness]
    witnesses = {(): witness} if isinstance(witness, Witness) else witness
    target = Path(path).absolute()
    if target.exists():
        raise FileExistsError(
            f"{target} already exists, and a served version never changes: "
            f"write to a new version number, or remove it first"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(target.parent, target.name) as temporary, onto(target):
        for kind, by_bucket in (("", graphs), (_BATCHED, batched)):
            for bucket, exported in by_bucket.items():
                file = temporary / _graph_file(lengths, bucket, kind)
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(exported.serialize())
        arrays.save(temporary / _WEIGHTS, list(weights.values()))
        arrays.save(
            temporary / _WITNESS,
            [
                array
                for bucket in itertools.product(*lengths.values())
                for specs, of in (
                    (inputs, witnesses[bucket].inputs),
                    (outputs, witnesses[bucket].outputs),
                )
                for array in (of[spec.name] for spec in specs)
            ],
        )
        manifest = Manifest(
            inputs=inputs,
            outputs=outputs,
            lengths={name: tuple(sizes) for name, sizes in lengths.items()},
            pads=pads,
            per_request=per_request,
            tile=tile,
            tile_costs={str(rows): cost for rows, cost in tile_costs.items()},
            portable=portable,
            not_batched=not_batched,
            weights=tuple(
                WeightSpec(
                    name=k, dtype=v.dtype.name, shape=v.shape, role=roles[k], axes=axes.get(k)
                )
                for k, v in weights.items()
            ),
            provenance=Provenance.of(quantized),
            float_nbytes=float_nbytes,
            platforms=tuple(next(iter(graphs.values())).platforms),
            tools=tools,
            files={name: digest(temporary / name) for name in files(temporary)},
        )
        (temporary / MANIFEST).write_text(_dump(manifest))
        check(load(temporary, mapped=True))
        sync(temporary)
        try:
            temporary.rename(target)
        except OSError as error:
            raise FileExistsError(f"{target} was written by another meanwhile") from error
        sync_entry(target.parent)
    return manifest


def read_manifest(path: str | os.PathLike[str], *, with_configurations: bool = True) -> Manifest:
    """The manifest of the bundle at `path`, its own digest checked, the other files not yet.

    Without configurations, those are not looked at: it is for whom knows the manifest.

    Raises:
      BundleError: there is none, it is not a manifest, it was changed, or its format is another.
      OSError: it could not be read, which may pass.
    """
    file = Path(path) / MANIFEST
    try:
        text = file.read_bytes()
    except OSError as error:
        if passes(error):
            raise
        raise BundleError(
            f"{path} is not a bundle: its {MANIFEST} cannot be read ({error.strerror}); "
            f"`aqt convert` writes one"
        ) from error
    try:
        document = json.loads(text)
        version = document["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BundleError(f"{file} is damaged: it is no JSON manifest; convert again") from error
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise BundleError(
            f"{path} has bundle format {version!r} and this program reads 1 to {FORMAT_VERSION}: "
            f"use a newer aqt, or write it again with `aqt convert`"
        )
    stated = document.pop("digest", None)
    if stated != _canonical_digest(document):
        raise BundleError(
            f"{file} was changed after conversion: its digest does not fit its content; "
            f"convert again"
        )
    del document["format_version"]
    if version == 1:
        document = _ADDED_IN_2 | document
    try:
        manifest = MANIFEST_FORM.validate_json(json.dumps(document))
        if with_configurations:
            manifest.provenance.check()
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"{file} is no manifest of format {version}: {where}: {first['msg']}; convert again"
        ) from error
    except ValueError as error:
        raise BundleError(
            f"{file} is no manifest of format {version}: {error}; convert again"
        ) from error
    return manifest


def load(path: str | os.PathLike[str], *, with_graphs: bool = True, mapped: bool = False) -> Bundle:
    """The bundle at `path`, every file checked against the manifest.

    Without graphs it is for whom has executables of a bundle with the same digests, whose graphs
    and configurations were checked when they were compiled. Its weights are `mapped` if nobody else
    can write there, and read otherwise.

    Raises:
      BundleError: a file is missing, unlisted, truncated or changed, or cannot be decoded.
      OSError: one could not be read, which may pass; as may MemoryError and JAX's.
    """
    root = Path(path)
    manifest = read_manifest(root, with_configurations=with_graphs)
    check_files(root, manifest)
    try:
        graphs = _load_graphs(root, manifest, "") if with_graphs else {}
        batched = _load_graphs(root, manifest, _BATCHED) if with_graphs else {}
        weights, witnesses = _load_arrays(root, manifest, mapped=mapped)
    except (MemoryError, OSError, jax.errors.JaxRuntimeError):
        # Of this machine at this moment: the digests are right.
        raise
    except Exception as error:
        raise BundleError(
            f"{root} has the right digests but cannot be decoded by jax {jax.__version__} "
            f"(it was written with {dict(manifest.tools)}): {error}"
        ) from error
    for graph in (*graphs.values(), *batched.values()):
        if foreign := foreign_calls(graph):
            raise BundleError(
                f"{root} has a graph that calls {', '.join(foreign)} outside of it, and a bundle "
                f"only computes: convert a model without callbacks and kernels of its own"
            )
    for bucket in manifest.length_buckets:
        if bucket in graphs:
            _check_graph(root, manifest, bucket, graphs[bucket])
        elif with_graphs:
            raise BundleError(f"{root} has no graph for {manifest.sizes(bucket)}: convert again")
        _check_witness(root, manifest, bucket, witnesses[bucket])
    return Bundle(
        manifest=manifest,
        graphs=graphs,
        batched=batched,
        weights=weights,
        witnesses=witnesses,
    )


def _graph_file(lengths: Mapping[str, Any], bucket: LengthBucket, kind: str) -> str:
    if not lengths:
        return f"graph{kind}.stablehlo"
    return f"graphs/{bucket_name(dict(zip(lengths, bucket, strict=True)))}{kind}.stablehlo"


def _load_graphs(root: Path, manifest: Manifest, kind: str) -> dict[LengthBucket, export.Exported]:
    files = {b: _graph_file(manifest.lengths, b, kind) for b in manifest.length_buckets}
    return {
        bucket: export.deserialize(bytearray((root / file).read_bytes()))
        for bucket, file in files.items()
        if file in manifest.files
    }


def _load_arrays(
    root: Path, manifest: Manifest, *, mapped: bool
) -> tuple[arrays.Stored, dict[LengthBucket, Witness]]:
    """The weights and, by length bucket, the witnesses."""
    if arrays.by_name(root / _WEIGHTS):
        return _named_arrays(root, manifest)
    weights = arrays.load(root / _WEIGHTS, mapped=mapped)
    values = iter(arrays.load(root / _WITNESS))
    witnesses = {
        bucket: Witness(
            inputs={spec.name: next(values) for spec in manifest.inputs},
            outputs={spec.name: next(values) for spec in manifest.outputs},
        )
        for bucket in manifest.length_buckets
    }
    return weights, witnesses


def _named_arrays(
    root: Path, manifest: Manifest
) -> tuple[arrays.Stored, dict[LengthBucket, Witness]]:
    """The same of formats 1 and 2, which had arrays by their names."""
    weights = arrays.restore(root / _WEIGHTS)
    values = arrays.restore(root / _WITNESS)
    witnesses: dict[LengthBucket, Witness] = {}
    for bucket in manifest.length_buckets:
        sizes = manifest.sizes(bucket)
        part = f"{bucket_name(sizes)}/" if sizes else ""
        witnesses[bucket] = Witness(
            inputs={s.name: values[f"{part}inputs/{s.name}"] for s in manifest.inputs},
            outputs={s.name: values[f"{part}outputs/{s.name}"] for s in manifest.outputs},
        )
    return arrays.Stored.held([weights[spec.name] for spec in manifest.weights]), witnesses


def _check_graph(
    root: Path, manifest: Manifest, bucket: LengthBucket, graph: export.Exported
) -> None:
    def described(shape: Sequence[Any], dtype: Any) -> str:
        return f"{np.dtype(dtype).name}{list(shape)}"

    sizes = manifest.sizes(bucket)
    rows = [spec.with_rows(manifest.tile, sizes) for spec in (*manifest.inputs, *manifest.outputs)]
    stated = [described(w.shape, w.dtype) for w in manifest.weights]
    stated += [described(spec.shape, spec.dtype) for spec in rows]
    computed = [described(a.shape, a.dtype) for a in (*graph.in_avals, *graph.out_avals)]
    if stated != computed or len(manifest.outputs) != len(graph.out_avals):
        raise BundleError(
            f"{root} states weights, inputs and outputs {stated} at its tile, and its graph has "
            f"{computed}: convert again"
        )


def _check_witness(root: Path, manifest: Manifest, bucket: LengthBucket, witness: Witness) -> None:
    pairs = [(spec, witness.inputs[spec.name]) for spec in manifest.inputs]
    pairs += [(spec, witness.outputs[spec.name]) for spec in manifest.outputs]
    rows = {len(array) if array.ndim else 0 for _, array in pairs}
    whole = [(spec.with_rows(max(rows), manifest.sizes(bucket)), a) for spec, a in pairs]
    fits = all((s.shape, s.dtype) == (array.shape, array.dtype) for s, array in whole)
    if not fits or len(rows) > 1 or rows == {0}:
        raise BundleError(
            f"{root} has a witness of {sorted(rows)} rows that does not fit its signature, and so "
            f"proves nothing: convert again"
        )


def _dump(manifest: Manifest) -> str:
    document: dict[str, Any] = dataclasses.asdict(manifest)
    document["format_version"] = FORMAT_VERSION
    for weight in document["weights"]:
        # Readers of before know no names of axes, and read a bundle that has none.
        if weight["axes"] is None:
            del weight["axes"]
    # Through JSON once, so that what is digested is what a reader will have parsed.
    document = json.loads(json.dumps(document))
    return json.dumps(document | {"digest": _canonical_digest(document)}, indent=1)


def _canonical_digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
