"""nnx models: quantized by rules and by hand, trained, calibrated, converted."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from aqt_engine import bundle, config, convert
from aqt_engine.execution import Program
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral, AqtEinsum
from aqt_engine.flax import nnx as aqt_nnx
from aqt_engine.rules import Rule, RuleError, Rules
from aqt_engine.statistics import DelayedScalingCalibration, MeanOfAbsMaxCalibration
from engine.contractions import assert_same_bits

INT8 = config.fully_quantized()
QUIET = config.fully_quantized(use_stochastic_rounding=False)
STATIC = config.update(QUIET, "fwd.lhs", calibration=MeanOfAbsMaxCalibration())
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 6, 4)), jnp.float32)


def everywhere(cfg):
    return Rules((Rule(modules=".*", config=cfg),))


class Model(nnx.Module):
    """Convolution, attention, dropout and a dense layer."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 8, (3,), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])

    def __call__(self, x):
        h = self.dropout(self.attention(nnx.relu(self.conv(x)))).mean(axis=1)
        for layer in self.layers:
            h = layer(nnx.relu(h))
        return h


@pytest.mark.slow
def test_by_rules_a_copy_is_quantized_and_the_model_is_not_changed():
    model = Model(nnx.Rngs(0))
    before = nnx.split(model)
    rules = Rules(
        (
            Rule(modules="layers/1", config=None, name="last"),
            Rule(modules="attention(/.*)?", config=QUIET, name="attention"),
            Rule(modules=".*", config=config.config_v4(fwd_bits=4), name="rest"),
        )
    )
    quantized = aqt_nnx.quantize(model, rules)
    assert nnx.split(model)[0] == before[0]
    assert quantized.layers[1].dot_general is jax.lax.dot_general
    assert isinstance(quantized.attention.query.dot_general, aqt_nnx.AqtDotGeneral)
    assert quantized.layers[0].dot_general.config.fwd.lhs.numerics.bits == 4
    model.eval()
    quantized.eval()
    assert (nnx.jit(lambda m: m(X))(model) != nnx.jit(lambda m: m(X))(quantized)).any()

    report = aqt_nnx.report(model, rules, jax.ShapeDtypeStruct(X.shape, X.dtype))
    decided = {(c.path, c.op): report.rule_of(c) for c in report.contractions}
    assert decided == {
        ("conv", "conv_general_dilated"): 2,
        ("attention/query", "dot_general"): 1,
        ("attention/key", "dot_general"): 1,
        ("attention/value", "dot_general"): 1,
        ("attention", "qk_attn_weights_einsum"): 1,
        ("attention", "attn_weights_value_einsum"): 1,
        ("attention/out", "dot_general"): 1,
        ("layers/0", "dot_general"): 2,
        ("layers/1", "dot_general"): 0,
    }
    with pytest.raises(RuleError, match=r"layer/.* matches nothing"):
        aqt_nnx.quantize(model, Rules((Rule(modules="layer/.*", config=INT8),)))


