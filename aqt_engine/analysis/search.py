"""Mixed precision: bits for each contraction, within a budget of bytes or of quality.

Quantization noises of different contractions are nearly independent, so that their powers add up
in a model's output; that makes one trial for each contraction and number of bits enough to
predict every mixture. All start at the most bits. Then, one at a time, the contraction is lowered
that adds the least noise for the bytes it saves. How good a mixture is, is measured in the end.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from aqt_engine.analysis.observation import Contraction, Place
from aqt_engine.analysis.sensitivity import Evaluator, Quality, Sensitivity, at_bits
from aqt_engine.config import DotGeneral
from aqt_engine.rules import Rule, Rules


@dataclasses.dataclass(frozen=True, slots=True)
class SizeBudget:
    """At most `nbytes` bytes of quantized weights, scales included."""

    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class ScoreBudget:
    """A score of at least `score`, in the units of the evaluator's `Score`."""

    score: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Bits by place, what they take and how the model then answers."""

    bits: Mapping[Place, int]
    nbytes: int
    quality: Quality

    def rules(self, config: DotGeneral) -> Rules:
        """A rule for each contraction: `config` at its bits."""
        return Rules(
            tuple(
                Rule(
                    name=":".join(place),
                    modules=re.escape(place[0]),
                    ops=re.escape(place[1]),
                    config=at_bits(config, width),
                )
                for place, width in self.bits.items()
            )
        )


class BudgetError(ValueError):
    """No mixture keeps the budget; the message says what the nearest one takes."""


def search(
    evaluator: Evaluator,
    contractions: Sequence[Contraction],
    alone: Sequence[Sensitivity],
    budget: SizeBudget | ScoreBudget,
) -> Mixture:
    """The mixture with the least predicted noise that keeps a size, or the smallest with a score.

    Args:
      evaluator: measures mixtures.
      contractions: those of the model.
      alone: the sensitivity of each of them at each number of bits that may be chosen.
      budget: what to keep.

    Raises:
      BudgetError: nothing among these numbers of bits keeps the budget.
    """
    steps = _descent({c.place: c for c in contractions}, alone)
    match budget:
        case SizeBudget(nbytes):
            fitting = [step for step in steps if step.nbytes <= nbytes]
            if not fitting:
                raise BudgetError(
                    f"the smallest mixture takes {steps[-1].nbytes:,} bytes and the budget is "
                    f"{nbytes:,}: allow more bytes, or fewer bits"
                )
            return _measured(evaluator, fitting[0])
        case ScoreBudget(score):
            return _smallest_scoring(evaluator, steps, score)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    bits: Mapping[Place, int]
    nbytes: int


def weight_bytes(contraction: Contraction, bits: int) -> int:
    """The bytes that a contraction's weights would take at `bits` bits, scales as they are."""
    total = 0
    for operand in contraction.operands.values():
        if operand.is_weight:
            values = operand.values
            total += operand.nbytes - _packed(values, operand.bits) + _packed(values, bits)
    return total


def _packed(values: int, bits: int) -> int:
    return -(-values * bits // 8)


def _descent(
    contractions: Mapping[Place, Contraction], alone: Sequence[Sensitivity]
) -> Sequence[_Step]:
    """Mixtures from the most bits to the fewest, each one contraction lower than the last."""
    noise = {(s.place, s.bits): 10 ** (-s.quality.sqnr_db / 10) for s in alone}
    choices = sorted({s.bits for s in alone}, reverse=True)
    level = dict.fromkeys(contractions, 0)

    def size(place: Place, choice: int) -> int:
        return weight_bytes(contractions[place], choices[choice])

    def price(place: Place) -> float:
        now, lower = level[place], level[place] + 1
        added = noise[place, choices[lower]] - noise[place, choices[now]]
        saved = size(place, now) - size(place, lower)
        # What holds no weight saves nothing: it goes last, and the least harmful of those first.
        return added / saved if saved > 0 else float("inf")

    def step() -> _Step:
        return _Step(
            bits={place: choices[i] for place, i in level.items()},
            nbytes=sum(size(place, i) for place, i in level.items()),
        )

    steps = [step()]
    while open_places := [p for p, i in level.items() if i + 1 < len(choices)]:
        cheapest = min(open_places, key=price)
        if price(cheapest) == float("inf"):
            break
        level[cheapest] += 1
        steps.append(step())
    return steps


def _measured(evaluator: Evaluator, step: _Step) -> Mixture:
    return Mixture(bits=step.bits, nbytes=step.nbytes, quality=evaluator.at(step.bits))


def _smallest_scoring(evaluator: Evaluator, steps: Sequence[_Step], score: float) -> Mixture:
    """By bisection, as scores fall along the descent; each mixture that counts is measured."""
    best = _measured(evaluator, steps[0])
    if best.quality.score is None:
        raise BudgetError("there is no score to keep: give labels, or a budget of bytes")
    if best.quality.score < score:
        raise BudgetError(
            f"with the most bits everywhere the score is {best.quality.score:.4f} and the budget "
            f"is {score:.4f}: allow a lower score, or more bits"
        )
    low, high = 0, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        mixture = _measured(evaluator, steps[middle])
        assert mixture.quality.score is not None
        if mixture.quality.score >= score:
            best, low = mixture, middle
        else:
            high = middle
    return best
