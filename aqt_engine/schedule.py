"""When a model is quantized in training: phases of rules, by the number of optimizer steps done.

    schedule = delayed(rules, start=1000, freeze_statistics_at=5000)
    answer = schedule.switch(step, lambda phase: forward(phase, variables, x))

`switch` takes a Python int, and then runs what the step's phase needs and nothing else; or a traced
step, and then one compiled program serves all phases. Between phases, before the first and after
the last, a model is in float. `aqt_engine.flax.scheduling` is the forward of a linen model.

Starting late and freezing scales are as in Abdolrashidi et al., arXiv:2105.03536.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine.config.serialization import Document
from aqt_engine.rules import Rules

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The steps from `begin` up to, not including, `end`; None is without end.

    In these steps a model is quantized by `rules`, or in float where that is None. With
    `freeze_statistics` static calibrations keep what they have learned before and learn no more.

    Raises:
      ValueError: the phase holds no step, or begins before step 0.
    """

    rules: Rules | None
    begin: int = 0
    end: int | None = None
    freeze_statistics: bool = False

    def __post_init__(self):
        if self.begin < 0 or (self.end is not None and self.end <= self.begin):
            raise ValueError(
                f"a phase must begin at step 0 or later and end after that, got "
                f"begin={self.begin} and end={self.end}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """Phases in order. At every step exactly one is active, and where none is given, one in float.

    Raises:
      ValueError: a phase begins before the one in front of it has ended.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self):
        object.__setattr__(self, "phases", tuple(self.phases))
        for before, after in zip(self.phases, self.phases[1:], strict=False):
            if before.end is None or after.begin < before.end:
                raise ValueError(
                    f"phases must be in order and apart, and one that begins at {before.begin} and "
                    f"ends at {before.end} is followed by one that begins at {after.begin}"
                )

    @property
    def timeline(self) -> tuple[Phase, ...]:
        """The phases from step 0 on without a gap: those given, and float ones between them."""
        timeline: list[Phase] = []
        done: int | None = 0
        for phase in self.phases:
            assert done is not None
            if done < phase.begin:
                timeline.append(Phase(rules=None, begin=done, end=phase.begin))
            timeline.append(phase)
            done = phase.end
        if done is not None:
            timeline.append(Phase(rules=None, begin=done))
        return tuple(timeline)

    def at(self, step: int) -> Phase:
        """The phase of a step.

        Raises:
          ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"`step` must be at least 0, got {step}")
        return next(p for p in reversed(self.timeline) if p.begin <= step)

    def switch(self, step: int | jax.Array, run: Callable[[Phase], _T]) -> _T:
        """What `run` gives for the phase of `step`, which may be traced.

        For a step that is no Python int, `run` is traced once for each phase, and the results of
        all have to have the same form. Differentiable. A traced step below 0 is taken as 0.
        """
        if isinstance(step, int | np.integer):
            return run(self.at(int(step)))
        timeline = self.timeline
        begins = jnp.asarray([phase.begin for phase in timeline])
        index = jnp.searchsorted(begins, step, side="right") - 1
        branches = [lambda phase=phase: run(phase) for phase in timeline]
        return jax.lax.switch(index, branches)

    def to_json(self) -> str:
        """The phases as canonical JSON, in the form of `aqt_engine.config.serialization`."""
        return _DOCUMENT.to_json(self.phases)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Schedule":
        """The schedule that `to_json` wrote.

        Raises:
          SerializationError: `text` is not in that form.
        """
        return cls(_DOCUMENT.from_json(text))


_DOCUMENT: Document[tuple[Phase, ...]] = Document("phases", tuple[Phase, ...])


def delayed(rules: Rules, *, start: int, freeze_statistics_at: int | None = None) -> Schedule:
    """In float before step `start`, then quantized; its statistics are frozen from a step on.

    Raises:
      ValueError: statistics would be frozen before anything is quantized.
    """
    if freeze_statistics_at is None:
        return Schedule((Phase(rules=rules, begin=start),))
    return Schedule(
        (
            Phase(rules=rules, begin=start, end=freeze_statistics_at),
            Phase(rules=rules, begin=freeze_statistics_at, freeze_statistics=True),
        )
    )
