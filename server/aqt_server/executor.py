"""Loads one version: reads the bundle, compiles every bucket, and proves it exact here.

All of this blocks and belongs in a thread. Nothing here knows of requests.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aqt_engine import bundle, witness
from aqt_engine.bundle import Arrays, Bundle, Manifest
from aqt_engine.execution import Program


class InexactError(Exception):
    """A bundle's witness does not reproduce on this machine."""


class Executor:
    """A program in the mode that its dtypes need: without `jax_enable_x64`, JAX has no 64 bits.

    The mode is the calling thread's and not the process's, so that models which use no 64-bit
    types are compiled as everywhere else.
    """

    def __init__(self, loaded: Bundle, *, max_batch_rows: int):
        arrays = itertools.chain(
            loaded.manifest.inputs, loaded.manifest.outputs, loaded.manifest.weights
        )
        self._in_64_bits = any(np.dtype(spec.dtype).itemsize == 8 for spec in arrays)
        with jax.enable_x64(self._in_64_bits):
            self._program = Program(loaded, max_rows=max_batch_rows)
            for bucket in self._program.buckets:
                self._program.compile(bucket)
        self.bucket_rows = tuple(b * loaded.manifest.tile for b in self._program.buckets)
        """Numbers of rows that are computed at once, ascending; others are padded to the next."""

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """The outputs for `inputs`: by name, the same rows for all."""
        with jax.enable_x64(self._in_64_bits):
            return self._program(inputs)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A version that is ready to compute. `exact` says whether its witness reproduced here."""

    executor: Executor
    manifest: Manifest
    exact: bool


def load(path: Path, *, max_batch_rows: int, allow_inexact: bool) -> Loaded:
    """The bundle at `path`, compiled for every bucket up to `max_batch_rows` and checked.

    Raises:
      BundleError: it is missing, damaged, changed, or for other platforms.
      InexactError: its answers here are not those of training, and `allow_inexact` is not set.
    """
    loaded = bundle.load(path)
    executor = Executor(loaded, max_batch_rows=max_batch_rows)
    # Enough rows that the largest bucket is proved too.
    proof = witness.at_least(loaded.witness, executor.bucket_rows[-1])
    verdicts = witness.prove(executor, proof)
    failed = [f"{manner} it is {v}" for manner, v in verdicts.items() if not v.exact]
    if failed and not allow_inexact:
        raise InexactError(
            f"{path} does not compute here what was trained: {failed[0]} "
            f"({len(failed)} of {len(verdicts)} trials differ); convert it on this platform, or "
            f"serve it all the same with --allow-inexact"
        )
    return Loaded(executor=executor, manifest=loaded.manifest, exact=not failed)
