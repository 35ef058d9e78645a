"""The proof that a program is exact: which trials there are, over every bucket.

The witness comes first, in every executable; that much is proved before anything is answered.
More inputs than the witness has can be tried against a reference that computes them tile by tile:
the training forward, or else the bundle's own graph.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine import heap, lengths, witness
from aqt_engine.bundle import Arrays, Bundle, Witness
from aqt_engine.execution import Program
from aqt_engine.manifest import LengthBucket, Manifest, bucket_name
from aqt_engine.witness import Verdict

Array = np.ndarray[Any, Any]
Reference = Callable[[LengthBucket, Arrays], Arrays]
"""The outputs for inputs of whole tiles at a length bucket, computed tile by tile."""
Trial = tuple[str, Verdict]
NamedForward = Callable[[Any, Mapping[str, Any]], dict[str, jax.Array]]
"""Outputs by name, of variables and of inputs by name."""
_SEED = 0


def of_witnesses(
    program: Callable[[Arrays], Arrays],
    manifest: Manifest,
    witnesses: Mapping[LengthBucket, Witness],
    *,
    rows: int,
) -> Iterator[Trial]:
    """Every witness in every manner, repeated to at least `rows`; each executable's batch first."""
    repeated = {bucket: witness.at_least(w, rows) for bucket, w in witnesses.items()}
    runs = {bucket: witness.trials(program, w) for bucket, w in repeated.items()}
    # A batch of each power of two: what proves an executable comes before what tries it harder.
    for bucket, w in repeated.items():
        for _ in range(_rows(w.inputs).bit_length()):
            yield _at(manifest, bucket, next(runs[bucket]))
    for bucket, run in runs.items():
        for trial in run:
            yield _at(manifest, bucket, trial)


def executables(manifest: Manifest, witnesses: Mapping[LengthBucket, Witness], rows: int) -> int:
    """How many of the first trials of `of_witnesses` it takes to run every executable."""
    return sum(_rows(witness.at_least(w, rows).inputs).bit_length() for w in witnesses.values())


def trials(manifest: Manifest, witnesses: Mapping[LengthBucket, Witness], rows: int) -> int:
    """How many trials `of_witnesses` and `of_random_inputs` make together."""
    neighbors = len(witness.NEIGHBORS)
    fixed = 3 + 2 * neighbors

    def in_bucket(w: Witness) -> int:
        of_witness = _rows(witness.at_least(w, rows).inputs).bit_length() + fixed
        return of_witness + rows.bit_length() + fixed + 1 + neighbors + bool(manifest.lengths)

    return sum(map(in_bucket, witnesses.values()))


def of_random_inputs(
    program: Program,
    reference: Reference,
    witnesses: Mapping[LengthBucket, Witness],
    *,
    seed: int = _SEED,
) -> Iterator[Trial]:
    """Random inputs like the witness's, in every bucket, shuffled, and beside any neighbors.

    Rows of each length are tried too, as requests, and batches whose padding is full of what
    could disturb a row.
    """
    manifest = program.manifest
    for bucket, w in witnesses.items():
        rng = np.random.default_rng(seed)
        inputs = sampled(w.inputs, program.max_rows, rng)
        requests = _requests(manifest, bucket, inputs, rng) if manifest.lengths else []
        # At once: what computes it may take the place of the program.
        drawn, *expected = _answered(reference, manifest, bucket, [inputs, *requests])
        for trial, verdict in witness.trials(program, drawn):
            yield _at(manifest, bucket, (f"random inputs, {trial}", verdict))
        order = rng.permutation(program.max_rows)
        shuffled = {k: v[order] for k, v in inputs.items()}
        outputs = {k: v[order] for k, v in drawn.outputs.items()}
        verdict = witness.compare(program(shuffled), outputs)
        yield _at(manifest, bucket, ("random inputs, with the rows shuffled", verdict))
        for neighbor in witness.NEIGHBORS:
            yield _at(manifest, bucket, _beside_padding(program, drawn, neighbor))
        if manifest.lengths:
            yield _at(manifest, bucket, _shorter(program, expected))


