"""What is kept of versions that were proved, so that a restart computes at once what it did before.

Beside the executables (`compiled`) lies a record of each version that was proved: which of them are
its own, by key and digest; which weights they take packed; and what the proof was. It is found by
all that may decide about bits, and there is none to find where any of it is another: the digests of
the bundle, the processor and how many of its cores there are, the versions of JAX and of the C
library, what the environment says to them, the int8 kernel, the code here that makes executables of
graphs. A record names what it is of, and its file has a digest: what is damaged, or lies under the
name of another, counts for nothing.

A verdict is one about executables that were read from the disk, as those of a restart are: what has
just been compiled is put there, read again, and proved then.

Who may write into the directory can have any code run. It is as trusted as it was for executables.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pydantic
from jaxlib import version as jaxlib_version

import aqt_engine
from aqt_engine.batches import At
from aqt_engine.bundle import Bundle
from aqt_engine.execution import Cuts, Packed, Program
from aqt_engine.kernels import library
from aqt_engine.kernels.packing import Packing
from aqt_engine.manifest import MANIFEST_FORM, LengthBucket, Manifest
from aqt_engine.pieces import Cut
from aqt_engine.restoration import NotRestoredError
from aqt_server.compiled import Entries, given, noted

_log = logging.getLogger(__name__)
_FORM = 3
_CODE = ("*.py", "kernels/*.py", "kernels/native/*.so")
_VARIABLES = ("AQT_KERNELS", "JAX_", "XLA_", "LIBTPU_", "TF_", "CUDA_", "NVIDIA_")
# By these /proc/cpuinfo tells one model, and what it can do, from another: of x86, and of ARM.
_OF_X86 = ("vendor_id", "cpu family", "model", "stepping", "microcode", "flags")
_OF_ARM = ("CPU ", "Features")


@dataclasses.dataclass(frozen=True, slots=True)
class Executable:
    """That for `size` tiles at a length bucket, and where it lies."""

    length_bucket: LengthBucket
    size: int
    key: str
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight that the executables of a length bucket take packed."""

    length_bucket: LengthBucket
    index: int
    packing: Packing


@dataclasses.dataclass(frozen=True, slots=True)
class CutBatches:
    """How the batches of a length bucket are cut into pieces."""

    length_bucket: LengthBucket
    cut: Cut


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A version that was proved, `of` all that decides about its bits.

    It computes in `workspace_nbytes` beside its weights. No bit differed in `trials`: all there
    are, or as many as `proof_s` seconds had room for beside those that every version has to pass.
    """

    of: str
    executables: tuple[Executable, ...]
    packed_weights: tuple[PackedWeight, ...]
    cut_batches: tuple[CutBatches, ...]
    workspace_nbytes: int
    trials: int
    whole: bool
    proof_s: float

    @property
    def packed(self) -> Packed:
        """The weights that each graph takes packed."""
        found: dict[LengthBucket, dict[int, Packing]] = {of: {} for of in self.cuts}
        for weight in self.packed_weights:
            found[weight.length_bucket][weight.index] = weight.packing
        return found

    @property
    def cuts(self) -> Cuts:
        """How the batches of each length bucket are cut."""
        return {one.length_bucket: one.cut for one in self.cut_batches}


_FORM_OF_RECORD = pydantic.TypeAdapter(Kept)


class Records:
    """The records of versions in `directory`, beside the executables."""

    def __init__(self, directory: Path):
        self._entries = Entries(directory.expanduser())

    def find(self, of: str, *, proof_s: float) -> Kept | None:
        """What is kept `of` that, if it was tried for as long as `proof_s`."""
        text = self._entries.read(_key(of))
        if text is None:
            return None
        try:
            found = _FORM_OF_RECORD.validate_json(text)
        except pydantic.ValidationError:
            _log.warning("the record of a proof is of another form, and the proof made again")
            return None
        return found if found.of == of and (found.whole or found.proof_s >= proof_s) else None

    def keep(self, kept: Kept) -> None:
        """Keeps a record, or says in the log that it cannot."""
        self._entries.put(_key(kept.of), _FORM_OF_RECORD.dump_json(kept))

    def forget(self, of: str) -> None:
        """Removes the record `of` that."""
        self._entries.remove(_key(of))

    def values(self, kept: Kept) -> dict[At, bytes]:
        """The executables of a version, as they lie on the disk.

        Raises:
          NotRestoredError: one is not what it was.
        """
        values: dict[At, bytes] = {}
        for one in kept.executables:
            content = self._entries.read(one.key)
            if content is None or hashlib.sha256(content).hexdigest() != one.sha256:
                raise NotRestoredError(f"the executable {one.key} is not what it was")
            values[one.length_bucket, one.size] = content
        return values

    def compile(self, program: Program) -> tuple[Executable, ...]:
        """Compiles all executables, and reads each again from where it lies.

        It gives none of them if one cannot be kept.
        """
        found: list[Executable] = []
        for at in _all(program):
            with noted() as asked:
                program.compile(at[1], at[0])
            value = self._entries.read(asked[-1]) if asked else None
            if value is None:
                continue
            try:
                with given(value):
                    program.restore(at[1], at[0])
            except NotRestoredError as error:
                _log.warning("the next start compiles again what it cannot read: %s", error)
                continue
            found.append(Executable(*at, asked[-1], hashlib.sha256(value).hexdigest()))
        return tuple(found) if len(found) == len(_all(program)) else ()


class Restored(Program):
    """A program of an earlier start: `values` are its executables, each read when it is called for.

    Raises:
      NotRestoredError: there are other executables than the program has; or, when it is called, one
        cannot be read.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        values: Mapping[At, bytes],
        **arguments: Any,
    ):
        self._values = dict(values)
        self._reading = {at: threading.Lock() for at in values}
        super().__init__(bundle, **arguments)
        if set(values) != set(_all(self)):
            raise NotRestoredError("there are other executables than the program has")

    def _placed(self, bundle: Bundle) -> dict[LengthBucket, list[jax.Array]]:
        """The weights; beside them is read what is called first, mostly outside of Python."""
        # Which is each thread's own; the stubs do not know of it.
        in_64_bits = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        with ThreadPoolExecutor(max_workers=1) as beside:

            def first() -> None:
                with jax.enable_x64(in_64_bits):
                    of = self.manifest.length_buckets[0]
                    self.compile(self.sizes(of)[0], of)

            read = beside.submit(first)
            placed = super()._placed(bundle)
            read.result()
        return placed

    def compile(self, size: int, length_bucket: LengthBucket = ()) -> None:
        """Reads the executable for `size` tiles, unless that was done, and compiles none."""
        at = (length_bucket, size)
        # Without waiting for another that is being read.
        if at not in self._values:
            return
        with self._reading[at]:
            if at in self._values:
                with given(self._values[at]):
                    self.restore(size, length_bucket)
                del self._values[at]


