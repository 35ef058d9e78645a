"""Which configuration a stored side was converted by, so that no other one serves it.

Beside `qrhs` lies `qrhs@819da5a57d9d7d34`: the forward configuration's JSON as uint8, by a name
that ends in its fingerprint. The name is what is compared. Names are the structure of a tree: an
Orbax checkpoint keeps them, and they are known while a function is traced, where values are not.
What is static in a QTensor would be lost in a checkpoint, and an array alone could not be read in a
trace.

A configuration with classes that JSON has no name for is marked as `unlisted`; those are not told
apart.
"""

import json
from typing import Any

import flax.linen as nn
import jax
import jax.core
import numpy as np
from flax import traverse_util

from aqt_engine.config import DotGeneral
from aqt_engine.config.serialization import SerializationError, fingerprint, to_json

SEPARATOR = "@"
_DIGITS = 16
_UNLISTED = "unlisted"


def mark(module: nn.Module, collection: str, name: str, config: DotGeneral) -> None:
    """Notes beside what is stored under `name` that `config` converted it.

    Raises:
      ValueError: another configuration has converted it before, into the same variables.
    """
    own = _mark_of(name, config)
    others = [found for found in _marks(module, collection, name) if found != own]
    if others:
        raise ValueError(
            f"{_place(module, name)} is there already, converted by another configuration "
            f"({_digits(others[0])}, this one is {_digits(own)}): convert again from variables "
            f"without the collection {collection!r}"
        )
    value = _described(config)
    module.variable(collection, own, lambda: value)


def check(module: nn.Module, collection: str, name: str, config: DotGeneral) -> None:
    """Refuses to serve what another configuration has converted.

    Raises:
      ValueError: it was, or nothing says what has converted it.
    """
    own, found = _mark_of(name, config), _marks(module, collection, name)
    if not found:
        raise ValueError(
            f"{_place(module, name)} does not say which configuration converted it, as weights of "
            f"an earlier release do not: convert again from the trained parameters"
        )
    if own not in found:
        raise ValueError(
            f"{_place(module, name)} was converted by the configuration {_digits(found[0])} and is "
            f"to be served by {_digits(own)}{_differences(found[0], module, collection, config)}: "
            f"serve with the configuration that converted it, or convert again"
        )


def _mark_of(name: str, config: DotGeneral) -> str:
    try:
        digits = fingerprint(_forward(config))[:_DIGITS]
    except SerializationError:
        digits = _UNLISTED
    return f"{name}{SEPARATOR}{digits}"


def _marks(module: nn.Module, collection: str, name: str) -> list[str]:
    names = module.variables.get(collection, {})
    return [found for found in names if found.startswith(name + SEPARATOR)]


def _forward(config: DotGeneral) -> DotGeneral:
    """All of a configuration that serving computes with."""
    return DotGeneral(fwd=config.fwd)


def _described(config: DotGeneral) -> np.ndarray[Any, Any]:
    try:
        text = to_json(_forward(config))
    except SerializationError:
        text = "{}"
    return np.frombuffer(text.encode(), np.uint8)


def _differences(mark_name: str, module: nn.Module, collection: str, config: DotGeneral) -> str:
    """Where the configurations differ, if what is stored can be read here."""
    value = module.get_variable(collection, mark_name)
    # Under an nn.scan or nn.vmap that is not traced there is one for each layer, all alike.
    if isinstance(value, jax.core.Tracer) or np.ndim(value) != 1:
        return ""
    stored, own = (
        traverse_util.flatten_dict(json.loads(bytes(np.asarray(v))).get("config", {}), sep=".")
        for v in (value, _described(config))
    )
    differing = [p for p in sorted({*stored, *own}) if stored.get(p) != own.get(p)]
    shown = (f"{p} {stored.get(p, 'by default')} and {own.get(p, 'by default')}" for p in differing)
    return f" ({'; '.join(shown)})"


def _digits(mark_name: str) -> str:
    return mark_name.rpartition(SEPARATOR)[2]


def _place(module: nn.Module, name: str) -> str:
    return "/".join((*module.path, name))
