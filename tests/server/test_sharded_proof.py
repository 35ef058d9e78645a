"""A version in shards is proved against whole weights that its devices gather, and reads none."""

import numpy as np
import pytest

from aqt_engine import bundle
from aqt_engine.execution import Program
from aqt_engine.layout import Layout
from aqt_server.executor import Executor
from aqt_server.memory import Memory, NoMemoryError
from bundles import write_linear

SHARDS = Layout(shards=2)


class OnOneDevice(Program):
    """Takes the place of shards, for which there are too few devices here."""

    def __init__(self, loaded, *, layout, wrong, **options):
        super().__init__(loaded, **options)
        self.wrong, self.calls = wrong, 0

    def gathered(self, inputs):
        self.calls += 1
        found = super().__call__(inputs)
        return {name: np.negative(array) for name, array in found.items()} if self.wrong else found

    def set_aside(self, bundle):
        raise AssertionError("all weights are read")


@pytest.fixture
def loaded(tmp_path):
    write_linear(tmp_path / "1")
    return bundle.load(tmp_path / "1")


def proved(loaded, *, wrong):
    made = []

    def program(*arguments, **options):
        made.append(OnOneDevice(*arguments, wrong=wrong, **options))
        return made[0]

    executor = Executor(loaded, max_batch_rows=8, layout=SHARDS, program=program)
    found = executor.prove(loaded, more_s=600)
    assert made[0].calls > 0
    return found


def test_shards_that_answer_as_whole_weights_do_are_exact(loaded):
    found = proved(loaded, wrong=False)
    assert found.whole
    assert not found.failed


def test_shards_that_do_not_answer_as_whole_weights_do_are_not(loaded):
    found = proved(loaded, wrong=True)
    assert not found.whole
    assert found.failed[0].startswith("random inputs")


def test_what_a_device_takes_is_its_shards_and_the_largest_weight_whole(loaded, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    (qvalue, *others) = sorted(loaded.manifest.weights, key=lambda w: w.role != "qvalue")
    assert SHARDS.nbytes_here(qvalue) == qvalue.nbytes // 2
    assert [SHARDS.nbytes_here(w) for w in others] == [w.nbytes for w in others]
    needed = qvalue.nbytes // 2 + sum(w.nbytes for w in others) + qvalue.nbytes

    def check(free):
        memory = Memory(limit=None, held=0, available=lambda: free)
        memory.check(loaded.manifest, workspace=0, layout=SHARDS)

    check(needed)
    with pytest.raises(NoMemoryError, match=f"takes {needed} bytes"):
        check(needed - 1)
