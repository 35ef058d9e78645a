"""The tile is the cheapest by what was measured, and the measurements are kept."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import bundle
from aqt_engine.convert import convert
from aqt_engine.convertible import Convertible, Leaf, Serving
from aqt_engine.tiles import TileCost, cheapest, measured

X = np.arange(12, dtype=np.float32).reshape(4, 3)
SERVING = Serving(
    leaves=[Leaf(name="w", value=jnp.full(3, 2.0), role="float")],
    forward=lambda values, inputs: inputs["x"] * values[0],
)


@dataclasses.dataclass(frozen=True)
class Doubling(Convertible):
    def train(self, variables, inputs):
        return inputs["x"] * variables

    def serving(self, variables, inputs, keep):
        return SERVING

    def calibrated(self, variables, batches):
        return variables


def timer_of(seconds):
    """A clock that runs what it is given, and says what it was told."""

    def timer(runs):
        for run in runs:
            run()
        assert len(runs) == len(seconds)
        return seconds

    return timer


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        # For each tile: a lone row, 64 rows. Twice as fast alone and as fast under load: the small.
        ([1, 64, 2, 64], 8),
        # Twice as slow alone and twice as fast under load is no gain; the smaller of equal ones.
        ([1, 64, 2, 32], 8),
        ([1, 64, 2, 31], 16),
        ([3, 64, 2, 64], 16),
    ],
)
def test_a_larger_tile_must_gain_more_under_load_than_it_loses_alone(seconds, chosen):
    costs = measured(SERVING, {"x": X}, timer=timer_of(seconds), candidates=(8, 16))
    assert cheapest(costs) == chosen
    assert [c.one_row_s for c in costs.values()] == seconds[::2]
    assert [c.per_row_s for c in costs.values()] == [s / 64 for s in seconds[1::2]]


def test_the_clock_measures():
    costs = measured(SERVING, {"x": X}, candidates=(2, 4))
    assert all(0 < c.per_row_s <= c.one_row_s and c.cost >= 1 for c in costs.values())


def test_a_bundle_keeps_what_its_tile_was_chosen_by(tmp_path):
    costs = {
        2: TileCost(one_row_s=1.0, per_row_s=1.0, cost=1.5),
        4: TileCost(one_row_s=2.0, per_row_s=0.5, cost=1.25),
    }
    chosen = convert(
        Doubling(), jnp.full(3, 2.0), {"x": X}, tmp_path / "1", tile=lambda serving, inputs: costs
    )
    assert chosen == bundle.read_manifest(tmp_path / "1")
    assert (chosen.tile, chosen.tile_costs) == (4, {"2": costs[2], "4": costs[4]})
    given = convert(Doubling(), jnp.full(3, 2.0), {"x": X}, tmp_path / "2", tile=2)
    assert (given.tile, given.tile_costs) == (2, {})