def sampled(inputs: Arrays, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    """Random rows like those of `inputs`: floats of their spread, integers of their range."""

    def like(array: Array) -> Array:
        shape = (rows, *array.shape[1:])
        if array.dtype.kind == "b":
            return rng.integers(0, 2, shape).astype(bool)
        if array.dtype.kind in "iu":
            low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
            return rng.integers(low, high, shape, dtype=array.dtype.type, endpoint=True)
        wide = array.astype(np.float64)
        finite = wide[np.isfinite(wide)]
        center, spread = (finite.mean(), finite.std()) if finite.size else (0.0, 1.0)
        return (center + (spread or 1.0) * rng.standard_normal(shape)).astype(array.dtype)

    return {name: like(array) for name, array in inputs.items()}


def tile_by_tile(bundle: Bundle) -> Reference:
    """The bundle's graph, run on one tile after the other, each row where it lies."""
    manifest = bundle.manifest
    shapes = [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in manifest.weights]

    @functools.cache
    def compiled(bucket: LengthBucket) -> Callable[..., Sequence[jax.Array]]:
        rows = [s.with_rows(manifest.tile, manifest.sizes(bucket)) for s in manifest.inputs]
        return jax.jit(bundle.graphs[bucket].call).lower(shapes, rows).compile()

    def reference(bucket: LengthBucket, inputs: Arrays) -> Arrays:
        run = compiled(bucket)
        heap.give_back()
        # Read for this call, after the compiler's memory is free again, and not kept.
        weights = [jax.device_put(weight) for weight in bundle.weights]

        def at_tile(weights: Any, rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            answers = run(weights, [rows[spec.name] for spec in manifest.inputs])
            return {s.name: a for s, a in zip(manifest.outputs, answers, strict=True)}

        return in_tiles(at_tile, weights, inputs, manifest.tile)

    return reference


def of_training(forward: NamedForward, variables: Any, tile: int) -> Reference:
    """R: the training forward, compiled here at the tile and at each length bucket."""
    compiled = jax.jit(forward)

    def reference(bucket: LengthBucket, inputs: Arrays) -> Arrays:
        return in_tiles(compiled, variables, inputs, tile)

    return reference


def in_tiles(forward: NamedForward, variables: Any, inputs: Arrays, tile: int) -> dict[str, Array]:
    """The outputs for `inputs`, of whole tiles, of a forward that is called tile by tile."""
    answers = [
        forward(
            variables, {name: jnp.asarray(a[start : start + tile]) for name, a in inputs.items()}
        )
        for start in range(0, _rows(inputs), tile)
    ]
    return {name: np.concatenate([np.asarray(a[name]) for a in answers]) for name in answers[0]}


def _beside_padding(program: Program, drawn: Witness, neighbor: str) -> Trial:
    rows = np.arange(_rows(drawn.inputs))
    real = len(rows) // 2 + 1
    inputs = {k: witness.overwritten(v, rows[real:], neighbor) for k, v in drawn.inputs.items()}
    verdict = witness.compare(
        {k: v[:real] for k, v in program(inputs).items()},
        {k: v[:real] for k, v in drawn.outputs.items()},
    )
    return f"random inputs, with {neighbor} in the padding", verdict


def _requests(
    manifest: Manifest, bucket: LengthBucket, inputs: Arrays, rng: np.random.Generator
) -> list[Arrays]:
    """Requests of a tile each, of the rows of `inputs` cut to random lengths of this bucket."""
    found: list[Arrays] = []
    for start in range(0, _rows(inputs), manifest.tile):
        sizes = {
            name: int(rng.integers(_next_shorter(manifest.lengths[name], size), size) + 1)
            for name, size in manifest.sizes(bucket).items()
        }
        found.append(
            {
                spec.name: inputs[spec.name][start : start + manifest.tile][
                    tuple(
                        slice(sizes[spec.axes[i]] if i in spec.axes else None)
                        for i in range(len(spec.shape))
                    )
                ]
                for spec in manifest.inputs
            }
        )
    return found


def _answered(
    reference: Reference, manifest: Manifest, bucket: LengthBucket, requests: Sequence[Arrays]
) -> list[Witness]:
    """Requests of whole tiles with their answers, which are of their own lengths."""
    padded = requests
    if manifest.lengths:
        padded = [lengths.pad(manifest, request, bucket) for request in requests]
    together = {name: np.concatenate([r[name] for r in padded]) for name in padded[0]}
    outputs = reference(bucket, together)
    answered: list[Witness] = []
    start = 0
    for request in requests:
        end = start + _rows(request)
        answer: Arrays = {name: array[start:end] for name, array in outputs.items()}
        if manifest.lengths:
            answer = lengths.cut(manifest, answer, lengths.lengths_of(manifest, request))
        answered.append(Witness(inputs=request, outputs=answer))
        start = end
    return answered


def _shorter(program: Program, requests: Sequence[Witness]) -> Trial:
    # Flat, as requests of several lengths cannot stand in one array.
    found, expected = (
        {name: np.concatenate([part[name].ravel() for part in parts]) for name in parts[0]}
        for parts in ([program(w.inputs) for w in requests], [w.outputs for w in requests])
    )
    return "random inputs, at random lengths", witness.compare(found, expected)


def _next_shorter(sizes: tuple[int, ...], size: int) -> int:
    return max((s for s in sizes if s < size), default=0)


def _at(manifest: Manifest, bucket: LengthBucket, trial: Trial) -> Trial:
    name, verdict = trial
    sizes = manifest.sizes(bucket)
    return (f"at {bucket_name(sizes)}, {name}" if sizes else name), verdict


def _rows(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))
