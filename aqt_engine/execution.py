"""Running a bundle's graph: always at its tile, whatever the number of rows.

A float sum over a row changes in its last bit with the shape of the batch it is computed in, and
the next quantizer can turn that bit into another integer. So the graph is compiled at one fixed
number of rows, the tile, and a batch is `lax.map` of that one body over tiles: a row meets the
same instructions wherever it lies. How many tiles an executable maps over is its bucket; buckets
are powers of two. A model whose signature has symbolic dimensions has a graph, and executables, for
each of their length buckets.

On a CPU a batch is cut into pieces, which its cores compute at the same time, each in the thread
that takes it (`pieces`, `calling_thread`): an executable maps over the tiles of a piece there.

Mode FAST gives that up for speed: the whole padded batch is computed at once, and a row's bits may
depend on how many rows that has.

On a CPU, int8 contractions with weights are computed by a kernel, where there is one (`kernels`),
and weights are kept as it reads them.

In mode EXACT a program may have several devices (`layout`): copies of it, each of which takes its
share of the tiles, and shards of the weights of each. They compute without the kernel. Where the
devices are those of several processes of JAX's, each of them makes the same program and calls it
with the same inputs in the same order, and each has the whole answer.
"""

import contextlib
import enum
import itertools
import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from jax import export, lax

from aqt_engine import batches, calling_thread, heap, lengths, pieces, spreading
from aqt_engine.batches import Array, Arrays, At, Batches
from aqt_engine.bundle import Bundle, BundleError
from aqt_engine.kernels import library
from aqt_engine.layout import Layout
from aqt_engine.manifest import LengthBucket
from aqt_engine.pieces import Cut
from aqt_engine.placement import Packed as Packed
from aqt_engine.placement import placed
from aqt_engine.restoration import check_restored, stand_in
from aqt_engine.spreading import Forward

if TYPE_CHECKING:
    from aqt_engine.kernels.substitution import Substituted

Outputs = dict[str, Array]
Executable = Callable[..., Sequence[jax.Array]]
_Run = Callable[[Arrays, int, At], Outputs]
"""The outputs for inputs of so many rows, padded to a length bucket, in so many tiles."""
Cuts = Mapping[LengthBucket, Cut]
_NAME = "forward"
"""Of what is compiled."""
_LEAST_MEMORY = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}
"""Compiler options, by platform, where XLA has to be told to keep little at once."""


class Mode(enum.StrEnum):
    """What the rows of a batch are computed for: always the same bits, or speed."""

    EXACT = "exact"
    FAST = "fast"


def tile_buckets(max_rows: int, tile: int, layout: Layout = Layout()) -> tuple[int, ...]:
    """Numbers of tiles to compile for, so that `max_rows` rows fit: powers of two.

    The first is one tile for each copy.
    """
    tiles = math.ceil(max_rows / tile / layout.copies)
    last = max(0, math.ceil(math.log2(max(1, tiles))))
    return tuple(layout.copies * 2**i for i in range(last + 1))