@pytest.mark.slow
def test_what_no_layer_has_an_op_for_is_reported():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 4, rngs=rngs)
            self.own = nnx.Linear(4, 4, dot_general=QUIET, rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(self.own(self.embed(tokens)))

    model = Tied(nnx.Rngs(0))
    assert model(jnp.arange(3)).shape == (3, 11)
    report = aqt_nnx.report(model, Rules(()), jnp.arange(3))
    assert [c.hint is None for c in report.contractions] == [False]


def slow(*kinds):
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", ["dot_general", *slow("general", "einsum", "conv")])
def test_the_bits_are_those_of_linen(kind):
    rngs = nnx.Rngs(0)
    if kind == "dot_general":
        layer = nnx.Linear(4, 5, rngs=rngs)
        linen = nn.Dense(5, dot_general=AqtDotGeneral(QUIET))
    elif kind == "general":
        layer = nnx.LinearGeneral((6, 4), (3, 2), axis=(1, 2), rngs=rngs)
        linen = nn.DenseGeneral((3, 2), axis=(1, 2), dot_general=AqtDotGeneral(QUIET))
    elif kind == "conv":
        layer = nnx.Conv(4, 5, (3,), padding="CAUSAL", rngs=rngs)
        conv = AqtConvGeneralDilated(QUIET)
        linen = nn.Conv(5, (3,), padding="CAUSAL", conv_general_dilated=conv)
    else:
        layer = nnx.Einsum("nsf,fgh->nghs", (4, 3, 2), rngs=rngs)
        linen = AqtEinsum(QUIET)
    quantized = aqt_nnx.quantize(layer, everywhere(QUIET))
    if kind == "einsum":
        apply = jax.jit(linen.apply, static_argnums=1)
        expected = apply({}, layer.einsum_str, X, layer.kernel[...])
    else:
        params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
        expected = jax.jit(linen.apply)({"params": params}, X)
    assert_same_bits(nnx.jit(lambda layer, x: layer(x))(quantized, X), expected)


@pytest.mark.slow
@pytest.mark.long
def test_trained_with_stochastic_rounding_each_call_draws_its_own():
    model = aqt_nnx.quantize(Model(nnx.Rngs(0)), everywhere(INT8), rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    labels = jnp.asarray([0, 1, 2, 0])

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(X)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert min(losses[-5:]) < 0.8 * losses[0]
    # The key is counted on, and the counts are those of the calls.
    assert int(model.layers[0].dot_general.rngs.count[...]) == 20


@pytest.mark.slow
def test_static_calibration():
    model = aqt_nnx.quantize(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), everywhere(STATIC))
    dynamic = aqt_nnx.quantize(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), everywhere(QUIET))
    graph, variables = aqt_nnx.split(model)
    with pytest.raises(convert.ConversionError, match="call it once"):
        convert.calibrate(graph, variables, [{"inputs": np.asarray(X)}])
    # Until something was observed, the bound is that of the tensor at hand.
    assert_same_bits(model(X), dynamic(X))
    graph, variables = aqt_nnx.split(model)
    with pytest.raises(convert.ConversionError, match="never calibrated"):
        graph.serving(variables, {"inputs": X})
    batches = [{"inputs": np.asarray(x)} for x in (X, 3 * X)]
    calibrated = convert.calibrate(graph, variables, batches)
    statistics = calibrated["dot_general"]["statistics"]["lhs"]
    expected = jnp.abs(X).max(axis=-1, keepdims=True) + jnp.abs(3 * X).max(axis=-1, keepdims=True)
    assert_same_bits(statistics["sum_of_max"], expected)
    found = graph.merge(calibrated)(X)
    linen = nn.Dense(5, dot_general=AqtDotGeneral(STATIC))
    params = {"kernel": model.kernel[...], "bias": model.bias[...]}
    learned = {"dot_general": {"qlhs": statistics}}
    assert_same_bits(found, linen.apply({"params": params, "aqt_statistics": learned}, X))
    serving = graph.serving(calibrated, {"inputs": X})
    served = jax.jit(serving.forward)([leaf.value for leaf in serving.leaves], {"inputs": X})
    assert_same_bits(served, jax.jit(graph.train)(calibrated, {"inputs": X}))


@pytest.mark.slow
def test_calibrations_that_learn_in_training_stop_in_evaluation():
    delayed = config.update(
        config.config_v4(use_stochastic_rounding=False),
        "fwd.lhs",
        calibration=DelayedScalingCalibration(4),
        calibration_mode=config.CalibrationMode.ALL_AXES,
    )
    model = aqt_nnx.quantize(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), everywhere(delayed))
    counts = []
    for _ in range(2):
        model(X)
        counts.append(int(model.dot_general.statistics["lhs"]["count"][...]))
    model.eval()
    model(X)
    assert [*counts, int(model.dot_general.statistics["lhs"]["count"][...])] == [1, 2, 2]


@pytest.mark.slow
def test_attention_keeps_no_statistics():
    with pytest.raises(ValueError, match="keep no statistics"):
        aqt_nnx.quantize(Model(nnx.Rngs(0)), everywhere(STATIC))


@pytest.mark.slow
def test_a_model_is_converted_and_serves_what_was_trained(tmp_path):
    model = aqt_nnx.quantize(Model(nnx.Rngs(0)), everywhere(INT8), rngs=nnx.Rngs(1))
    graph, variables = aqt_nnx.split(model)
    manifest = convert.convert(graph, variables, {"x": np.asarray(X)}, tmp_path / "1", tile=4)
    stored = {w.name: w.dtype for w in manifest.weights}
    assert {name for name, dtype in stored.items() if dtype == "int8"} == {
        "conv/kernel/qvalue",
        "layers/0/kernel/qvalue",
        "layers/1/kernel/qvalue",
        *(f"attention/{name}/kernel/qvalue" for name in ("query", "key", "value", "out")),
    }
    assert not any(name.endswith("kernel") for name in stored)
    model.eval()
    graph, state = nnx.split(model)
    answer = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, X)
    found = Program(bundle.load(tmp_path / "1"), max_rows=8)({"x": np.asarray(X)})["output"]
    assert_same_bits(found, answer)
