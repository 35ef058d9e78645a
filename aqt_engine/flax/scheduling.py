"""A linen model in training whose quantization follows a schedule.

    model = ScheduledModel(Mlp(), delayed(rules, start=1000, freeze_statistics_at=5000))
    variables = model.init(key, x)

    @jax.jit
    def train_step(state):
        def loss(params):
            variables = {**state.variables, "params": params}
            answer, changed = model.apply(variables, x, step=state.step)
            ...

`changed` holds the statistics of static calibrations: keep them with the other variables. For
`convert`, `model.factory(step)` is the model as it is trained at that step.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from aqt_engine.convertible import STATISTICS
from aqt_engine.flax.injection import quantize
from aqt_engine.modes import QuantMode
from aqt_engine.rules import Rules
from aqt_engine.schedule import Phase, Schedule

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ScheduledModel:
    """`model`, quantized at each train step by the rules of `schedule`'s phase."""

    model: nn.Module
    schedule: Schedule

    def factory(self, step: int) -> Callable[[QuantMode], nn.Module]:
        """From a mode to the model as it is trained at `step`, as `convert` takes it."""
        return quantize(self.model, self.schedule.at(step).rules or Rules(()))

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's variables, and the statistics of all phases.

        Raises:
          ValueError: two phases keep different statistics for the same contraction.
        """
        variables: dict[str, Any] = {}
        for phase in self.schedule.timeline:
            module = self.factory(phase.begin)(QuantMode.TRAIN)
            fresh = cast(Variables, module.init(rngs, *args, **kwargs))
            statistics = _merged(variables.get(STATISTICS, {}), fresh.get(STATISTICS, {}))
            variables = {**fresh, STATISTICS: statistics} if statistics else {**fresh}
        return variables

    def apply(
        self,
        variables: Variables,
        *args: Any,
        step: int | jax.Array,
        rngs: Any = None,
        mutable: Sequence[str] = (),
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """What the model answers at train step `step`, and the collections that it may change.

        These are those that `mutable` names, and the statistics, unless the model keeps none. The
        step may be traced: one compiled program then serves all phases.
        """
        kept = [name for name in (*mutable, STATISTICS) if name in variables]

        def run(phase: Phase) -> tuple[Any, dict[str, Any]]:
            module = self.factory(phase.begin)(QuantMode.TRAIN)
            learning = [n for n in kept if n != STATISTICS or not phase.freeze_statistics]
            answer, changed = module.apply(variables, *args, rngs=rngs, mutable=learning, **kwargs)
            return answer, {name: changed.get(name, variables[name]) for name in kept}

        return self.schedule.switch(step, run)


def _merged(one: Variables, other: Variables) -> dict[str, Any]:
    """The statistics of both; where both have some, they must be of one form."""
    mine, theirs = _by_place(one), _by_place(other)
    unlike = [
        "/".join(place)
        for place in mine.keys() & theirs.keys()
        if jax.tree.map(jnp.shape, mine[place]) != jax.tree.map(jnp.shape, theirs[place])
    ]
    if unlike:
        raise ValueError(
            f"phases of the schedule keep different statistics for {', '.join(sorted(unlike))}: "
            f"use one calibration in all of them"
        )
    return traverse_util.unflatten_dict({**mine, **theirs})


def _by_place(statistics: Variables) -> dict[tuple[str, ...], Any]:
    """The statistics of each contraction's side."""

    def is_one(_: Any, value: Mapping[str, Any]) -> bool:
        return "count" in value

    return dict(traverse_util.flatten_dict(dict(statistics), is_leaf=is_one))