class Program:
    """A bundle's weights on a device, and its executables by length bucket and tiles.

    Calling it is thread-safe, and in mode EXACT exact: each row's answer has the same bits for
    every number of rows, every position and every neighbor. In this mode contractions are computed
    by the int8 kernel where it can, unless `kernel` is False or `layout` is of several devices.

    With `packed` and `cuts`, as another program of the same bundle had them, there are no graphs to
    compile: all executables have to be restored.

    Raises:
      BundleError: the bundle was lowered for other platforms, or has no graph for mode FAST.
      ValueError: `AQT_KERNELS` asks for a kernel that is not there; or there are fewer devices than
        the layout takes, or it is of several in mode FAST.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_rows: int,
        mode: Mode = Mode.EXACT,
        kernel: bool = True,
        layout: Layout = Layout(),
        packed: Packed | None = None,
        cuts: Cuts | None = None,
    ):
        platform = jax.default_backend()
        lowered_for = {"gpu": "cuda"}.get(platform, platform)
        if lowered_for not in bundle.manifest.platforms:
            raise BundleError(
                f"this bundle was lowered for {', '.join(bundle.manifest.platforms)} and the "
                f"device here is {lowered_for}: convert again with that platform"
            )
        self.manifest = bundle.manifest
        self.mode = mode
        if mode is Mode.FAST and layout.devices > 1:
            raise ValueError("mode fast computes on one device: lay it out on one")
        self._buckets = tile_buckets(max_rows, bundle.manifest.tile, layout)
        self.max_rows = self._buckets[-1] * bundle.manifest.tile
        """Rows of the largest batch; more are computed in several."""
        self._mesh = layout.mesh() if layout.devices > 1 else None
        self._in_calling_thread = self._mesh is None and calling_thread.is_possible()
        self._graphs: dict[LengthBucket, export.Exported] = {}
        if packed is None:
            kernel = kernel and mode is Mode.EXACT and self._mesh is None
            made = _graphs(bundle, mode, kernel, layout)
            self._graphs = {bucket: each.graph for bucket, each in made.items()}
            packed = {bucket: each.packed for bucket, each in made.items()}
        self.packed = packed
        """The weights that are kept packed, for a program that is restored."""
        self.kernel = library.instruction_set() if any(packed.values()) else None
        """The instruction set of the kernel that computes contractions; None if XLA does all."""
        self._places = [
            self._mesh and (spec.shape, layout.of_weight(self._mesh, spec))
            for spec in bundle.manifest.weights
        ]
        self._batches = Batches(bundle.manifest, in_tiles=mode is Mode.EXACT)
        self._executables: dict[At, Executable] = {}
        self._gathering: dict[LengthBucket, Executable] = {}
        self.workspace_nbytes = 0
        """Bytes beside the weights that the hungriest batch of what is compiled takes."""
        self._compiling = threading.Lock()
        self.cuts = cuts or {}
        """How batches of each length bucket are cut into pieces."""
        self._weights = self._placed(bundle)
        if cuts is None:
            self.cuts = {of: self._cut(of) for of in bundle.manifest.length_buckets}

    @contextlib.contextmanager
    def set_aside(self, bundle: Bundle) -> Generator[None]:
        """Gives back the memory of the weights, those of `bundle`, and reads them again at the end.

        The program is not called meanwhile.
        """
        self._weights = {}
        heap.give_back()
        try:
            yield
        finally:
            heap.give_back()
            self._weights = self._placed(bundle)

    def _placed(self, bundle: Bundle) -> dict[LengthBucket, list[jax.Array]]:
        """The weights of `bundle`, as the executables take them."""
        with self._chosen():
            return placed(bundle.weights, self._places, self.packed)

    def _chosen(self) -> contextlib.AbstractContextManager[Any]:
        """Within it this thread places and lowers for the device that computes."""
        return calling_thread.chosen() if self._in_calling_thread else contextlib.nullcontext()

    def _cut(self, length_bucket: LengthBucket) -> Cut:
        if self.mode is Mode.FAST or not self._in_calling_thread:
            return pieces.whole(self._buckets)
        nbytes = pieces.nbytes_accessed(self._lowered_graph(1, length_bucket))
        return pieces.cut(nbytes, self._buckets[-1], pieces.threads())

    def sizes(self, length_bucket: LengthBucket = ()) -> tuple[int, ...]:
        """The numbers of tiles that there are executables for, ascending."""
        return self.cuts[length_bucket].sizes

    def compile(self, size: int, length_bucket: LengthBucket = ()) -> None:
        """Compiles the executable for `size` tiles, unless it is there already."""
        with self._compiling:
            if (at := (length_bucket, size)) not in self._executables:
                compiled = self._compiled(self._lowered_graph(size, length_bucket))
                self._executables[at] = self._measured(compiled, at)
                heap.give_back()

    def restore(self, size: int, length_bucket: LengthBucket = ()) -> None:
        """Takes the executable for `size` tiles from the compilation cache, whatever was there.

        The cache has to be made to give it: JAX asks for a stand-in's (`restoration`). It computes
        the bits of the one that was compiled, as it is the same code. The program is on one device;
        its weights need not be there yet.

        Raises:
          NotRestoredError: the cache gave nothing, or something else.
        """
        batch = self._batches.form(size, length_bucket)
        placeholder = stand_in(
            [jax.ShapeDtypeStruct(of.laid_out, of.dtype) for of in batch.outputs]
        )
        packed = self.packed[length_bucket]
        weights = [
            jax.ShapeDtypeStruct((packing.nbytes(spec.shape),), np.int8)
            if (packing := packed.get(i))
            else jax.ShapeDtypeStruct(spec.shape, spec.dtype)
            for i, spec in enumerate(self.manifest.weights)
        ]
        found = self._compiled(self._lowered(placeholder, weights, batch))
        check_restored(found, _NAME)
        with self._compiling:
            self._executables[length_bucket, size] = found

    def _compiled(self, lowered: Any) -> Any:
        if self._in_calling_thread:
            return calling_thread.compiled(lowered)
        return lowered.compile()

    def _lowered_graph(self, size: int, length_bucket: LengthBucket) -> Any:
        batch = self._batches.form(size, length_bucket)
        graph = self._graphs[length_bucket]

        def forward(weights: Sequence[jax.Array], inputs: Sequence[jax.Array]) -> list[jax.Array]:
            def at_once(rows: Sequence[jax.Array]) -> list[jax.Array]:
                return list(graph.call(weights, rows))

            if self.mode is Mode.FAST:
                return at_once(inputs)
            return cast(list[jax.Array], lax.map(at_once, inputs))

        forward.__name__ = _NAME
        return self._lowered(forward, self._weights[length_bucket], batch)

    def _compiled_to_gather(self, length_bucket: LengthBucket) -> Executable:
        with self._compiling:
            if length_bucket not in self._gathering:
                graph = self._graphs[length_bucket]

                def forward(
                    weights: Sequence[jax.Array], inputs: Sequence[jax.Array]
                ) -> list[jax.Array]:
                    return [y[None] for y in graph.call(weights, [x[0] for x in inputs])]

                batch = self._batches.form(self._buckets[0], length_bucket)
                weights = self._weights[length_bucket]
                lowered = self._lowered(forward, weights, batch, gathered=True)
                self._gathering[length_bucket] = lowered.compile(
                    compiler_options=_LEAST_MEMORY.get(jax.default_backend())
                )
                heap.give_back()
            return self._gathering[length_bucket]

    def _measured(self, compiled: Any, at: At) -> Executable:
        length_bucket, size = at
        if told := compiled.memory_analysis():
            taken = (
                told.argument_size_in_bytes + told.output_size_in_bytes + told.temp_size_in_bytes
            )
            weights = self._weights[length_bucket]
            beside = taken - sum(_nbytes_of_one(w) for w in weights)
            largest = self._buckets[-1]
            at_once = min(self.cuts[length_bucket].threads, math.ceil(largest / size))
            answer = self._batches.form(largest, length_bucket).outputs if at_once > 1 else ()
            together = at_once * beside + sum(of.nbytes for of in answer)
            self.workspace_nbytes = max(self.workspace_nbytes, together)
        return compiled

    def _lowered(
        self,
        forward: Forward,
        weights: Sequence[jax.Array | jax.ShapeDtypeStruct],
        batch: batches.Form,
        *,
        gathered: bool = False,
    ) -> Any:
        if self._mesh is not None:
            return spreading.lowered(forward, weights, batch, self._mesh, gathered=gathered)
        structs = [jax.ShapeDtypeStruct(of.laid_out, of.dtype) for of in batch.inputs]
        with self._chosen():
            # With what a graph does not use too, so that all of one signature are called alike.
            return jax.jit(forward, keep_unused=True).lower(weights, structs)

    def __call__(self, inputs: Arrays) -> Outputs:
        """The outputs for `inputs`: by name, each of shape (rows, ...), the same rows for all.

        Symbolic dimensions are padded to their bucket, and cut back in the outputs. More rows than
        the largest batch holds are computed in several; what was not compiled yet is compiled now.

        Raises:
          ValueError: the inputs are not those of the signature, in names, dtypes or shapes, or
            too long.
        """
        return self._in_pieces(inputs, self.cuts, self._piece)

    def gathered(self, inputs: Arrays) -> Outputs:
        """What a program over several shards has to answer, computed of whole weights.

        It takes one tile for each copy at a time. A device gathers the parts of a weight when that
        is contracted: it holds its own shards, and beside them few weights whole.

        Raises:
          ValueError: as of a call.
        """
        cut = pieces.whole(self._buckets[:1])
        cuts = dict.fromkeys(self.manifest.length_buckets, cut)
        return self._in_pieces(inputs, cuts, self._gathered_piece)

    def _in_pieces(self, inputs: Arrays, cuts: Cuts, run: _Run) -> Outputs:
        """The outputs for `inputs`, of whose pieces, cut as `cuts` say, each is run by itself."""
        rows, lengths_of_inputs = self._batches.checked(inputs)
        length_bucket = lengths.smallest(self.manifest, lengths_of_inputs)
        if lengths_of_inputs:
            inputs = lengths.pad(self.manifest, inputs, length_bucket)
        tile, cut = self.manifest.tile, cuts[length_bucket]
        sizes = cut.pieces(math.ceil(rows / tile))
        if len(sizes) == 1:
            outputs = run(inputs, rows, (length_bucket, sizes[0]))
        else:
            ends = [tile * tiles for tiles in itertools.accumulate(sizes)]
            outputs = self._batches.empty(rows, length_bucket)

            def piece(number: int) -> None:
                size = sizes[number]
                of = slice(ends[number] - size * tile, min(rows, ends[number]))
                part = {name: array[of] for name, array in inputs.items()}
                answer = run(part, of.stop - of.start, (length_bucket, size))
                for name, array in answer.items():
                    outputs[name][of] = array

            pieces.compute(piece, len(sizes), cut.threads)
        if lengths_of_inputs:
            outputs = lengths.cut(self.manifest, outputs, lengths_of_inputs)
        return outputs

    def _piece(self, inputs: Arrays, rows: int, at: At) -> Outputs:
        length_bucket, size = at
        if at not in self._executables:
            self.compile(size, length_bucket)
        return self._run(self._executables[at], inputs, rows, at)

    def _gathered_piece(self, inputs: Arrays, rows: int, at: At) -> Outputs:
        return self._run(self._compiled_to_gather(at[0]), inputs, rows, at)

    def _run(self, executable: Executable, inputs: Arrays, rows: int, at: At) -> Outputs:
        length_bucket, size = at
        batch = self._batches.form(size, length_bucket)
        filled = batch.filled(inputs, rows)
        given = spreading.given(filled, self._mesh) if self._mesh else filled
        answers = executable(self._weights[length_bucket], given)
        return {
            tensor.name: np.asarray(answer).reshape(tensor.shape)[:rows]
            for tensor, answer in zip(batch.outputs, answers, strict=True)
        }


def _graphs(
    bundle: Bundle, mode: Mode, kernel: bool, layout: Layout
) -> "dict[LengthBucket, Substituted]":
    """The bundle's graphs for this mode and these devices, which call the kernel if they may."""
    # A restart needs no graphs, and so nothing of JAX's that changes them.
    from aqt_engine.kernels.substitution import Substituted, substituted
    from aqt_engine.replication import replicating

    graphs = bundle.graphs if mode is Mode.EXACT else bundle.batched
    if not graphs:
        why = bundle.manifest.not_batched
        raise BundleError(
            "this bundle has no graph for any number of rows, which mode fast needs: its model "
            f"cannot be traced so{f' ({why})' if why else ''}; serve it in mode exact, or let "
            "the model read its number of rows from a shape and convert again"
        )
    if layout.shards > 1:
        graphs = {bucket: replicating(graph, layout) for bucket, graph in graphs.items()}
    return {
        bucket: substituted(graph, len(bundle.weights)) if kernel else Substituted(graph=graph)
        for bucket, graph in graphs.items()
    }


def _nbytes_of_one(array: jax.Array) -> int:
    """Bytes that one device has of `array`. Asked by shards, it would be kept in a cycle."""
    shape = array.sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize
