"""Executables that were compiled before, taken as they are: nothing is traced, lowered or compiled.

JAX keeps compiled executables in a persistent cache, and looks there for what it has just lowered.
To lower a graph takes longer than to read its executable, and nothing is kept of an executable but
that entry. So a function of the same arguments and results stands in: JAX lowers it, which takes
milliseconds, and whoever keeps the cache gives the entry of the graph's executable in its place.
From there on all is as JAX does it, without pickle: what comes is an executable like any other.

A stand-in computes nothing that anybody wants. Where the cache has given nothing, or what JAX could
not read, JAX compiles it; so the name of what has come is looked at before it is taken.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aqt_engine.spreading import Forward

_NAME = "aqt_stand_in"


class NotRestoredError(Exception):
    """The compilation cache did not give an executable in the place of a stand-in."""


def stand_in(results: Sequence[jax.ShapeDtypeStruct]) -> Forward:
    """A function of weights and inputs that gives zeros of the shapes and dtypes of `results`."""

    def zeros(weights: Sequence[jax.Array], inputs: Sequence[jax.Array]) -> list[jax.Array]:
        return [jnp.zeros(of.shape, of.dtype) for of in results]

    zeros.__name__ = zeros.__qualname__ = _NAME
    return zeros


def check_restored(compiled: Any, name: str) -> None:
    """Returns if the `jax.stages.Compiled` is one of a function `name`, and not of a stand-in.

    Raises:
      NotRestoredError: it is not.
    """
    names = [module.name for module in compiled.runtime_executable().hlo_modules()]
    if names != [f"jit_{name}"]:
        raise NotRestoredError(
            f"the compilation cache gave no executable of {name}, and what there is, is one of "
            f"{', '.join(names) or 'nothing'}"
        )
