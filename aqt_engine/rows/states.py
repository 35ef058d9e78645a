"""What a value of a computation is to the rows of a batch."""

import dataclasses
import functools
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import flax
import jax
from jax.extend.core import JaxprEqn


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """An operation of a model: its primitive, the path of its module, and the line it is on."""

    primitive: str
    path: str
    source: str

    def __str__(self) -> str:
        place = f" in {self.path}" if self.path else ""
        line = f" ({self.source})" if self.source else ""
        return f"`{self.primitive}`{place}{line}"


@dataclasses.dataclass(frozen=True, slots=True)
class Free:
    """The same for every batch. `random` is where it was drawn, if it was."""

    random: Op | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Along:
    """Each row has its own part: index i of `axis` belongs to row `i // inner % rows`.

    The axis is `outer` times the rows times `inner` long: rows that were merged with what stood
    before or after them.
    """

    axis: int
    outer: int = 1
    inner: int = 1

    def at(self, axis: int) -> "Along":
        """The same at another axis."""
        return dataclasses.replace(self, axis=axis)


@dataclasses.dataclass(frozen=True, slots=True)
class Mixed:
    """The part of one row depends on other rows, or on where it lies: `op` `does` that."""

    op: Op
    does: str


@dataclasses.dataclass(frozen=True, slots=True)
class Unknown:
    """It cannot be said from the program alone."""


State = Free | Along | Mixed | Unknown


def joined(states: Iterable[State]) -> State:
    """What a value is that may be any of these."""
    return functools.reduce(_join, states, Free())


def _join(a: State, b: State) -> State:
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Mixed):
            return one
        if isinstance(one, Free) and (one.random is None or not isinstance(other, Free)):
            return other
    return a if a == b or isinstance(b, Free) else Unknown()


def op_of(eqn: JaxprEqn, within: Op | None) -> Op:
    """Where `eqn` is in the model; `within` is the call that it is in."""
    inner, source = str(eqn.source_info.name_stack), _source(eqn)
    if within is None:
        return Op(primitive=eqn.primitive.name, path=inner, source=source)
    path = "/".join(part for part in (within.path, inner) if part)
    # What a library compiles by itself does not know who called it.
    return Op(primitive=eqn.primitive.name, path=path, source=source or within.source)


_LIBRARIES = tuple(
    str(Path(path)) + "/"
    for path in (
        Path(jax.__file__).parent,
        Path(flax.__file__).parent,
        Path(__file__).parent.parent,
        sysconfig.get_path("stdlib"),
    )
)


def _source(eqn: JaxprEqn) -> str:
    """The line of the model, and of the library that it calls only if there is no other."""
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback else []
    installed = sysconfig.get_path("purelib")
    for libraries in ((*_LIBRARIES, installed), _LIBRARIES):
        for frame in frames:
            # Before the standard library, as the packages are in a directory of it.
            if not frame.file_name.startswith(libraries):
                return f"{frame.file_name}:{frame.line_num}, {frame.function_name}"
    return ""
