"""Running a bundle's graph: always at its tile, whatever the number of rows.

A float sum over a row changes in its last bit with the shape of the batch it is computed in, and
the next quantizer can turn that bit into another integer. So the graph is compiled at one fixed
number of rows, the tile, and a batch is `lax.map` of that one body over tiles: a row meets the
same instructions wherever it lies. How many tiles an executable maps over is its bucket; buckets
are powers of two. A model whose signature has symbolic dimensions has a graph, and executables, for
each of their length buckets.

Mode FAST gives that up for speed: the whole padded batch is computed at once, and a row's bits may
depend on how many rows that has.

On a CPU, int8 contractions with weights are computed by a kernel, where there is one (`kernels`),
and weights are kept as it reads them; what is quick is computed in the thread that calls it
(`calling_thread`).

In mode EXACT a program may have several devices (`layout`): copies of it, each of which takes its
share of the tiles, and shards of the weights of each. They compute without the kernel. Where the
devices are those of several processes of JAX's, each of them makes the same program and calls it
with the same inputs in the same order, and each has the whole answer.
"""

import contextlib
import enum
import math
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from jax import export, lax
from jax.sharding import NamedSharding, PartitionSpec

from aqt_engine import batches, calling_thread, heap, lengths
from aqt_engine.batches import Array, Arrays, At, Batches
from aqt_engine.bundle import Bundle, BundleError
from aqt_engine.calling_thread import Executable, Quick
from aqt_engine.kernels import library
from aqt_engine.layout import COPIES, Layout
from aqt_engine.manifest import LengthBucket
from aqt_engine.placement import Packed as Packed
from aqt_engine.placement import placed
from aqt_engine.restoration import check_restored, stand_in

if TYPE_CHECKING:
    from aqt_engine.kernels.substitution import Substituted

