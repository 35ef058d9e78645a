"""What our model would store, which is what another library's stored tensors have to fit."""

import contextlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from aqt_engine.flax.marks import SEPARATOR
from aqt_engine.qtensor import QTensor, Scale

COLLECTION = "aqt"
Path = tuple[str, ...]
"""Where a tensor is stored: the path of a module, and the name `qlhs` or `qrhs`."""


class MigrationError(ValueError):
    """What was stored cannot be served by a model; the message says which part, and why."""


def shapes(
    module: nn.Module,
    variables: Mapping[str, Any],
    example: Mapping[str, Any],
    watch: Any = None,
) -> dict[Path, QTensor | Scale]:
    """The shapes and dtypes that `module`, in CONVERT, stores. `watch` intercepts its methods."""

    def convert(variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> Any:
        with contextlib.nullcontext() if watch is None else nn.intercept_methods(watch):
            return module.apply(variables, inputs, method=_call, mutable=True)[1]

    stored = meta.unbox(jax.eval_shape(convert, variables, dict(example)).get(COLLECTION, {}))
    return {path: leaf for path, leaf in _flat(stored).items() if _is_stored(leaf)}


def marks(
    module: nn.Module, variables: Mapping[str, Any], example: Mapping[str, Any]
) -> dict[Path, jax.Array]:
    """The marks that `module` would store, since it is its configuration that will serve."""
    names: list[Path] = []

    # They depend on nothing: compiled, nothing else is computed.
    @jax.jit
    def marks(variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> list[jax.Array]:
        stored = module.apply(variables, inputs, method=_call, mutable=True)[1]
        leaves = _flat(meta.unbox(stored.get(COLLECTION, {})))
        found = {path: leaf for path, leaf in leaves.items() if SEPARATOR in path[-1]}
        names.extend(found)
        return list(found.values())

    return dict(zip(names, marks(variables, dict(example)), strict=True))


def require_same(stored: set[Path], expected: set[Path]) -> None:
    """Refuses tensors that only one of the two sides quantizes.

    Raises:
      MigrationError: there are such tensors; it names them.
    """
    only_stored = sorted("/".join(path) for path in stored - expected)
    only_expected = sorted("/".join(path) for path in expected - stored)
    if only_stored or only_expected:
        raise MigrationError(
            f"the model does not quantize what was stored: only stored are "
            f"{', '.join(only_stored) or 'none'}, and only the model has "
            f"{', '.join(only_expected) or 'none'}; give each side of each layer the mode and the "
            f"configuration that it was stored with"
        )


def checked(where: str, part: str, array: Any, target: Any) -> jax.Array | None:
    """`array`, which has the shape and dtype of `target`, or is None where that is None.

    Raises:
      MigrationError: it is otherwise.
    """
    if array is None and target is None:
        return None
    if array is None or target is None or not _fits(array, target):
        raise MigrationError(
            f"{where} was stored with {part} {_described(array)} and the model has "
            f"{_described(target)}: use the configuration and the tiles that it was stored with"
        )
    return jnp.asarray(array)


def _fits(array: Any, target: Any) -> bool:
    return tuple(array.shape) == tuple(target.shape) and array.dtype == target.dtype


def _described(array: Any) -> str:
    return "absent" if array is None else f"of {array.dtype}{list(array.shape)}"


def _flat(collection: Mapping[str, Any]) -> dict[Path, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(collection, is_leaf=_is_stored)[0]
    return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}


def _call(module: nn.Module, inputs: Mapping[str, jax.Array]) -> Any:
    return module(**inputs)


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, QTensor | Scale)