def packed_weights(packed: Packed) -> tuple[PackedWeight, ...]:
    """The same as `Kept.packed` has it."""
    return tuple(
        PackedWeight(of, index, packing)
        for of, weights in packed.items()
        for index, packing in weights.items()
    )


def cut_batches(cuts: Cuts) -> tuple[CutBatches, ...]:
    """The same as `Kept.cuts` has it."""
    return tuple(CutBatches(of, cut) for of, cut in cuts.items())


def identity(manifest: Manifest, tile_buckets: Sequence[int]) -> str | None:
    """A digest of all that may decide about the bits of a version; None where it is not known."""
    if not (here := _here()):
        return None
    document = json.dumps({"tiles": list(tile_buckets), "here": here}, sort_keys=True)
    return hashlib.sha256(MANIFEST_FORM.dump_json(manifest) + document.encode()).hexdigest()


@functools.cache
def _here() -> Mapping[str, Any]:
    """What computes here. Empty where there is no telling one processor from another."""
    processor = _processor(Path("/proc/cpuinfo"))
    if not processor:
        return {}
    device = jax.local_devices()[0]
    return {
        "form": _FORM,
        "versions": [
            jax.__version__,
            jaxlib_version.__version__,
            os.confstr("CS_GNU_LIBC_VERSION"),
        ],
        "platform": [device.client.platform, device.client.platform_version, device.device_kind],
        "processor": [platform.machine(), *processor],
        "cores": len(os.sched_getaffinity(0)),
        "kernel": library.instruction_set(),
        "code": _digest_of_code(Path(aqt_engine.__file__).parent),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def _processor(file: Path) -> list[str]:
    try:
        lines = set(file.read_text().splitlines())
    except OSError:
        return []
    return sorted(line for line in lines if line.startswith(_OF_X86 + _OF_ARM))


def _digest_of_code(engine: Path) -> str:
    """Of what makes executables of graphs, and of the kernel that they call."""
    digest = hashlib.sha256()
    for file in sorted(f for pattern in _CODE for f in engine.glob(pattern)):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(engine)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _all(program: Program) -> list[At]:
    return [(of, size) for of in program.manifest.length_buckets for size in program.sizes(of)]


def _key(of: str) -> str:
    return f"proved-{of}"
