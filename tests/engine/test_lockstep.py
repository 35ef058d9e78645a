"""Where serving leaves training is named by its module."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from aqt_engine import QuantMode, bundle, config, graphs, proof
from aqt_engine.convert import LinenModel, convert
from aqt_engine.execution import Program
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.lockstep import first_divergence

pytestmark = pytest.mark.slow

INT8 = config.fully_quantized(fwd_bits=8)
X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


class Two(nn.Module):
    mode: QuantMode

    @nn.compact
    def __call__(self, x):
        int8 = AqtDotGeneral(INT8, rhs_quant_mode=self.mode)
        x = nn.relu(nn.Dense(5, dot_general=int8, name="first")(x))
        return nn.Dense(3, dot_general=int8, name="second")(x)


@pytest.fixture(scope="module")
def trained():
    return jax.tree.map(np.asarray, jax.jit(Two(QuantMode.TRAIN).init)(jax.random.key(0), X))


@pytest.fixture(scope="module")
def loaded(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("repository") / "two" / "1"
    convert(Two, trained, {"x": X}, path, tile=4)
    return bundle.load(path)


def changed(variables, layer, part):
    """The variables with one value of `part` in `layer` another."""
    copy = jax.tree.map(np.copy, variables)
    copy["params"][layer][part].flat[1] *= 3
    copy["params"][layer][part].flat[1] += 1
    return copy


def differing(loaded, variables):
    reference = proof.of_training(graphs.named(LinenModel(Two).train), variables, 4)
    program = Program(loaded, max_rows=8)
    tried = list(proof.of_random_inputs(program, reference, loaded.witnesses))
    witnessed = proof.of_witnesses(program, loaded.manifest, loaded.witnesses, rows=8)
    assert len(tried) + len(list(witnessed)) == proof.trials(loaded.manifest, loaded.witnesses, 8)
    return [name for name, verdict in tried if not verdict.exact]


def test_what_was_trained_is_what_is_served(loaded, trained):
    assert differing(loaded, trained) == []
    assert first_divergence(LinenModel(Two), trained, loaded) is None


@pytest.mark.parametrize(
    ("layer", "part", "operand"),
    [
        ("first", "kernel", "the right operand"),
        ("second", "kernel", "the right operand"),
        ("first", "bias", "the left operand"),
    ],
)
def test_the_first_contraction_that_differs_is_named(loaded, trained, layer, part, operand):
    other = changed(trained, layer, part)
    assert differing(loaded, other)
    found = first_divergence(LinenModel(Two), other, loaded)
    assert found is not None
    # A bias is first seen in what the next layer is given.
    named = "second" if part == "bias" else layer
    assert found.op.path.startswith(f"Two/{named}/")
    assert (found.op.primitive, found.part) == ("dot_general", operand)
    assert "test_lockstep.py" in str(found)
    assert "not exact" in str(found)
