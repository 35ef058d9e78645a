"""The bundle: one converted model version on disk, and all that a server needs.

A bundle is a directory `NAME/VERSION/`:

    manifest.json      what it is: signature, tile, quantization, and the sha256 of every file
    graph.stablehlo    the SERVE forward at the tile, from `jax.export`; weights are arguments
    weights/           an Orbax checkpoint of those arguments
    witness/           an Orbax checkpoint of inputs and of the training forward's outputs

It is written under a temporary name and renamed, so that a reader sees a whole bundle or none.
Loading runs no code from it: the graph is StableHLO, the arrays are plain, and nothing is pickled.
A bundle whose content has changed in any byte is refused. The digests guard against damage and
careless edits, not against someone who rewrites the whole bundle: who may write it is the file
system's business.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pydantic
from jax import export

from aqt_engine.manifest import BATCH as BATCH
from aqt_engine.manifest import MANIFEST_FORM, FileDigest
from aqt_engine.manifest import Manifest as Manifest
from aqt_engine.manifest import Role as Role
from aqt_engine.manifest import TensorSpec as TensorSpec
from aqt_engine.manifest import WeightSpec as WeightSpec

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_GRAPH = "graph.stablehlo"
_WEIGHTS = "weights"
_WITNESS = "witness"

Arrays = Mapping[str, np.ndarray[Any, Any]]


class BundleError(ValueError):
    """A bundle cannot be read: it is missing, damaged, changed, or of another format."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """Inputs, and what the training forward answered to them at the bundle's tile.

    Each array has the same number of rows, a multiple of the tile.
    """

    inputs: Arrays
    outputs: Arrays


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle in memory. `weights` stand in the manifest's order."""

    manifest: Manifest
    graph: export.Exported
    weights: tuple[np.ndarray[Any, Any], ...]
    witness: Witness


