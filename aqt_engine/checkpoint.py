"""Trained variables from an Orbax checkpoint, in whichever form a training loop saved them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp


class CheckpointError(ValueError):
    """There is no readable Orbax checkpoint at a path."""


def load_variables(path: Path) -> dict[str, Any]:
    """The Flax collections in the checkpoint at `path`, as NumPy arrays: `{"params": ...}`, ...

    `path` is a checkpoint, a step of an `orbax.checkpoint.CheckpointManager`, or the manager's
    directory, of which the latest step is taken. What was saved may be the parameters alone, a
    dict of collections, or a train state with either under `params`; optimizer state is left out.

    Raises:
      CheckpointError: nothing readable stands there.
    """
    return _collections(_restored(path))


def load_tree(path: Path) -> Any:
    """The tree in the checkpoint at `path`, as it was saved, with NumPy arrays.

    Of a train state, which has an `opt_state`, it is the `params`. `path` is as in
    `load_variables`.

    Raises:
      CheckpointError: nothing readable stands there.
    """
    tree = _restored(path)
    return tree["params"] if isinstance(tree, Mapping) and "opt_state" in tree else tree


def _restored(path: Path) -> Any:
    found = _find(path.absolute())
    if found is None:
        raise CheckpointError(
            f"{path} holds no Orbax checkpoint: give the directory that "
            f"`orbax.checkpoint` has written"
        )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(found).item_metadata.tree
            # As NumPy arrays, whatever devices they were saved from.
            arguments = jax.tree.map(_as_numpy, metadata)
            return checkpointer.restore(found, restore_args=arguments)
    except Exception as error:
        raise CheckpointError(f"{found} cannot be read as an Orbax checkpoint: {error}") from error


def _as_numpy(_: Any) -> ocp.RestoreArgs:
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _find(path: Path) -> Path | None:
    if (path / "_METADATA").exists():
        return path
    if not path.is_dir():
        return None
    steps = sorted((int(d.name), d) for d in path.iterdir() if d.name.isdecimal())
    if steps:
        return _find(steps[-1][1])
    items = {d.name: d for d in sorted(path.iterdir()) if (d / "_METADATA").exists()}
    for name in ("default", "state", "params"):
        if name in items:
            return items[name]
    return next(iter(items.values()), None)


def _collections(tree: Mapping[str, Any]) -> dict[str, Any]:
    if "params" not in tree:
        return {"params": tree}
    params = cast(Mapping[str, Any], tree["params"])
    if "params" in params:
        return dict(params)
    return {
        name: value
        for name, value in tree.items()
        if isinstance(value, Mapping) and name != "opt_state"
    }
