"""Loads one version: reads the bundle, compiles every bucket, and proves it exact here.

All of this blocks and belongs in a thread. Nothing here knows of requests.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aqt_engine import bundle, proof
from aqt_engine.bundle import Arrays, Bundle, BundleError, Manifest
from aqt_engine.execution import Mode, Program, tile_buckets
from aqt_engine.layout import Layout
from aqt_engine.manifest import LengthBucket
from aqt_engine.restoration import NotRestoredError
from aqt_server import kept
from aqt_server.distributions import Distribution, distributions
from aqt_server.kept import Executable, Kept, Records
from aqt_server.memory import Memory, NoMemoryError, told, workspace

_log = logging.getLogger(__name__)
_TOLD = 5
_AT_ANY_TIME = contextlib.nullcontext()


class InexactError(Exception):
    """A bundle's witness does not reproduce on this machine."""


class Executor:
    """A program in the mode that its dtypes need: without `jax_enable_x64`, JAX has no 64 bits.

    The mode is the calling thread's and not the process's, so that models which use no 64-bit
    types are compiled as everywhere else.
    """

    def __init__(
        self,
        loaded: Bundle,
        *,
        max_batch_rows: int,
        mode: Mode = Mode.EXACT,
        kernel: bool = True,
        layout: Layout = Layout(),
        program: Callable[..., Program] = Program,
        records: Records | None = None,
        restored: Kept | None = None,
    ):
        manifest = loaded.manifest
        self.layout = layout
        """On which devices it computes."""
        arrays = itertools.chain(manifest.inputs, manifest.outputs, manifest.weights)
        self._in_64_bits = any(np.dtype(spec.dtype).itemsize == 8 for spec in arrays)
        self.executables: tuple[Executable, ...] = ()
        """Where its executables lie, if `records` keep them."""
        known = {"packed": restored.packed, "cuts": restored.cuts} if restored else {}
        with jax.enable_x64(self._in_64_bits):
            self._program = program(
                loaded, max_rows=max_batch_rows, mode=mode, kernel=kernel, layout=layout, **known
            )
            if restored:
                self.executables = restored.executables
            elif records:
                self.executables = records.compile(self._program)
            else:
                for length_bucket in manifest.length_buckets:
                    for size in self._program.sizes(length_bucket):
                        self._program.compile(size, length_bucket)
        buckets = tile_buckets(max_batch_rows, manifest.tile, layout)
        self.bucket_rows = tuple(bucket * manifest.tile for bucket in buckets)
        """Numbers of rows that fill their tiles, ascending, up to that of the largest batch."""
        self.workspace_nbytes = (restored or self._program).workspace_nbytes
        """Bytes beside the weights that it computes in."""
        self.weights_nbytes = sum(map(layout.nbytes_here, manifest.weights))
        """Bytes of the weights in the memory of a device."""
        self.packed = self._program.packed
        """The weights that it keeps packed."""
        self.cuts = self._program.cuts
        """How its batches are cut into pieces."""
        self.kernel = self._program.kernel
        """The instruction set of the int8 kernel that it computes with; None without one."""

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """The outputs for `inputs`: by name, the same rows for all.

        Raises:
          NoMemoryError: there is not enough to compute them in.
        """
        with jax.enable_x64(self._in_64_bits), told():
            return self._program(inputs)

    def gathered(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """The outputs for `inputs`, computed as `Program.gathered` does."""
        with jax.enable_x64(self._in_64_bits), told():
            return self._program.gathered(inputs)

    def prove(self, loaded: Bundle, *, more_s: float) -> "Proof":
        """The witness in every executable; for `more_s` seconds more all that can be tried.

        `loaded` is the bundle that the executor was made of, which it does not keep.
        """
        rows = self._program.max_rows
        needed = proof.executables(loaded.manifest, loaded.witnesses, rows)
        ends = None
        passed, failed, stopped = 0, list[str](), False
        with jax.enable_x64(self._in_64_bits):
            for trial, verdict in self._trials(loaded, rows):
                passed += verdict.exact
                if not verdict.exact:
                    failed.append(f"{trial}, it is {verdict}")
                if passed + len(failed) < needed:
                    continue
                now = time.monotonic()
                ends = now + more_s if ends is None else ends
                # A failure is a failure, however many there are.
                stopped = bool(failed) or now >= ends
                if stopped:
                    break
        return Proof(passed=passed, failed=tuple(failed), whole=not stopped)

    def replay(self, loaded: Bundle, *, most: int | None = None) -> "Proof":
        """The witness in every executable, or its first `most` trials, which need no graphs."""
        rows = self._program.max_rows
        needed = proof.executables(loaded.manifest, loaded.witnesses, rows)
        with jax.enable_x64(self._in_64_bits):
            trials = self._of_witness(loaded, rows)
            tried = list(itertools.islice(trials, needed if most is None else most))
        failed = tuple(f"{trial}, it is {verdict}" for trial, verdict in tried if not verdict.exact)
        return Proof(passed=len(tried) - len(failed), failed=failed, whole=False)

    def _trials(self, loaded: Bundle, rows: int) -> Iterator[proof.Trial]:
        yield from self._of_witness(loaded, rows)
        of_graph = proof.tile_by_tile(loaded)

        def reference(length_bucket: LengthBucket, inputs: Arrays) -> Arrays:
            if self.layout.shards > 1:
                # No device may hold all weights at once.
                return self._program.gathered(inputs)
            # It takes the weights as they were stored, and no memory is there for two copies.
            with self._program.set_aside(loaded):
                return of_graph(length_bucket, inputs)

        yield from proof.of_random_inputs(self._program, reference, loaded.witnesses)

    def _of_witness(self, loaded: Bundle, rows: int) -> Iterator[proof.Trial]:
        return proof.of_witnesses(self._program, loaded.manifest, loaded.witnesses, rows=rows)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What came of the trials: how many passed, in words which failed, and whether all were made.

    Those that prove each executable with the witness were made in any case.
    """

    passed: int
    failed: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        if self.failed:
            return f"not exact: {self.failed[0]}"
        end = "" if self.whole else ", and then time was up"
        return f"exact: no bit differs in {self.passed} trials{end}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A version that is ready to compute.

    `exact` says whether it is in mode exact and was proved here; `verdict` says so in a sentence.
    `distributions` are those of its weights, if they were asked for. Where the verdict is one of an
    earlier start, `replay` computes the witness once more in every executable.
    """

    executor: Executor
    manifest: Manifest
    mode: Mode
    exact: bool
    verdict: str
    distributions: Mapping[str, Distribution]
    replay: Callable[[], Proof] | None = None


def load(
    path: Path,
    *,
    max_batch_rows: int,
    allow_inexact: bool,
    mode: Mode,
    proof_s: float,
    memory: Memory,
    layout: Layout = Layout(),
    program: Callable[..., Program] = Program,
    turn: AbstractContextManager[Any] = _AT_ANY_TIME,
    described: bool = False,
    records: Records | None = None,
) -> Loaded:
    """The bundle at `path`, compiled for every bucket up to `max_batch_rows` and proved.

    In mode fast it is tried too, and served whatever comes of it. `proof_s` are the seconds for
    more than the witness in each executable. What it takes of `memory` is estimated before its
    files are read, and known when it is compiled. A version that is not exact with the int8 kernel
    is computed without it. `program` makes the program, which is compiled and proved within `turn`.
    With `described`, its weights are looked through for how they are distributed. One on one device
    that is exact is kept in `records`; one that they have, the same in all that decides about its
    bits, is neither compiled nor proved again, but for the first trial.

    Raises:
      NoMemoryError: it takes more than there is.
      BundleError: it is missing, damaged, changed, for other platforms, or not for this mode.
      InexactError: its answers here are not those of training, and `allow_inexact` is not set.
    """
    # Its configurations are checked where it is loaded whole.
    manifest = bundle.read_manifest(path, with_configurations=False)
    buckets = tile_buckets(max_batch_rows, manifest.tile, layout)
    rows = buckets[-1] * manifest.tile
    memory.check(manifest, workspace=workspace(manifest, rows), layout=layout)
    alone = layout.devices == 1 and program is Program and mode is Mode.EXACT
    of = kept.identity(manifest, buckets) if records and alone else None
    if records and of and (earlier := records.find(of, proof_s=proof_s)):
        found = _restored(path, manifest, earlier, records, max_batch_rows, memory, described)
        if found:
            return found

    def proved(kernel: bool) -> tuple[Executor, Proof]:
        made = Executor(
            loaded,
            max_batch_rows=max_batch_rows,
            mode=mode,
            kernel=kernel,
            layout=layout,
            program=program,
            records=records if of else None,
        )
        memory.check(manifest, workspace=made.workspace_nbytes, layout=layout, placed=True)
        return made, made.prove(loaded, more_s=proof_s if mode is Mode.EXACT else 0)

    with told():
        loaded = bundle.load(path)
        if departures := layout.departures(manifest.weights):
            more = f"; and {len(departures) - _TOLD} more" if len(departures) > _TOLD else ""
            told_of = "; ".join(departures[:_TOLD])
            _log.info("%s is not cut everywhere as it was trained: %s%s", path, told_of, more)
        with turn:
            executor, found = proved(kernel=True)
            if found.failed and executor.kernel:
                _log.warning(
                    "%s is computed without the int8 kernel, with which it is %s", path, found
                )
                del executor
                executor, found = proved(kernel=False)
    # Its files may have been replaced since its manifest was read.
    if records and of and executor.executables and not found.failed and loaded.manifest == manifest:
        records.keep(
            Kept(
                of=of,
                executables=executor.executables,
                packed_weights=kept.packed_weights(executor.packed),
                cut_batches=kept.cut_batches(executor.cuts),
                workspace_nbytes=executor.workspace_nbytes,
                trials=found.passed,
                whole=found.whole,
                proof_s=proof_s,
            )
        )
    found_in_weights = distributions(loaded) if described else {}
    if mode is Mode.FAST:
        verdict = f"fast: bits may differ with the batch; tried on the witness, {found}"
    elif found.failed and not allow_inexact:
        raise InexactError(
            f"{path} does not compute here what was trained: {found.failed[0]} "
            f"({len(found.failed)} of {found.passed + len(found.failed)} trials differ); convert "
            f"it on this platform, or serve it all the same with --allow-inexact"
        )
    else:
        verdict = str(found)
    return Loaded(
        executor=executor,
        manifest=loaded.manifest,
        mode=mode,
        exact=mode is Mode.EXACT and not found.failed,
        verdict=verdict,
        distributions=found_in_weights,
    )


def _restored(
    path: Path,
    manifest: Manifest,
    earlier: Kept,
    records: Records,
    max_batch_rows: int,
    memory: Memory,
    described: bool,
) -> Loaded | None:
    """The version at `path`, as an `earlier` start proved it; None where it has to be proved anew.

    Raises:
      BundleError: its files are not those of its manifest.
      NoMemoryError: it takes more than there is.
    """
    try:
        with told():
            loaded = bundle.load(path, with_graphs=False)
            if loaded.manifest != manifest:
                raise NotRestoredError("its files were replaced meanwhile")
            program = functools.partial(kept.Restored, values=records.values(earlier))
            executor = Executor(
                loaded, max_batch_rows=max_batch_rows, program=program, restored=earlier
            )
            memory.check(manifest, workspace=executor.workspace_nbytes, placed=True)
            first = executor.replay(loaded, most=1)
            if first.failed:
                raise NotRestoredError(f"the witness does not reproduce: {first.failed[0]}")
    except (BundleError, NoMemoryError, OSError):
        raise
    except Exception as error:
        # Whatever is wrong with what was kept, it can be made again.
        records.forget(earlier.of)
        _log.warning("%s is compiled and proved anew, not as it was kept: %s", path, error)
        return None

    def replay() -> Proof:
        try:
            found = executor.replay(loaded)
        except NotRestoredError as error:
            found = Proof(passed=0, failed=(str(error),), whole=False)
        if found.failed:
            records.forget(earlier.of)
        return found

    found = Proof(passed=earlier.trials, failed=(), whole=earlier.whole)
    return Loaded(
        executor=executor,
        manifest=manifest,
        mode=Mode.EXACT,
        exact=True,
        verdict=f"{found}, at an earlier start",
        distributions=distributions(loaded) if described else {},
        replay=replay,
    )