Outputs = dict[str, Array]
_Computed = Callable[[int, LengthBucket, Sequence[Array | jax.Array]], Sequence[jax.Array]]
"""Outputs by tiles, length bucket and inputs."""
_NAME = "forward"
"""Of what is compiled."""
_JOINED = 8
"""About how many times less is read and written where XLA has joined operations."""
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
    """A bundle's weights on a device, and its executables by bucket.

    Calling it is thread-safe, and in mode EXACT exact: each row's answer has the same bits for
    every number of rows, every position and every neighbor. In this mode contractions are computed
    by the int8 kernel where it can, unless `kernel` is False or `layout` is of several devices.

    With `packed`, as another program of the same bundle had it, there are no graphs to compile: all
    executables have to be restored.

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
        self.buckets = tile_buckets(max_rows, bundle.manifest.tile, layout)
        self._mesh = layout.mesh() if layout.devices > 1 else None
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
        self._quick = Quick(spread=self._mesh is not None)
        self._gathering: dict[LengthBucket, Executable] = {}
        self.workspace_nbytes = 0
        """Bytes beside the weights that the hungriest of the compiled executables computes in."""
        self._compiling = threading.Lock()
        self._weights = self._placed(bundle)

    @contextlib.contextmanager
    def set_aside(self, bundle: Bundle) -> Generator[None]:
        """Gives back the memory of the weights, those of `bundle`, and reads them again at the end.

        The program is not called meanwhile.
        """
        self._weights = {}
        self._quick.drop_weights()
        heap.give_back()
        try:
            yield
        finally:
            heap.give_back()
            self._weights = self._placed(bundle)

    def _placed(self, bundle: Bundle) -> dict[LengthBucket, list[jax.Array]]:
        """The weights of `bundle`, as the executables take them."""
        return placed(bundle.weights, self._places, self.packed)

    @property
    def max_rows(self) -> int:
        """Rows that the largest bucket holds."""
        return self.buckets[-1] * self.manifest.tile

    def compile(self, bucket: int, length_bucket: LengthBucket = ()) -> None:
        """Compiles the executable for `bucket` tiles, unless it is there already."""
        with self._compiling:
            if (at := (length_bucket, bucket)) not in self._executables:
                self._executables[at] = self._compiled(at)
                heap.give_back()

    def in_calling_thread(self, bucket: int, length_bucket: LengthBucket = ()) -> bool:
        """Whether the executable for `bucket` tiles, which is there, computes in that thread."""
        return (length_bucket, bucket) in self._quick

    def _compiled(self, at: At) -> Executable:
        length_bucket, bucket = at
        traced = self._traced_graph(bucket, length_bucket)
        lowered, usual = traced.lower(), None
        if self.mode is Mode.EXACT:
            nbytes = bucket * calling_thread.nbytes_accessed(lowered)
        else:
            # What is for any number of rows can be counted only when it is compiled.
            usual = lowered.compile()
            nbytes = _JOINED * calling_thread.nbytes_accessed(usual)
        if self._quick.find(at, nbytes, self._weights[length_bucket]):
            return self._measured(calling_thread.compiled(traced), length_bucket)
        return self._measured(usual or lowered.compile(), length_bucket)

    def restore(
        self, bucket: int, length_bucket: LengthBucket = (), *, in_calling_thread: bool = False
    ) -> None:
        """Takes the executable for `bucket` tiles from the compilation cache, whatever was there.

        The cache has to be made to give it: JAX asks for a stand-in's (`restoration`). It computes
        the bits of the one that was compiled, as it is the same code. The program is on one device;
        its weights need not be there yet.

        Raises:
          NotRestoredError: the cache gave nothing, or something else.
        """
        batch = self._batches.form(bucket, length_bucket)
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
        traced = self._traced(placeholder, weights, batch)
        found = calling_thread.compiled(traced) if in_calling_thread else traced.lower().compile()
        check_restored(found, _NAME)
        at = length_bucket, bucket
        with self._compiling:
            if in_calling_thread:
                self._quick.add(at)
            self._executables[at] = found

    def _traced_graph(self, bucket: int, length_bucket: LengthBucket) -> Any:
        batch = self._batches.form(bucket, length_bucket)
        graph = self._graphs[length_bucket]

        def forward(weights: list[jax.Array], inputs: list[jax.Array]) -> list[jax.Array]:
            def at_once(rows: list[jax.Array]) -> list[jax.Array]:
                return list(graph.call(weights, rows))

            if self.mode is Mode.FAST:
                return at_once(inputs)
            return cast(list[jax.Array], lax.map(at_once, inputs))

        forward.__name__ = _NAME
        return self._traced(forward, self._weights[length_bucket], batch)

    def _compiled_to_gather(self, bucket: int, length_bucket: LengthBucket) -> Executable:
        with self._compiling:
            if length_bucket not in self._gathering:
                graph = self._graphs[length_bucket]

                def forward(weights: list[jax.Array], inputs: list[jax.Array]) -> list[jax.Array]:
                    return [y[None] for y in graph.call(weights, [x[0] for x in inputs])]

                batch = self._batches.form(bucket, length_bucket)
                weights = self._weights[length_bucket]
                traced = self._traced(forward, weights, batch, gathered=True)
                self._gathering[length_bucket] = traced.lower().compile(
                    compiler_options=_LEAST_MEMORY.get(jax.default_backend())
                )
                heap.give_back()
            return self._gathering[length_bucket]

    def _measured(self, compiled: Any, length_bucket: LengthBucket) -> Executable:
        if told := compiled.memory_analysis():
            taken = (
                told.argument_size_in_bytes + told.output_size_in_bytes + told.temp_size_in_bytes
            )
            weights = self._weights[length_bucket]
            beside = taken - sum(_nbytes_of_one(w) for w in weights)
            self.workspace_nbytes = max(self.workspace_nbytes, beside)
        return compiled

    def _traced(
        self,
        forward: Callable[..., list[jax.Array]],
        weights: Sequence[jax.Array | jax.ShapeDtypeStruct],
        batch: batches.Form,
        *,
        gathered: bool = False,
    ) -> Any:
        """`forward` for the inputs of `batch`, over the devices that there are.

        It is given weights as they are spread, or `gathered`: whole.
        """
        if self._mesh is None:
            structs = [jax.ShapeDtypeStruct(of.laid_out, of.dtype) for of in batch.inputs]
            # With what a graph does not use too, so that all of one signature are called alike.
            return jax.jit(forward, keep_unused=True).trace(weights, structs)
        tiles = PartitionSpec(COPIES)
        sharding = NamedSharding(self._mesh, tiles)
        structs = [
            jax.ShapeDtypeStruct(of.laid_out, of.dtype, sharding=sharding) for of in batch.inputs
        ]
        mapped = jax.shard_map(
            forward,
            mesh=self._mesh,
            in_specs=(PartitionSpec(), tiles),
            out_specs=tiles,
            axis_names={COPIES},
            check_vma=False,
        )
        # A process reads only what lies on its own devices.
        whole = NamedSharding(self._mesh, PartitionSpec())
        read = sharding if jax.process_count() == 1 else whole

        def forward_gathered(weights: list[jax.Array], inputs: list[jax.Array]) -> list[jax.Array]:
            return mapped([lax.with_sharding_constraint(w, whole) for w in weights], inputs)

        laid_out = forward_gathered if gathered else mapped
        return jax.jit(laid_out, out_shardings=read).trace(weights, structs)

    def _given(self, arrays: list[Array]) -> Sequence[Array | jax.Array]:
        """`arrays` as an executable over the devices that there are takes them."""
        if self._mesh is None or jax.process_count() == 1:
            return arrays
        sharding = NamedSharding(self._mesh, PartitionSpec(COPIES))
        return [
            jax.make_array_from_callback(array.shape, sharding, lambda part, a=array: a[part])
            for array in arrays
        ]

    def __call__(self, inputs: Arrays) -> Outputs:
        """The outputs for `inputs`: by name, each of shape (rows, ...), the same rows for all.

        Symbolic dimensions are padded to their bucket, and cut back in the outputs. More rows than
        the largest bucket holds are computed in several calls; a bucket that was not compiled yet
        is compiled now.

        Raises:
          ValueError: the inputs are not those of the signature, in names, dtypes or shapes, or
            too long.
        """
        return self._in_calls(inputs, self.max_rows, self._computed)

    def gathered(self, inputs: Arrays) -> Outputs:
        """What a program over several shards has to answer, computed of whole weights.

        It takes one tile for each copy at a time. A device gathers the parts of a weight when that
        is contracted: it holds its own shards, and beside them few weights whole.

        Raises:
          ValueError: as of a call.
        """
        rows = self.buckets[0] * self.manifest.tile
        return self._in_calls(inputs, rows, self._computed_gathered)

    def _computed(
        self, bucket: int, length_bucket: LengthBucket, inputs: Sequence[Array | jax.Array]
    ) -> Sequence[jax.Array]:
        at = length_bucket, bucket
        if at not in self._executables:
            self.compile(bucket, length_bucket)
        weights: Sequence[jax.Array] = self._weights[length_bucket]
        if at in self._quick:
            weights = self._quick.weights(length_bucket, weights)
        return self._executables[at](weights, inputs)

    def _computed_gathered(
        self, bucket: int, length_bucket: LengthBucket, inputs: Sequence[Array | jax.Array]
    ) -> Sequence[jax.Array]:
        executable = self._compiled_to_gather(bucket, length_bucket)
        return executable(self._weights[length_bucket], inputs)

    def _in_calls(self, inputs: Arrays, most: int, computed: _Computed) -> Outputs:
        """The outputs for `inputs`, of which `most` rows are computed at once."""
        rows, sizes = self._batches.checked(inputs)
        length_bucket = lengths.smallest(self.manifest, sizes)
        if sizes:
            inputs = lengths.pad(self.manifest, inputs, length_bucket)
        if rows <= most:
            outputs = self._run(inputs, rows, length_bucket, computed)
        else:
            starts = range(0, rows, most)
            parts = [{k: x[start : start + most] for k, x in inputs.items()} for start in starts]
            chunks = [
                self._run(part, min(most, rows - start), length_bucket, computed)
                for part, start in zip(parts, starts, strict=True)
            ]
            outputs = {
                name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]
            }
        return lengths.cut(self.manifest, outputs, sizes) if sizes else outputs

    def _run(
        self, inputs: Arrays, rows: int, length_bucket: LengthBucket, computed: _Computed
    ) -> Outputs:
        if rows == 0:
            return self._batches.empty(length_bucket)
        tile = self.manifest.tile
        bucket = next(b for b in self.buckets if b * tile >= rows)
        batch = self._batches.form(bucket, length_bucket)
        given = self._given(batch.filled(inputs, rows))
        answers = computed(bucket, length_bucket, given)
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
