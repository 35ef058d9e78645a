"""Calls of the identity in a graph (`materialization`): what stands apart, and how they go."""

from collections.abc import Iterator
from typing import Any

from jax.extend.mlir import ir

from aqt_engine.materialization import NAME

# MLIR's bindings are typed only in part.
Value = Any


def comes_materialized(value: Value) -> bool:
    """Whether `value` is what a call of the identity gives, on the platform that has one."""
    made = value.owner
    if isinstance(made, ir.Block):
        return False
    return is_identity(made) or _chooses_identity(made)


def goes_materialized(value: Value) -> bool:
    """Whether all that is done with `value` is to call the identity, where there is one."""
    for use in value.uses:
        user: Any = use.owner.operation
        if user.name == "stablehlo.return" and user.parent.name == "stablehlo.case":
            choice = user.parent
            if not _chooses_identity(choice) and not goes_materialized(choice.results[0]):
                return False
        elif not is_identity(user):
            return False
    return True


def materialized_from(value: Value) -> Value:
    """What the identity was called with that gives `value`."""
    made = value.owner
    identity = made if is_identity(made) else next(_identities_chosen(made))
    return identity.operands[0]


def bypass_identities(value: Value, by: Value) -> None:
    """Puts `by` in the place of what calls of the identity with `value` give."""
    # A choice by platform uses it in several branches.
    seen: list[Any] = []
    for use in value.uses:
        user: Any = use.owner.operation
        choice = user.parent if user.parent.name == "stablehlo.case" else None
        if choice is None and is_identity(user):
            seen.append(user)
        elif choice is None or choice in seen:
            continue
        elif user.name == "stablehlo.return" or _chooses_identity(choice):
            seen.append(choice)
    for op in seen:
        if op.name == "func.call" or any(i.operands[0] == value for i in _identities_chosen(op)):
            op.results[0].replace_all_uses_with(by)
            op.erase()
        elif not _chooses_identity(op):
            bypass_identities(op.results[0], by=op.results[0])


def _chooses_identity(op: Any) -> bool:
    """Whether `op` chooses by platform, and on one of them calls the identity."""
    return op.name == "stablehlo.case" and any(_identities_chosen(op))


def _identities_chosen(case: Any) -> Iterator[Any]:
    """The calls of the identity that are all that branches of `case` do."""
    for region in case.operation.regions:
        end = list(region.blocks[0].operations)[-1]
        made = end.operands[0].owner
        if is_identity(made):
            yield made


def is_identity(op: Any) -> bool:
    """Whether `op`, or the block that a value is an argument of, is a call of the identity."""
    if isinstance(op, ir.Block) or op.name != "func.call":
        return False
    callee: Any = op.attributes["callee"]
    return callee.value.startswith(NAME)
