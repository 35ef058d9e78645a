"""How many bytes a version takes, and whether there are that many."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from pathlib import Path

import jax

from aqt_engine.bundle import Manifest
from aqt_engine.layout import Layout


class NoMemoryError(Exception):
    """There is not as much memory as a version takes, or as it computes in."""


@contextlib.contextmanager
def told() -> Generator[None]:
    """Makes NoMemoryError of the errors with which JAX and NumPy run out of memory."""
    try:
        yield
    except MemoryError as error:
        raise NoMemoryError(f"the machine has none left: {error or 'MemoryError'}") from error
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        first = str(error).removeprefix("RESOURCE_EXHAUSTED: ").partition("\n")[0]
        raise NoMemoryError(f"the device has none left: {first}") from error


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a version may take.

    `limit` bounds what all versions hold together, of which others `held` so many bytes already;
    `available` says how many bytes are free of a device's memory.
    """

    limit: int | None
    held: int
    available: Callable[[], int]

    def check(
        self,
        manifest: Manifest,
        *,
        workspace: int,
        layout: Layout = Layout(),
        placed: bool = False,
    ) -> None:
        """Returns if a version of `manifest`, with a `workspace` of so many bytes, can be loaded.

        `placed` is whether its weights are in memory already. While they are read, the largest is
        there twice: as it is stored, and as it is computed with. Of one in shards, all are together
        on a device while the version is proved.

        Raises:
          NoMemoryError: it cannot.
        """
        weights = sum(map(layout.nbytes_here, manifest.weights))
        holds = weights + workspace
        if self.limit is not None and self.held + holds > self.limit:
            raise NoMemoryError(
                f"its weights and workspace take {holds} bytes, other versions {self.held}, and "
                f"--model-memory-bytes is {self.limit}: unload another, or raise it"
            )
        largest = max((weight.nbytes for weight in manifest.weights), default=0)
        takes, what = workspace, "its workspace"
        if not placed:
            takes += weights + largest
            what = "its weights, the largest of them twice, and its workspace"
        if takes > (free := self.available()):
            raise NoMemoryError(
                f"to load it takes {takes} bytes ({what}), and {free} are available: unload "
                f"another version, or give the server more memory"
            )


def workspace(manifest: Manifest, rows: int) -> int:
    """Bytes of the inputs and outputs of `rows` rows of the longest length bucket."""
    sizes = manifest.sizes(manifest.length_buckets[-1])
    specs = [spec.with_rows(rows, sizes) for spec in (*manifest.inputs, *manifest.outputs)]
    return sum(spec.size * spec.dtype.itemsize for spec in specs)


def available() -> int:
    """Bytes that are free on the device, or where it does not tell, for this process."""
    told = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in told:
        return told["bytes_limit"] - told["bytes_in_use"]
    return of_host(Path("/"))


def of_host(root: Path) -> int:
    """Bytes that are free by the files of Linux under `root`: of the machine and the container.

    Where there are no such files, it is 2**63 - 1.
    """
    found = [2**63 - 1]
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    cgroups = root / "sys/fs/cgroup"
    for limit, usage in (
        (cgroups / "memory.max", cgroups / "memory.current"),
        (cgroups / "memory/memory.limit_in_bytes", cgroups / "memory/memory.usage_in_bytes"),
    ):
        most, used = _text(limit).strip(), _text(usage).strip()
        if most.isdecimal() and used.isdecimal():
            found.append(int(most) - int(used) + _reclaimable(limit.parent / "memory.stat"))
    return min(found)


def _reclaimable(statistics: Path) -> int:
    """Bytes of files in memory that nobody has read for long, which count as used."""
    lines = (line.split() for line in _text(statistics).splitlines())
    counts = {name: int(count) for name, count in lines}
    return counts.get("total_inactive_file", counts.get("inactive_file", 0))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
