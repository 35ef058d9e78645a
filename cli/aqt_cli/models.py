"""Models by name, with their variables from a checkpoint: whatever `aqt convert` takes."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from aqt_cli.sources import load_factory

if TYPE_CHECKING:
    from aqt_engine.pretrained import TensorRule

EXPECTED = (
    "a function from a QuantMode to a linen module, a function of variables and named inputs to "
    "outputs, or a function without arguments to an nnx model; with --rules, a linen module in "
    "float is given without arguments too"
)


_TABLE = "TENSORS"


def load_model(
    reference: str,
    checkpoint: Path,
    rules_file: Path | None = None,
    example: Mapping[str, Any] | None = None,
    *,
    keep: Callable[[Any], Any] = lambda array: array,
) -> tuple[Any, Any]:
    """What `reference`, "package.module:name", names, as `convert` takes it, and its variables.

    Each array of an Orbax checkpoint is what `keep` gives for it, before the next are read.

    With `rules_file`, a model in float is quantized by the rules in it; in a linen model that has
    AQT modules, they replace the configurations of those.

    A checkpoint in safetensors is read by the table `TENSORS` in the module of the model. With an
    `example`, the variables of a linen model have to be the ones that it has for such inputs.

    Raises:
      typer.BadParameter: there is no such thing, or it is none of `EXPECTED`.
      SerializationError: the file holds no rules.
      CheckpointError, PretrainedError, ConversionError: the checkpoint cannot be read, or is not of
        this model.
    """
    # Commands that need no JAX must start without it.
    import flax.linen as nn
    import jax
    from flax import nnx

    from aqt_engine import checkpoint as orbax
    from aqt_engine import flax, functions, pretrained
    from aqt_engine.convert import Function
    from aqt_engine.convertible import Convertible
    from aqt_engine.flax import nnx as aqt_nnx
    from aqt_engine.flax.overriding import overridden
    from aqt_engine.modes import QuantMode
    from aqt_engine.rules import Rules

    def load_tree(path: Path) -> Any:
        if not pretrained.is_safetensors(path):
            return orbax.load_tree(path, keep)
        return pretrained.load(path, _table(reference))

    def initial(module: nn.Module, example: Mapping[str, Any]) -> Any:
        init = functools.partial(module.init, **dict(example))
        return jax.eval_shape(init, jax.random.key(0))

    def load_variables(path: Path, module: nn.Module) -> Any:
        if not pretrained.is_safetensors(path):
            variables = orbax.load_variables(path, keep)
            if example is None or not _may_have_boxes(variables):
                return variables
            return orbax.unboxed(variables, initial(module, example))
        expected: Any = None
        if example is not None:
            made = initial(module, example)
            # What conversion and calibration make is in no file.
            expected = {k: nn.meta.unbox(made[k]) for k in made if not k.startswith("aqt")}
        if (table := _table(reference)) is not None:
            return pretrained.load(path, table, expected)
        # As Flax itself names parameters.
        params = None if expected is None else expected["params"]
        return {"params": pretrained.load(path, None, params)}

    rules = None if rules_file is None else Rules.from_json(rules_file.read_text())
    named = load_factory(reference)
    if isinstance(named, Convertible | functions.QuantizedFunction):
        if rules is not None:
            raise _unexpected(reference, "is quantized already, without layers to give rules to")
        return named, load_tree(checkpoint)
    if not callable(named):
        raise _unexpected(reference, f"is of type {type(named).__name__}")
    required, optional, takes_more = _parameters(named)
    if required > 1 or (required == 1 and takes_more):
        function = Function(named) if rules is None else functions.quantize(named, rules)
        return function, load_tree(checkpoint)
    try:
        made: Any = named() if required == 0 else named(QuantMode.TRAIN)
    except TypeError as error:
        raise _unexpected(reference, f"cannot be called as one: {error}") from error
    if isinstance(made, nnx.Module):
        made = made if rules is None else aqt_nnx.quantize(made, rules, rngs=nnx.Rngs(0))
        graph, _ = aqt_nnx.split(made)
        return graph, graph.variables_in(load_tree(checkpoint))
    if isinstance(made, nn.Module):
        takes_mode = required + optional > 0
        if rules is None and not takes_mode:
            raise _unexpected(reference, "gives a linen module for no mode")
        if rules is not None:
            named = overridden(named, rules) if takes_mode else flax.quantize(made, rules)
        return named, load_variables(checkpoint, made)
    raise _unexpected(reference, f"gives an object of type {type(made).__name__}")


def _table(reference: str) -> "Sequence[TensorRule] | None":
    """The table in the module of the model, which was imported for it."""
    return getattr(sys.modules[reference.partition(":")[0]], _TABLE, None)


def _may_have_boxes(tree: Any) -> bool:
    """Whether there is what Orbax saves of a box of metadata, which a parameter may be too."""
    if not isinstance(tree, Mapping):
        return False
    branches = cast(Mapping[str, Any], tree)
    return list(branches) == ["value"] or any(map(_may_have_boxes, branches.values()))


def _parameters(named: Callable[..., Any]) -> tuple[int, int, bool]:
    """How many arguments a call needs, how many more it takes, and whether any others by name."""
    parameters = inspect.signature(named).parameters.values()
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = sum(p.default is p.empty for p in plain)
    return (
        required,
        len(plain) - required,
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _unexpected(reference: str, found: str) -> typer.BadParameter:
    return typer.BadParameter(
        f"{reference!r} {found}, and should be {EXPECTED}", param_hint="--model"
    )
