"""Trained variables from an Orbax checkpoint, in whichever form a training loop saved them.

What is not asked for, such as the state of an optimizer, is not read. Arrays are read few at a
time, and given to `keep` before the next are: a checkpoint may be larger than memory, if that keeps
them elsewhere (`spool`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from aqt_engine import heap
from aqt_engine.streaming import Keep, as_it_is


class CheckpointError(ValueError):
    """There is no readable Orbax checkpoint at a path."""


def load_variables(path: Path, keep: Keep = as_it_is) -> dict[str, Any]:
    """The Flax collections in the checkpoint at `path`, as NumPy arrays: `{"params": ...}`, ...

    `path` is a checkpoint, a step of an `orbax.checkpoint.CheckpointManager`, or the manager's
    directory, of which the latest step is taken. What was saved may be the parameters alone, a
    dict of collections, or a train state with either under `params`; optimizer state is left out.
    Each array is what `keep` gives for it.

    Raises:
      CheckpointError: nothing readable stands there.
    """
    return _restored(path, _collections, keep)


def load_tree(path: Path, keep: Keep = as_it_is) -> Any:
    """The tree in the checkpoint at `path`, as it was saved, with NumPy arrays.

    Of a train state, which has an `opt_state`, it is the `params`. `path` and `keep` are as in
    `load_variables`.

    Raises:
      CheckpointError: nothing readable stands there.
    """
    return _restored(path, _trained, keep)


def unboxed(saved: Any, like: Any) -> Any:
    """`saved` with an array wherever `like` has one and a box of metadata was saved around it.

    Orbax saves a box, as `nn.with_partitioning` makes it, as `{"value": array}`, and nothing in the
    checkpoint says that it was one. `like` is what the model makes, with boxes or without, as
    `jax.eval_shape(model.init, ...)` gives it.
    """
    if not isinstance(saved, Mapping):
        return saved
    tree = cast(Mapping[str, Any], saved)
    if isinstance(like, Mapping):
        known = cast(Mapping[str, Any], like)
        return {name: unboxed(value, known.get(name)) for name, value in tree.items()}
    return tree["value"] if like is not None and list(tree) == ["value"] else saved


def _trained(tree: Any) -> Any:
    return tree["params"] if isinstance(tree, Mapping) and "opt_state" in tree else tree


def _restored(path: Path, chosen: Callable[[Any], Any], keep: Keep) -> Any:
    """What `chosen` takes of the tree that was saved."""
    found = _find(path.absolute())
    if found is None:
        raise CheckpointError(
            f"{path} holds no Orbax checkpoint: give the directory that "
            f"`orbax.checkpoint` has written"
        )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(found).item_metadata.tree
            saved, structure = jax.tree.flatten(metadata)
            numbers = chosen(jax.tree.unflatten(structure, range(len(saved))))
            wanted = jax.tree.leaves(numbers)
            arguments = jax.tree.unflatten(structure, [_AS_NUMPY] * len(saved))
            values = dict[int, Any]()
            for few in _in_turn(wanted, [_nbytes(leaf) for leaf in saved]):
                leaves = [saved[i] if i in few else ocp.PLACEHOLDER for i in range(len(saved))]
                item = jax.tree.unflatten(structure, leaves)
                read = checkpointer.restore(found, item=item, restore_args=arguments)
                read = structure.flatten_up_to(read)
                for i in few:
                    values[i] = _kept(read[i], keep)
                del read
                heap.give_back()
            return jax.tree.map(values.__getitem__, numbers)
    except Exception as error:
        raise CheckpointError(f"{found} cannot be read as an Orbax checkpoint: {error}") from error


# As NumPy arrays, whatever devices they were saved from.
_AS_NUMPY = ocp.RestoreArgs(restore_type=np.ndarray)


def _kept(value: Any, keep: Keep) -> Any:
    return keep(value) if isinstance(value, np.ndarray) else value


def _nbytes(saved: Any) -> int:
    shape, dtype = getattr(saved, "shape", None), getattr(saved, "dtype", None)
    if shape is None or dtype is None:
        return 0
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _in_turn(numbers: Sequence[int], nbytes: Sequence[int]) -> Iterator[list[int]]:
    """`numbers` in groups, none of which takes more bytes than the largest of them."""
    largest = max((nbytes[i] for i in numbers), default=0)
    group, size = list[int](), 0
    for i in numbers:
        if group and size + nbytes[i] > largest:
            yield group
            group, size = [], 0
        group.append(i)
        size += nbytes[i]
    if group:
        yield group


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
