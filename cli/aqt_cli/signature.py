"""The options of `aqt convert` that say what a request may choose."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from aqt_engine.convert import Signature


def parse(
    shapes: Sequence[str], lengths: Sequence[str], pads: Sequence[str], per_request: Sequence[str]
) -> "Signature":
    """The signature that the options give.

    Raises:
      typer.BadParameter: one is not of the form NAME=VALUE, or its value is no number.
    """
    from aqt_engine.convert import Signature

    return Signature(
        shapes={
            name: tuple(int(dim) if dim.isdecimal() else dim for dim in value.split(","))
            for name, value in (_pair(option, "--shape") for option in shapes)
        },
        lengths={
            name: tuple(int(_number(size, "--lengths")) for size in value.split(","))
            for name, value in (_pair(option, "--lengths") for option in lengths)
        },
        pads={
            name: _number(value, "--pad")
            for name, value in (_pair(option, "--pad") for option in pads)
        },
        per_request=tuple(per_request),
    )


def _pair(option: str, flag: str) -> tuple[str, str]:
    name, equals, value = option.partition("=")
    if not (name and equals and value):
        raise typer.BadParameter(f"{option!r} is not of the form NAME=VALUE", param_hint=flag)
    return name, value


def _number(text: str, flag: str) -> float:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is no number", param_hint=flag) from None
