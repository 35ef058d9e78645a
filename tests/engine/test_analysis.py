"""What `aqt report` measures, against NumPy and against models whose weak layer is known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import DotGeneral, QuantMode, config
from aqt_engine.analysis import (
    BudgetError,
    Evaluator,
    ScoreBudget,
    SizeBudget,
    accuracy,
    observe,
    search,
    sensitivities,
)
from aqt_engine.analysis.measurement import BINS, HISTOGRAM_REACH
from aqt_engine.calibration import AbsMaxCalibration
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral, AqtEinsum
from aqt_engine.flax.overriding import overridden
from aqt_engine.rules import Rule, Rules
from engine.contractions import assert_same_bits

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]

INT8 = config.fully_quantized()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6)).astype(np.float32)
FIRST, SECOND, EINSUM = ("Dense_0", "dot_general"), ("Dense_1", "dot_general"), ("mix", "einsum")


class Net(nn.Module):
    """Two layers that share one contraction module, and an einsum with its weight on the left."""

    mode: QuantMode
    config: DotGeneral | None = INT8

    @nn.compact
    def __call__(self, x):
        shared = AqtDotGeneral(self.config, rhs_quant_mode=self.mode)
        x = nn.relu(nn.Dense(16, dot_general=shared)(x))
        w = self.param("w", nn.initializers.lecun_normal(), (16, 16))
        x = AqtEinsum(self.config, lhs_quant_mode=self.mode, name="mix")("pq,nq->np", w, x)
        return nn.Dense(4, dot_general=shared)(x)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Net(QuantMode.TRAIN).init)(jax.random.key(0), X)


@pytest.fixture(scope="module")
def contractions(variables):
    return observe(Net, variables, [{"x": X}, {"x": 2 * X}])


def test_a_contraction_is_found_at_each_layer_that_shares_its_module(contractions):
    assert [c.place for c in contractions] == [FIRST, EINSUM, SECOND]
    assert [c.calls for c in contractions] == [2, 2, 2]
    assert [c.macs for c in contractions] == [2 * 8 * 6 * 16, 2 * 8 * 16 * 16, 2 * 8 * 16 * 4]
    assert [[o.is_weight for o in c.operands.values()] for c in contractions] == [
        [False, True],
        [True, False],
        [False, True],
    ]
    # 8-bit values, and a float32 scale for each output.
    assert contractions[0].rhs.nbytes == 6 * 16 + 16 * 4


def test_errors_are_those_that_numpy_finds(contractions):
    def error(x):
        scale = np.abs(x).max(axis=1, keepdims=True) / 127.5
        return x - np.clip(np.round(x / scale), -127, 127) * scale

    both = [X.astype(np.float64), 2 * X.astype(np.float64)]
    power, noise = (sum((f(x) ** 2).sum() for x in both) for f in (lambda x: x, error))
    sums = contractions[0].lhs.sums
    np.testing.assert_allclose(sums.sqnr_db, 10 * np.log10(power / noise), rtol=1e-3)
    assert sums.clipped_share == 0
    assert sums.before.sum() == sums.after.sum() == 2 * X.size


def test_the_histogram_counts_scaled_values(contractions):
    scaled = X / np.abs(X).max(axis=1, keepdims=True)
    edges = np.linspace(-HISTOGRAM_REACH, HISTOGRAM_REACH, BINS + 1)
    expected = 2 * np.histogram(scaled, edges)[0]
    found = contractions[0].lhs.sums.before
    # A value on an edge may fall on either side of it.
    assert np.abs(found - expected).sum() <= 4


def test_the_share_of_clipped_values_is_reported(variables):
    half = config.update(INT8, "fwd.lhs", calibration=AbsMaxCalibration(clipping_scale=0.5))
    found = observe(lambda mode: Net(mode, half), variables, [{"x": X}])[0]
    expected = (np.abs(X) > np.abs(X).max(axis=1, keepdims=True) / 2).mean()
    np.testing.assert_allclose(found.lhs.sums.clipped_share, expected)
    assert found.rhs.sums.clipped_share == 0


def test_scanned_and_rematerialized_layers_are_seen():
    class Layers(nn.Module):
        mode: QuantMode

        @nn.compact
        def __call__(self, x):
            def body(module, x, _):
                hook = AqtDotGeneral(INT8, rhs_quant_mode=self.mode)
                return nn.Dense(6, dot_general=hook, name="layer")(x), None

            axes = {"params": 0, "aqt": 0}
            scan = nn.scan(nn.remat(body), variable_axes=axes, split_rngs={"params": True})
            return scan(self, x, jnp.zeros((3,)))[0]

    model = Layers(QuantMode.TRAIN)
    found = observe(Layers, jax.jit(model.init)(jax.random.key(0), X), [{"x": X}])
    assert [(c.path, c.calls) for c in found] == [("layer", 3)]


def test_convolutions_are_seen():
    class Conv(nn.Module):
        mode: QuantMode

        @nn.compact
        def __call__(self, x):
            hook = AqtConvGeneralDilated(INT8, rhs_quant_mode=self.mode)
            return nn.Conv(4, (3, 3), conv_general_dilated=hook)(x)

    x = RNG.normal(size=(2, 5, 5, 3)).astype(np.float32)
    (found,) = observe(Conv, jax.jit(Conv(QuantMode.TRAIN).init)(jax.random.key(0), x), [{"x": x}])
    assert found.place == ("Conv_0", "conv_general_dilated")
    assert found.macs == 2 * 5 * 5 * 4 * 3 * 3 * 3
    assert found.sqnr_db > 30


def test_a_float_model_has_nothing_to_report(variables):
    with pytest.raises(ValueError, match="quantizes no contraction"):
        observe(lambda mode: Net(mode, None), variables, [{"x": X}])


@pytest.fixture(scope="module")
def fragile(variables):
    """Net with an outlier in the first layer, which leaves its other inputs no buckets."""
    kernel = variables["params"]["Dense_0"]["kernel"].at[0].multiply(100.0)
    params = {**variables["params"], "Dense_0": {**variables["params"]["Dense_0"]}}
    params["Dense_0"]["kernel"] = kernel
    x = X.copy()
    x[:, 0] /= 100
    evaluator = Evaluator(Net, {"params": params}, {"x": x}, accuracy(_classes(params, x)))
    places = (FIRST, EINSUM, SECOND)
    return evaluator, observe(Net, {"params": params}, [{"x": x}]), places


def _classes(params, x):
    return np.asarray(Net(QuantMode.TRAIN, None).apply({"params": params}, x)).argmax(axis=-1)


@pytest.fixture(scope="module")
def alone(fragile):
    evaluator, _, places = fragile
    return sensitivities(evaluator, places, (8, 4))


def test_the_layer_that_costs_most_is_found(fragile, alone):
    evaluator, _, _ = fragile
    assert evaluator.in_float().sqnr_db == np.inf
    assert evaluator.in_float().score == 1
    found = {(s.place, s.bits): s.quality.sqnr_db for s in alone}
    assert min(found, key=found.__getitem__) == (FIRST, 4)
    assert all(found[place, 8] > found[place, 4] for place in (FIRST, EINSUM, SECOND))


def test_a_mixture_keeps_a_size_and_spares_the_fragile_layer(fragile, alone):
    evaluator, contractions, _ = fragile
    whole = sum(o.nbytes for c in contractions for o in c.operands.values() if o.is_weight)
    mixture = search(evaluator, contractions, alone, SizeBudget(whole - 100))
    assert mixture.nbytes <= whole - 100
    assert mixture.bits[FIRST] == 8
    assert mixture.bits[EINSUM] == 4
    assert mixture.quality == evaluator.at(mixture.bits)


def test_a_mixture_keeps_a_score(fragile, alone):
    evaluator, contractions, _ = fragile
    mixture = search(evaluator, contractions, alone, ScoreBudget(0.5))
    assert mixture.quality.score >= 0.5
    everything = search(evaluator, contractions, alone, ScoreBudget(0.0))
    assert everything.nbytes <= mixture.nbytes
    assert set(everything.bits.values()) == {4}


@pytest.mark.parametrize(
    ("budget", "message"),
    [(SizeBudget(10), "smallest mixture takes"), (ScoreBudget(1.1), "most bits everywhere")],
)
def test_a_budget_that_nothing_keeps_is_refused(fragile, alone, budget, message):
    evaluator, contractions, _ = fragile
    with pytest.raises(BudgetError, match=message):
        search(evaluator, contractions, alone, budget)


def test_proposed_rules_make_the_mixture(variables, fragile, alone):
    evaluator, contractions, _ = fragile
    mixture = search(evaluator, contractions, alone, SizeBudget(500))
    mixed = Rules.from_json(mixture.rules(INT8).to_json())
    ours = overridden(Net, mixed)(QuantMode.CONVERT)
    _, stored = ours.apply(variables, X, mutable=["aqt"])
    dtypes = {place: jnp.int8 if bits == 8 else jnp.int4 for place, bits in mixture.bits.items()}
    assert stored["aqt"]["mix"]["AqtDotGeneral_0"]["qlhs"].qvalue.dtype == dtypes[EINSUM]
    assert stored["aqt"]["AqtDotGeneral_0"]["qrhs"].qvalue.dtype == dtypes[FIRST]
    assert stored["aqt"]["AqtDotGeneral_0"]["qrhs_1"].qvalue.dtype == dtypes[SECOND]


def test_an_override_computes_as_the_configuration_by_hand(variables):
    int4 = config.fully_quantized(4)
    everywhere = overridden(Net, Rules((Rule(modules=".*", config=int4),)))
    by_hand = Net(QuantMode.TRAIN, int4)
    assert_same_bits(
        jax.jit(everywhere(QuantMode.TRAIN).apply)(variables, X),
        jax.jit(by_hand.apply)(variables, X),
    )
    nowhere = overridden(Net, Rules((Rule(modules="none", config=int4),)))
    assert_same_bits(
        jax.jit(nowhere(QuantMode.TRAIN).apply)(variables, X),
        jax.jit(Net(QuantMode.TRAIN).apply)(variables, X),
    )


@pytest.mark.parametrize(
    ("answer", "output", "message"),
    [
        ({"a": np.zeros((2, 3)), "b": np.zeros((2, 3))}, None, "name the output"),
        ({"a": np.zeros((2, 3))}, "c", "no output 'c'"),
        (np.zeros((3, 3)), None, "one label for each"),
    ],
)
def test_what_cannot_be_scored_is_refused(answer, output, message):
    with pytest.raises(ValueError, match=message):
        accuracy(np.zeros(2, int), output)(answer)