def write(
    path: str | os.PathLike[str],
    *,
    graph: export.Exported,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    tile: int,
    weights: Mapping[str, np.ndarray[Any, Any]],
    roles: Mapping[str, Role],
    float_nbytes: int,
    tools: Mapping[str, str],
    witness: Witness,
    check: Callable[[Bundle], None] = lambda written: None,
) -> Manifest:
    """Writes a bundle at `path`, whole or not at all, and returns its manifest.

    `graph` takes the flat list of `weights`, in their order, then the flat list of inputs, each of
    `tile` rows, and returns the flat list of outputs. `check` is given the bundle as a reader will
    load it, before it becomes visible; what it raises leaves nothing behind.

    Raises:
      FileExistsError: something already stands at `path`; a version is never overwritten.
    """
    target = Path(path).absolute()
    if target.exists():
        raise FileExistsError(
            f"{target} already exists, and a served version never changes: "
            f"write to a new version number, or remove it first"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # A leading dot and no number: no repository takes it for a version.
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.writing"
    temporary.mkdir()
    try:
        (temporary / _GRAPH).write_bytes(graph.serialize())
        _save_arrays(temporary / _WEIGHTS, weights)
        _save_arrays(
            temporary / _WITNESS,
            {f"inputs/{k}": v for k, v in witness.inputs.items()}
            | {f"outputs/{k}": v for k, v in witness.outputs.items()},
        )
        manifest = Manifest(
            inputs=inputs,
            outputs=outputs,
            tile=tile,
            weights=tuple(
                WeightSpec(name=k, dtype=v.dtype.name, shape=v.shape, role=roles[k])
                for k, v in weights.items()
            ),
            float_nbytes=float_nbytes,
            platforms=tuple(graph.platforms),
            tools=tools,
            files={name: _digest(temporary / name) for name in _files(temporary)},
        )
        (temporary / _MANIFEST).write_text(_dump(manifest))
        check(load(temporary))
        _sync(temporary)
        try:
            temporary.rename(target)
        except OSError as error:
            raise FileExistsError(f"{target} was written by another meanwhile") from error
        _sync_entry(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the bundle at `path`, its own digest checked, the other files not yet.

    Raises:
      BundleError: there is none, it is not a manifest, it was changed, or its format is another.
    """
    file = Path(path) / _MANIFEST
    try:
        text = file.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path} is not a bundle: its {_MANIFEST} cannot be read ({error.strerror}); "
            f"`aqt convert` writes one"
        ) from error
    try:
        document = json.loads(text)
        version = document["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BundleError(f"{file} is damaged: it is no JSON manifest; convert again") from error
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has bundle format {version!r} and this program reads {FORMAT_VERSION}: "
            f"use a newer aqt, or write it again with `aqt convert`"
        )
    stated = document.pop("digest", None)
    if stated != _canonical_digest(document):
        raise BundleError(
            f"{file} was changed after conversion: its digest does not fit its content; "
            f"convert again"
        )
    del document["format_version"]
    try:
        return MANIFEST_FORM.validate_json(json.dumps(document))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"{file} is no manifest of format {FORMAT_VERSION}: {where}: {first['msg']}; "
            f"convert again"
        ) from error


def load(path: str | os.PathLike[str]) -> Bundle:
    """The bundle at `path`, every file checked against the manifest.

    Raises:
      BundleError: a file is missing, unlisted, truncated or changed, or cannot be decoded.
    """
    root = Path(path)
    manifest = read_manifest(root)
    _check_files(root, manifest)
    try:
        graph = export.deserialize(bytearray((root / _GRAPH).read_bytes()))
        weights = _load_arrays(root / _WEIGHTS)
        arrays = _load_arrays(root / _WITNESS)
        witness = Witness(
            inputs={spec.name: arrays[f"inputs/{spec.name}"] for spec in manifest.inputs},
            outputs={spec.name: arrays[f"outputs/{spec.name}"] for spec in manifest.outputs},
        )
        ordered = tuple(weights[spec.name] for spec in manifest.weights)
    except Exception as error:
        raise BundleError(
            f"{root} has the right digests but cannot be decoded by jax {jax.__version__} "
            f"(it was written with {dict(manifest.tools)}): {error}"
        ) from error
    _check_graph(root, manifest, graph)
    _check_witness(root, manifest, witness)
    return Bundle(manifest=manifest, graph=graph, weights=ordered, witness=witness)


def _save_arrays(path: Path, arrays: Arrays) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, dict(arrays))


def _load_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with ocp.StandardCheckpointer() as checkpointer:
        return {k: np.asarray(v) for k, v in checkpointer.restore(path.absolute()).items()}


def _files(root: Path) -> list[str]:
    return sorted(
        file.relative_to(root).as_posix()
        for file in root.rglob("*")
        # A link is no directory of ours, whatever it leads to.
        if (file.is_symlink() or not file.is_dir()) and file != root / _MANIFEST
    )


def _digest(file: Path) -> FileDigest:
    # A pipe that nobody writes to would be waited for, for ever.
    if not file.is_file():
        raise OSError(0, "it is no regular file")
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileDigest(sha256=sha256, nbytes=file.stat().st_size)


def _check_files(root: Path, manifest: Manifest) -> None:
    present = set(_files(root))
    wrong = [f"{name} is missing" for name in sorted(set(manifest.files) - present)]
    wrong += [f"{name} is not listed" for name in sorted(present - set(manifest.files))]
    for name in sorted(present & set(manifest.files)):
        try:
            expected, found = manifest.files[name], _digest(root / name)
        except OSError as error:
            wrong.append(f"{name} cannot be read ({error.strerror})")
            continue
        if found.nbytes != expected.nbytes:
            wrong.append(f"{name} has {found.nbytes} bytes instead of {expected.nbytes}")
        elif found != expected:
            wrong.append(f"{name} has other content than was written")
    if wrong:
        raise BundleError(
            f"{root} does not match its manifest: {'; '.join(wrong)}; copy it again from its "
            f"source or convert again"
        )


def _check_graph(root: Path, manifest: Manifest, graph: export.Exported) -> None:
    def described(shape: Sequence[Any], dtype: Any) -> str:
        return f"{np.dtype(dtype).name}{list(shape)}"

    rows = [spec.with_rows(manifest.tile) for spec in (*manifest.inputs, *manifest.outputs)]
    stated = [described(w.shape, w.dtype) for w in manifest.weights]
    stated += [described(spec.shape, spec.dtype) for spec in rows]
    computed = [described(a.shape, a.dtype) for a in (*graph.in_avals, *graph.out_avals)]
    if stated != computed or len(manifest.outputs) != len(graph.out_avals):
        raise BundleError(
            f"{root} states weights, inputs and outputs {stated} at its tile, and its graph has "
            f"{computed}: convert again"
        )


def _check_witness(root: Path, manifest: Manifest, witness: Witness) -> None:
    pairs = [(spec, witness.inputs[spec.name]) for spec in manifest.inputs]
    pairs += [(spec, witness.outputs[spec.name]) for spec in manifest.outputs]
    rows = {len(array) if array.ndim else 0 for _, array in pairs}
    whole = [(spec.with_rows(max(rows)), array) for spec, array in pairs]
    fits = all((s.shape, s.dtype) == (array.shape, array.dtype) for s, array in whole)
    if not fits or len(rows) > 1 or rows == {0}:
        raise BundleError(
            f"{root} has a witness of {sorted(rows)} rows that does not fit its signature, and so "
            f"proves nothing: convert again"
        )


def _dump(manifest: Manifest) -> str:
    document = {"format_version": FORMAT_VERSION} | dataclasses.asdict(manifest)
    # Through JSON once, so that what is digested is what a reader will have parsed.
    document = json.loads(json.dumps(document))
    return json.dumps(document | {"digest": _canonical_digest(document)}, indent=1)


def _canonical_digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(root: Path) -> None:
    """Puts every file on the disk before the rename makes the bundle visible."""
    for path in [*root.rglob("*"), root]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
