"""Loads one version: reads the bundle, compiles every bucket, and proves it exact here.

All of this blocks and belongs in a thread. Nothing here knows of requests.
"""

import dataclasses
from pathlib import Path

from aqt_engine import bundle, witness
from aqt_engine.bundle import Manifest
from aqt_engine.execution import Program


class InexactError(Exception):
    """A bundle's witness does not reproduce on this machine."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A version that is ready to compute. `exact` says whether its witness reproduced here."""

    program: Program
    manifest: Manifest
    exact: bool


def load(path: Path, *, max_batch_rows: int, allow_inexact: bool) -> Loaded:
    """The bundle at `path`, compiled for every bucket up to `max_batch_rows` and checked.

    Raises:
      BundleError: it is missing, damaged, changed, or for other platforms.
      InexactError: its answers here are not those of training, and `allow_inexact` is not set.
    """
    loaded = bundle.load(path)
    program = Program(loaded, max_rows=max_batch_rows)
    for bucket in program.buckets:
        program.compile(bucket)
    # Enough rows that the largest bucket is proved too.
    verdicts = witness.prove(program, witness.at_least(loaded.witness, program.max_rows))
    failed = [f"{manner} it is {v}" for manner, v in verdicts.items() if not v.exact]
    if failed and not allow_inexact:
        raise InexactError(
            f"{path} does not compute here what was trained: {failed[0]} "
            f"({len(failed)} of {len(verdicts)} trials differ); convert it on this platform, or "
            f"serve it all the same with --allow-inexact"
        )
    return Loaded(program=program, manifest=loaded.manifest, exact=not failed)
