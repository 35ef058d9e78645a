"""By which configuration each stored tensor was quantized, as a manifest says it.

A configuration stands there once, in the form of `aqt_engine.config.serialization`, under its
fingerprint; each tensor names the fingerprint and the side of the contraction that it is. One more
fingerprint is that of the whole, for comparing versions of a model.

Configurations are imported where they are asked for: a restart asks for none, and they are a tenth
of what it would import.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict

if TYPE_CHECKING:
    from aqt_engine.config import DotGeneral, Tensor

Side = Literal["lhs", "rhs"]


@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor was quantized as the side `side` of the forward contraction of `config`."""

    side: Side
    config: "DotGeneral"

    @property
    def tensor(self) -> "Tensor":
        """How that side is quantized."""
        return self.config.fwd.lhs if self.side == "lhs" else self.config.fwd.rhs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedBy:
    """The same in a manifest: the configuration by its fingerprint."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    side: Side
    configuration: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """By which configuration tensors were quantized: `tensors` by name, `configurations` by print.

    A tensor whose configuration has parts that serialization has no name for, such as a user's own
    numerics, is not among them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    tensors: Mapping[str, QuantizedBy]
    configurations: Mapping[str, dict[str, Any]]
    fingerprint: str

    @staticmethod
    def of(quantized: Mapping[str, Quantized]) -> "Provenance":
        """What there is to say of `quantized`."""
        from aqt_engine.config.serialization import SerializationError, fingerprint, to_dict

        tensors: dict[str, QuantizedBy] = {}
        configurations: dict[str, dict[str, Any]] = {}
        for name, by in sorted(quantized.items()):
            try:
                document = to_dict(by.config)
            except SerializationError:
                continue
            print_ = fingerprint(by.config)
            configurations[print_] = document
            tensors[name] = QuantizedBy(side=by.side, configuration=print_)
        return Provenance(
            tensors=tensors, configurations=configurations, fingerprint=_fingerprint(tensors)
        )

    def quantized(self, name: str) -> Quantized | None:
        """What the tensor `name` was quantized by, if that is known."""
        by = self.tensors.get(name)
        if by is None:
            return None
        from aqt_engine.config.serialization import from_dict

        return Quantized(by.side, from_dict(self.configurations[by.configuration]))

    def check(self) -> None:
        """Checks every fingerprint against what it is of.

        Raises:
          ValueError: one is of something else, or a configuration is missing or cannot be read.
        """
        from aqt_engine.config.serialization import fingerprint, from_dict

        for print_, document in self.configurations.items():
            found = fingerprint(from_dict(document))
            if found != print_:
                raise ValueError(f"configuration {print_[:12]} has the fingerprint {found[:12]}")
        if {by.configuration for by in self.tensors.values()} != set(self.configurations):
            raise ValueError("the configurations are not those that the tensors name")
        if self.fingerprint != _fingerprint(self.tensors):
            raise ValueError(
                f"the configurations have the fingerprint {_fingerprint(self.tensors)[:12]}, and "
                f"{self.fingerprint[:12]} is stated"
            )


def _fingerprint(tensors: Mapping[str, QuantizedBy]) -> str:
    stated = {name: [by.side, by.configuration] for name, by in tensors.items()}
    text = json.dumps(stated, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


OF_NOTHING = _fingerprint({})
"""The fingerprint where nothing is known."""
