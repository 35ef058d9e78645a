"""What quantizing one contraction costs a model, with all others in float."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine.analysis.measurement import error, ratio_db
from aqt_engine.analysis.observation import Arrays, Place, Variables
from aqt_engine.config import DotGeneral, DotGeneralRaw, Tensor, int_numerics, raw
from aqt_engine.convertible import ModelFactory
from aqt_engine.flax.overriding import Choose, Override
from aqt_engine.modes import QuantMode

Score = Callable[[Any], float]
"""From a model's answer to how good it is: larger is better."""

Bits = Mapping[Place, int | None]
"""The bits of contractions by their places; None is float."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How a quantized model answers.

    `sqnr_db` compares its float outputs with those of the model in float, in decibels. `score` is
    what the caller's `Score` makes of the answer; None where there is none.
    """

    sqnr_db: float
    score: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The quality of a model in which only the contraction at `place` is quantized."""

    place: Place
    bits: int
    quality: Quality


class Evaluator:
    """Runs a model on one batch with any contraction in any number of bits.

    Args:
      model: gives the linen module for a mode.
      variables: what was trained, and calibrated where it is quantized statically.
      inputs: the batch, by the names of the module's arguments.
      score: what a good answer is, if that is known.
    """

    def __init__(
        self, model: ModelFactory, variables: Variables, inputs: Arrays, score: Score | None = None
    ):
        self._module = model(QuantMode.TRAIN)
        self._variables = variables
        self._inputs = dict(inputs)
        self._score = score
        self._in_float = self._answer(lambda place, own: None)

    def in_float(self) -> Quality:
        """The quality of the model with no contraction quantized."""
        return self._quality(self._in_float)

    def as_it_is(self) -> Quality:
        """The quality of the model with its own configurations."""
        return self._quality(self._answer(lambda place, own: own))

    def at(self, bits: Bits) -> Quality:
        """The quality with contractions at `bits`, and those that it does not name in float."""

        def choose(place: Place, own: DotGeneral) -> DotGeneral | None:
            width = bits.get(place)
            return None if width is None else at_bits(own, width)

        return self._quality(self._answer(choose))

    def _answer(self, choose: Choose) -> Any:
        def call(module: nn.Module, inputs: Arrays) -> Any:
            return module(**inputs)

        @jax.jit
        def run(variables: Variables, inputs: Arrays) -> Any:
            with nn.intercept_methods(Override(choose)):
                return self._module.apply(variables, inputs, method=call)

        return jax.tree.map(np.asarray, run(self._variables, self._inputs))

    def _quality(self, answer: Any) -> Quality:
        pairs = zip(jax.tree.leaves(self._in_float), jax.tree.leaves(answer), strict=True)
        sums = [error(a, b) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.floating)]
        power, noise = (float(sum(s)) for s in zip(*sums, strict=True)) if sums else (0.0, 0.0)
        score = None if self._score is None else float(self._score(answer))
        return Quality(sqnr_db=ratio_db(power, noise), score=score)


def sensitivities(
    evaluator: Evaluator,
    places: Sequence[Place],
    bits: Sequence[int],
    on_trial: Callable[[], None] = lambda: None,
) -> tuple[Sensitivity, ...]:
    """What each contraction costs alone, at each of `bits`; `on_trial` is called after each."""
    found: list[Sensitivity] = []
    for place in places:
        for width in bits:
            found.append(Sensitivity(place=place, bits=width, quality=evaluator.at({place: width})))
            on_trial()
    return tuple(found)


def at_bits(config: DotGeneral, bits: int) -> DotGeneral:
    """`config` with the quantized sides of its forward pass as integers of `bits` bits."""

    def side(tensor: Tensor) -> Tensor:
        if not tensor.is_quantized:
            return tensor
        return dataclasses.replace(tensor, numerics=int_numerics(bits))

    forward: DotGeneralRaw = raw(side(config.fwd.lhs), side(config.fwd.rhs))
    forward = dataclasses.replace(forward, local_aqt=config.fwd.local_aqt)
    return dataclasses.replace(config, fwd=forward)


def accuracy(labels: np.ndarray[Any, Any], output: str | None = None) -> Score:
    """The share of rows whose class is that of `labels`, from 0 to 1.

    The class is the largest value of a float output, or the value of an integer one. `output` names
    it where the model gives several.

    Raises:
      ValueError: the answer has no such output, or not as many rows as there are labels.
    """

    def score(answer: Any) -> float:
        named = cast(Mapping[str, Any], answer) if isinstance(answer, Mapping) else {"": answer}
        if output is None and len(named) > 1:
            raise ValueError(
                f"the model answers with {', '.join(sorted(named))}: name the output that has "
                f"the classes"
            )
        chosen = next(iter(named)) if output is None else output
        if chosen not in named:
            raise ValueError(f"the model has no output {chosen!r}, but {', '.join(sorted(named))}")
        values = np.asarray(named[chosen])
        classes = values if values.dtype.kind in "iu" else values.argmax(axis=-1)
        if classes.shape != labels.shape:
            raise ValueError(
                f"output {chosen!r} classifies {list(classes.shape)} and the labels are "
                f"{list(labels.shape)}: give one label for each"
            )
        return float((classes == labels).mean())

    return score
