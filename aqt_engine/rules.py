"""Which contraction of a model is quantized, and how: rules that need no change to the model.

A rule names modules and ops by regular expressions and gives their contractions a configuration;
the first rule that matches wins, and what no rule matches stays in float. This module knows no
framework. An adapter, such as `aqt_engine.flax.injection`, does three things with it:

- asks `Rules.for_contraction(path, op)` at each contraction for its configuration;
- while it traces a model, makes a `Contraction` of each, and of those that it cannot reach;
- gives them to `Report`, whose `check` raises when a rule has no effect.

A path is "encoder/layer_0/Dense_1", "" for the model itself. An op is named by what is called:
"dot_general", "einsum", "conv_general_dilated", "attend", and for the two contractions in an
attention layer "qk_attn_weights_einsum" and "attn_weights_value_einsum".
"""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from aqt_engine.config import DotGeneral
from aqt_engine.config.serialization import Document


class RuleError(ValueError):
    """Rules that have no effect on a model; the message lists them and the model's contractions."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: in modules and for ops that match, contractions are quantized by `config`.

    `modules` and `ops` are regular expressions that must match the whole path and the whole op
    name; `ops="dot_general|einsum"` names two. `config` None leaves the contraction in float.
    `name` is for reports and errors.

    Raises:
      ValueError: `modules` or `ops` is no regular expression.
    """

    modules: str
    config: DotGeneral | None
    ops: str = ".*"
    name: str | None = None

    def __post_init__(self):
        for field, pattern in (("modules", self.modules), ("ops", self.ops)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"`{field}={pattern!r}` is no regular expression: {error}"
                ) from error

    def matches(self, path: str, op: str) -> bool:
        """Whether the rule is about the contraction `op` of the module at `path`."""
        return bool(re.fullmatch(self.modules, path) and re.fullmatch(self.ops, op))


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """Rules in order: the first that matches a contraction decides.

    Raises:
      ValueError: two rules have the same name.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self):
        object.__setattr__(self, "rules", tuple(self.rules))
        names = [rule.name for rule in self.rules if rule.name is not None]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"rules must have different names, got {', '.join(repeated)} twice")

    def first_match(self, path: str, op: str) -> int | None:
        """The index of the rule that decides about a contraction, or None."""
        matching = (i for i, rule in enumerate(self.rules) if rule.matches(path, op))
        return next(matching, None)

    def for_contraction(self, path: str, op: str) -> DotGeneral | None:
        """The configuration of a contraction; None leaves it in float."""
        index = self.first_match(path, op)
        return None if index is None else self.rules[index].config

    def label(self, index: int) -> str:
        """The name of a rule, or else its number, counted from 0."""
        return self.rules[index].name or f"rule {index}"

    def to_json(self) -> str:
        """The rules as canonical JSON, in the form of `aqt_engine.config.serialization`."""
        return _DOCUMENT.to_json(self.rules)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Rules":
        """The rules that `to_json` wrote.

        Raises:
          SerializationError: `text` is not in that form.
        """
        return cls(_DOCUMENT.from_json(text))


_DOCUMENT: Document[tuple[Rule, ...]] = Document("rules", tuple[Rule, ...])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contraction:
    """One contraction of a model, as its adapter found it.

    `lhs` and `rhs` are the shape and dtype of its operands. `hint`, for one that the adapter cannot
    quantize, says what to do about it; it is then in float whatever the rules say.
    """

    path: str
    op: str
    lhs: jax.ShapeDtypeStruct
    rhs: jax.ShapeDtypeStruct
    hint: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Which contraction of a model got which rule."""

    rules: Rules
    contractions: tuple[Contraction, ...]

    def rule_of(self, contraction: Contraction) -> int | None:
        """The index of the rule that decided about it; None if none did, or none can."""
        if contraction.hint is not None:
            return None
        return self.rules.first_match(contraction.path, contraction.op)

    @property
    def unreachable(self) -> tuple[Contraction, ...]:
        """The contractions that stay in float whatever the rules say."""
        return tuple(c for c in self.contractions if c.hint is not None)

    def check(self) -> None:
        """Refuses rules without effect: those that match nothing, or never first.

        Raises:
          RuleError: there are such rules; it lists them all, and the contractions there are.
        """
        deciding = {self.rule_of(c) for c in self.contractions}
        idle = [i for i in range(len(self.rules.rules)) if i not in deciding]
        if not idle:
            return
        places = sorted({_place(c) for c in self.contractions if c.hint is None})
        raise RuleError(
            "; ".join(f"{self._described(i)} {self._why_idle(i)}" for i in idle)
            + f". Change or remove them; the model contracts at: {', '.join(places) or 'no place'}"
        )

    def table(self) -> Table:
        """The report for a terminal: `rich.print(report.table())`."""
        table = Table("path", "op", "lhs", "rhs", "rule")
        for c in self.contractions:
            table.add_row(c.path, c.op, _shown(c.lhs), _shown(c.rhs), self._decision(c))
        return table

    def to_json(self) -> str:
        """A list with an object for each contraction: its path, op, operands, rule and hint."""
        return json.dumps([self._entry(c) for c in self.contractions], indent=2)

    def _described(self, index: int) -> str:
        rule = self.rules.rules[index]
        return f"{self.rules.label(index)} (modules={rule.modules!r}, ops={rule.ops!r})"

    def _why_idle(self, index: int) -> str:
        rule = self.rules.rules[index]
        met = [c for c in self.contractions if rule.matches(c.path, c.op)]
        before = {i for c in met if (i := self.rule_of(c)) is not None}
        if before:
            return "is shadowed by " + ", ".join(self.rules.label(i) for i in sorted(before))
        if met:
            return "matches only what cannot be reached: " + ", ".join(map(_place, met))
        return "matches nothing"

    def _decision(self, contraction: Contraction) -> str:
        if contraction.hint is not None:
            return f"not reachable: {contraction.hint}"
        index = self.rule_of(contraction)
        if index is None:
            return "float"
        in_float = self.rules.rules[index].config is None
        return self.rules.label(index) + (" (float)" if in_float else "")

    def _entry(self, contraction: Contraction) -> dict[str, Any]:
        index = self.rule_of(contraction)
        return {
            "path": contraction.path,
            "op": contraction.op,
            "lhs": _plain(contraction.lhs),
            "rhs": _plain(contraction.rhs),
            "rule": index,
            "name": None if index is None else self.rules.rules[index].name,
            "hint": contraction.hint,
        }


def operand(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, or of anything that has both."""
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype))


def _place(contraction: Contraction) -> str:
    return f"{contraction.path}:{contraction.op}"


def _shown(x: jax.ShapeDtypeStruct) -> str:
    # Not brackets: rich would read them as markup.
    return f"{x.dtype.name} {'x'.join(map(str, x.shape)) or 'scalar'}"


def _plain(x: jax.ShapeDtypeStruct) -> dict[str, Any]:
    return {"dtype": x.dtype.name, "shape": list(x.shape)}
