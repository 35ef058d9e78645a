"""What is said of each model: which of its versions are served, under which names, in which shares.

It stands in a TOML file, a table for each model; what a model's table leaves out is in `["*"]`:

    ["*"]
    versions = { latest = 2 }           # or "all", the default, or [1, 3]

    [digits]
    aliases = { stable = 3, canary = 4 }
    split = { stable = 90, canary = 10 }

The file is read again when it changes.
"""

import hashlib
import math
import random
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import pydantic
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)

from aqt_server.security.watched import Watched, of_setting

_DEFAULT = "*"
_NOTHING: Mapping[str, Any] = {}


class PolicyFileError(Exception):
    """The file of policies cannot be used; the message says why and where."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class Versions:
    """Which versions are served: the newest `latest` that can be, or those in `numbers`, or all."""

    latest: int | None = None
    numbers: frozenset[int] | None = None


def _versions(given: Any) -> Versions:
    match given:
        case Versions():
            return given
        case "all":
            return Versions()
        case {"latest": int(count), **others} if 0 < count < 2**31 and not others:
            return Versions(latest=count)
        case [*numbers] if numbers and all(type(n) is int and 0 < n < 2**63 for n in numbers):
            return Versions(numbers=frozenset(cast(list[int], numbers)))
        case _:
            raise ValueError(f'is "all", {{ latest = 2 }} or [1, 3], and got {given!r}')


def _alias(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
        raise ValueError("an alias begins with a letter, and has letters, digits, '_', '.', '-'")
    return name


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class Policy:
    """What is said of one model.

    `aliases` are names for versions. `split` has the weights by which requests that name no version
    are shared out among aliases or numbers. The rest is of the queue of each version that is loaded
    from now on: how many rows it holds (None: as the settings say), and how long requests wait
    there for others, until they have together as many rows as one of `preferred_rows`. Without
    `response_cache` no answers are kept, whatever the settings say.
    """

    versions: Annotated[Versions, BeforeValidator(_versions)] = Versions()
    aliases: Mapping[Annotated[str, AfterValidator(_alias)], PositiveInt] = Field(
        default_factory=dict
    )
    split: Mapping[str, PositiveFloat] = Field(default_factory=dict)
    queue_rows: PositiveInt | None = None
    max_delay_ms: NonNegativeFloat = 0.0
    preferred_rows: tuple[PositiveInt, ...] = ()
    response_cache: bool = True

    def __post_init__(self):
        for target in self.split:
            if self.number(target) is None:
                raise ValueError(f"split has {target!r}, which is no alias and no version")
        if self.preferred_rows and not self.max_delay_ms:
            raise ValueError("preferred_rows needs max_delay_ms, for else nothing waits")

    def number(self, version: str) -> int | None:
        """The version that `version` names, an alias or a number; None if it is neither."""
        if version.isascii() and version.isdecimal() and len(version) < 20:
            return int(version)
        return self.aliases.get(version)

    def serves(self, version: int, *, newer: int) -> bool:
        """Whether `version` is to be served where `newer` newer ones are."""
        named = {*self.aliases.values(), *map(self.number, self.split)}
        if version in named:
            return True
        if self.versions.numbers is not None:
            return version in self.versions.numbers
        return self.versions.latest is None or newer < self.versions.latest

    def share(
        self, ready: Collection[int], request_id: str, randomness: random.Random
    ) -> int | None:
        """The version in whose share a request falls; None where none of the split is `ready`.

        One with an id falls into the same share here, after a restart and in every replica, and
        changes it only if the weights change or its version comes or goes: each target draws a
        number from the id and its own name, and the best draw for its weight wins (weighted
        rendezvous hashing). One without an id is drawn by `randomness`.
        """
        weights = {t: w for t, w in self.split.items() if self.number(t) in ready}
        if not weights:
            return None
        if not request_id:
            (target,) = randomness.choices(list(weights), list(weights.values()))
            return self.number(target)
        return self.number(max(weights, key=lambda t: math.log(_draw(request_id, t)) / weights[t]))


_WITHOUT = Policy()
"""That of a model that the file does not name."""


def _draw(request_id: str, target: str) -> float:
    """A number between 0 and 1, neither of them."""
    found = hashlib.blake2b(f"{target}\0{request_id}".encode(), digest_size=6).digest()
    return (int.from_bytes(found) + 0.5) / 2**48


class Policies:
    """The policy of every model.

    Raises:
      PolicyFileError: `file` cannot be used. If that is so after a change, what held before holds.
    """

    def __init__(self, file: Path | None):
        self._read: Watched[Mapping[str, Policy]] | None = None
        if file:
            self._read = of_setting("--model-policies", file, lambda: _read(file), PolicyFileError)

    def of(self, name: str) -> Policy:
        """The policy of the model `name`."""
        policies = self._read.value if self._read else _NOTHING
        return policies.get(name) or policies.get(_DEFAULT) or _WITHOUT


def _read(file: Path) -> Mapping[str, Policy]:
    try:
        tables = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeError) as error:
        raise PolicyFileError(f"{file} is no TOML: {error}") from error
    defaults = tables.get(_DEFAULT, {})
    found: dict[str, Policy] = {}
    for name, table in tables.items():
        if not isinstance(table, dict) or not isinstance(defaults, dict):
            raise PolicyFileError(f"{file} is made of tables, one for each model: {name} is none")
        try:
            found[name] = pydantic.TypeAdapter(Policy).validate_python(defaults | table)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (name, *first["loc"])))
            what = first["msg"].removeprefix("Value error, ")
            raise PolicyFileError(f"{file}: {where}: {what[:1].lower()}{what[1:]}") from error
    return found
