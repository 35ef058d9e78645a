"""Schedules: what is quantized at which step of training, in one compiled program or in several."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from aqt_engine import QuantMode, config
from aqt_engine.config.serialization import SerializationError
from aqt_engine.flax import quantize
from aqt_engine.flax.scheduling import ScheduledModel
from aqt_engine.rules import Rule, Rules
from aqt_engine.schedule import Phase, Schedule, delayed
from aqt_engine.statistics import DelayedScalingCalibration, WeightedStatsCalibration
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.in_haste

START, FREEZE, STEPS = 2, 4, 6
STATISTICS = "aqt_statistics"


def static(calibration):
    return config.update(
        config.config_v4(8, 8, 8, use_stochastic_rounding=False),
        "fwd.lhs",
        calibration=calibration,
        calibration_mode=config.CalibrationMode.ALL_AXES,
    )


RULES = Rules((Rule(modules=".*", config=static(WeightedStatsCalibration())),))
INT4 = Rules((Rule(modules=".*", config=config.config_v4(4)),))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(8)(x)))


MODEL = ScheduledModel(Mlp(), delayed(RULES, start=START, freeze_statistics_at=FREEZE))


def batch(step):
    rng = np.random.default_rng(step)
    return rng.normal(size=(16, 4)).astype(np.float32), rng.normal(size=(16, 2)).astype(np.float32)


@functools.cache
def initial():
    return jax.jit(MODEL.init)(jax.random.key(0), batch(0)[0])


def descend(apply, variables, x, y):
    """The variables after a step of gradient descent, and the answer before it."""

    def loss(params):
        answer, changed = apply({**variables, "params": params}, x)
        return ((answer - y) ** 2).mean(), (answer, changed)

    gradient, (answer, changed) = jax.grad(loss, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
    return {**variables, **changed, "params": params}, answer


@jax.jit
def any_step(variables, step, x, y):
    """The step of all phases, compiled once."""
    return descend(lambda v, x: MODEL.apply(v, x, step=step), variables, x, y)


@functools.partial(jax.jit, static_argnums=0)
def phase_step(kind, variables, x, y):
    """A step of the float model, or of the quantized one, without any schedule."""
    model = Mlp() if kind == "float" else quantize(Mlp(), RULES)(QuantMode.TRAIN)

    def apply(variables, x):
        return model.apply(variables, x, mutable=[STATISTICS] if kind == "learning" else [])

    return descend(apply, variables, x, y)


def trained(variables, begin, end):
    """The variables and the answer of every step."""
    history = []
    for step in range(begin, end):
        variables, answer = any_step(variables, jnp.int32(step), *batch(step))
        history.append((variables, answer))
    return history


@pytest.mark.slow
def test_each_phase_has_the_bits_of_a_training_without_schedule():
    history, variables = trained(initial(), 0, STEPS), initial()
    for step, (found, answer) in enumerate(history):
        kind = "float" if step < START else "learning" if step < FREEZE else "frozen"
        variables, expected = phase_step(kind, variables, *batch(step))
        assert_same_bits(answer, expected)
        jax.tree.map(assert_same_bits, found, variables)
    assert any_step._cache_size() == 1


@pytest.mark.slow
def test_statistics_are_learned_from_the_start_until_they_are_frozen():
    counts, bounds = [], []
    for variables, _ in trained(initial(), 0, STEPS):
        statistics = variables[STATISTICS]["Dense_0"]["dot_general"]["qlhs"]
        counts.append(int(statistics["count"]))
        bounds.append(float(statistics["max"].item()))
    assert counts == [0, 0, 1, 2, 2, 2]
    assert bounds[3] == bounds[4] == bounds[5] != bounds[2]


@pytest.mark.slow
@pytest.mark.parametrize("middle", [1, START, 3, FREEZE, 5])
def test_resuming_from_a_checkpoint_gives_the_same_bits(middle):
    history = trained(initial(), 0, STEPS)
    saved = serialization.to_bytes(history[middle - 1][0])
    blank = jax.tree.map(jnp.zeros_like, initial())
    resumed = trained(serialization.from_bytes(blank, saved), middle, STEPS)
    for found, expected in zip(resumed, history[middle:], strict=True):
        jax.tree.map(assert_same_bits, found, expected)


@pytest.mark.long
@pytest.mark.slow
def test_a_python_step_gives_the_bits_of_a_traced_one():
    x, _ = batch(0)
    for step in (0, START, FREEZE):
        python = jax.jit(lambda v, x, step=step: MODEL.apply(v, x, step=step))(initial(), x)
        traced = jax.jit(lambda v, x, step: MODEL.apply(v, x, step=step))(
            initial(), x, jnp.int32(step)
        )
        jax.tree.map(assert_same_bits, python, traced)


def test_what_is_converted_is_the_model_of_a_step():
    float_model, quantized = MODEL.factory(0), MODEL.factory(START)
    assert float_model(QuantMode.SERVE).rules == Rules(())
    assert quantized(QuantMode.SERVE).rules == RULES


def test_phases_that_keep_different_statistics_are_refused():
    other = Rules((Rule(modules=".*", config=static(DelayedScalingCalibration(4))),))
    schedule = Schedule((Phase(rules=RULES, end=3), Phase(rules=other, begin=3)))
    with pytest.raises(ValueError, match="different statistics for Dense_0/dot_general/qlhs"):
        jax.eval_shape(ScheduledModel(Mlp(), schedule).init, jax.random.key(0), batch(0)[0])


BOUNDS = st.lists(st.integers(0, 20), unique=True, min_size=2, max_size=6).map(sorted)


@pytest.mark.slow
@settings(max_examples=10)
@given(BOUNDS, st.booleans())
def test_exactly_one_phase_is_active_at_every_step(bounds, endless):
    pairs = list(zip(bounds[::2], bounds[1::2], strict=False))
    phases = [Phase(rules=INT4, begin=b, end=e) for b, e in pairs]
    if endless:
        phases[-1] = Phase(rules=INT4, begin=phases[-1].begin)
    schedule = Schedule(tuple(phases))
    steps = jnp.arange(25)
    begins = jax.vmap(lambda step: schedule.switch(step, lambda p: jnp.int32(p.begin)))(steps)
    for step in range(25):
        assert int(begins[step]) == schedule.at(step).begin
        active = [p for p in schedule.timeline if p.begin <= step < (p.end or 1000)]
        assert active == [schedule.at(step)]
        given_phase = [p for p in phases if p.begin <= step < (p.end or 1000)]
        assert active[0].rules == (INT4 if given_phase else None)


def test_contradictions_are_refused_at_construction():
    for begin, end in ((-1, None), (3, 3), (3, 2)):
        with pytest.raises(ValueError, match="must begin at step 0 or later and end after"):
            Phase(rules=INT4, begin=begin, end=end)
    for phases in (
        (Phase(rules=INT4), Phase(rules=RULES, begin=3)),
        (Phase(rules=INT4, end=4), Phase(rules=RULES, begin=3)),
        (Phase(rules=INT4, begin=5), Phase(rules=RULES, end=2)),
    ):
        with pytest.raises(ValueError, match="in order and apart"):
            Schedule(phases)
    with pytest.raises(ValueError, match="must begin"):
        delayed(INT4, start=5, freeze_statistics_at=5)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        MODEL.schedule.at(-1)


def test_a_schedule_comes_back_from_json_as_it_was():
    assert Schedule.from_json(MODEL.schedule.to_json()) == MODEL.schedule
    with pytest.raises(SerializationError, match=r"`phases\.0\.begin`"):
        Schedule.from_json('{"version":1,"phases":[{"rules":null,"begin":1.5}]}')
