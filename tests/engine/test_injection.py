"""A linen model quantized by rules: the bits of the model with every hook filled in by hand."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import QuantMode, bundle, config, witness
from aqt_engine.convert import calibrate, convert
from aqt_engine.execution import Program
from aqt_engine.flax import AqtDotGeneral, quantize, report
from aqt_engine.rules import Rule, RuleError, Rules
from aqt_engine.statistics import MeanOfAbsMaxCalibration
from engine.contractions import assert_same_bits
from engine.injected_models import (
    INT4,
    INT8,
    RULES,
    TOKENS,
    BlockByHand,
    ByHand,
    Custom,
    Everything,
    Lifted,
)
from engine.linen_modes import stored_leaves

TRAIN, CONVERT, SERVE = QuantMode.TRAIN, QuantMode.CONVERT, QuantMode.SERVE
ALL = Rules((Rule(modules=".*", config=INT8),))
X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 8)), jnp.float32)


@functools.cache
def everything():
    """Variables for both models; biases are not zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Everything().init, jax.random.key(0), TOKENS)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)


def init(module, *args):
    return jax.jit(module.init)(jax.random.key(0), *args)


def apply(module, variables, x):
    return jax.jit(module.apply)(variables, x)


def stored(factory, variables, x):
    run = jax.jit(functools.partial(factory(CONVERT).apply, mutable=["aqt"]))
    return run(variables, x)


@pytest.mark.slow
@pytest.mark.in_haste
def test_initializing_gives_the_parameters_of_the_model():
    fresh = init(quantize(Everything(), RULES)(TRAIN), TOKENS)
    jax.tree.map(assert_same_bits, fresh, init(Everything(), TOKENS))


@pytest.mark.slow
@pytest.mark.in_haste
def test_outputs_and_gradients_are_those_of_the_model_by_hand():
    def answer_and_gradient(module):
        def loss(variables):
            answer = module.apply(variables, TOKENS)
            return (answer**2).sum(), answer

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(everything())

    found = answer_and_gradient(quantize(Everything(), RULES)(TRAIN))
    jax.tree.map(assert_same_bits, found, answer_and_gradient(ByHand()))


@pytest.mark.slow
@pytest.mark.long
def test_every_mode_gives_the_bits_of_the_model_by_hand():
    factory, variables = quantize(Everything(), RULES), everything()
    by_hand = apply(ByHand(), variables, TOKENS)
    assert not np.array_equal(by_hand, apply(Everything(), variables, TOKENS))
    assert_same_bits(apply(factory(TRAIN), variables, TOKENS), by_hand)
    answer, aqt = stored(factory, variables, TOKENS)
    assert_same_bits(answer, by_hand)
    spoiled = jax.tree.map_with_path(
        lambda path, x: x * jnp.nan if path[-1].key == "kernel" else x, variables
    )
    assert_same_bits(apply(factory(SERVE), {**spoiled, **aqt}, TOKENS), by_hand)
    layers = aqt["aqt"]
    assert set(layers) == {*variables["params"]}
    assert {leaf.qvalue.dtype.name for leaf in stored_leaves(layers).values()} == {"int8"}
    assert {"qrhs", "qrhs_1"} < set(layers["shared"]["dot_general"])
    # Its own two contractions have no weight.
    assert set(layers["attention"]) == {"query", "key", "value", "out"}


@pytest.mark.long
@pytest.mark.slow
def test_layers_under_transformations():
    variables = init(Lifted(), X)
    assert_modes_agree(quantize(Lifted(), ALL), variables, X, lambda m: Lifted(BlockByHand, (m,)))


def assert_modes_agree(factory, variables, x, by_hand):
    expected = apply(by_hand(TRAIN), variables, x)
    assert_same_bits(apply(factory(TRAIN), variables, x), expected)
    answer, aqt = stored(factory, variables, x)
    assert_same_bits(answer, expected)
    assert_same_bits(apply(factory(SERVE), {**variables, **aqt}, x), expected)


@pytest.mark.slow
def test_what_a_transformation_does_not_carry_is_named():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return scan()(x, None)[0]

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8)(x), None

    factory = quantize(Scanned(), ALL)
    variables = init(factory(TRAIN), X)
    with pytest.raises(ValueError, match=r"ScanBody_0/Dense_0/dot_general is in .*variable_axes"):
        factory(CONVERT).apply(variables, X, mutable=["aqt"])


@pytest.mark.slow
def test_a_jitted_layer_is_not_taken_from_another_mode():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(x)

    jitted = nn.jit(Inner)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jitted()(x)

    variables = init(Outer(), X)
    in_float = apply(Outer(), variables, X)
    factory = quantize(Outer(), ALL)
    trained = apply(factory(TRAIN), variables, X)
    assert not np.array_equal(trained, in_float)
    _, aqt = stored(factory, variables, X)
    assert_same_bits(apply(factory(SERVE), {**variables, **aqt}, X), trained)
    assert_same_bits(apply(Outer(), variables, X), in_float)


@pytest.mark.slow
def test_the_layers_that_no_rule_matches_stay_as_they_were():
    factory = quantize(Everything(), Rules((Rule(modules="shared", config=INT8),)))
    _, aqt = stored(factory, everything(), TOKENS)
    assert set(aqt["aqt"]) == {"shared"}
    nothing = quantize(Everything(), Rules((Rule(modules=".*", config=None),)))(TRAIN)
    assert_same_bits(
        apply(nothing, everything(), TOKENS), apply(Everything(), everything(), TOKENS)
    )


@pytest.mark.slow
def test_one_of_the_contractions_in_an_attention():
    class Attention(nn.Module):
        precision: str | None = None

        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadAttention(2, precision=self.precision, name="attention")(x)

    rules = Rules((Rule(modules=".*", ops="qk_.*", config=INT4),))
    variables = init(Attention(), X)
    found = [
        apply(quantize(Attention(precision), rules)(TRAIN), variables, X)
        for precision in (None, "highest")
    ]
    assert not np.array_equal(found[0], apply(Attention(), variables, X))
    # On a CPU every precision is the highest.
    assert_same_bits(*found)


def test_the_report_lists_what_each_contraction_gets():
    found = report(Everything(), RULES, jax.ShapeDtypeStruct((4, 6), jnp.int32))
    found.check()
    decisions = {(e["path"], e["op"]): e["name"] for e in json.loads(found.to_json())}
    projections = ("query", "key", "value", "out")
    assert decisions == {
        ("conv", "conv_general_dilated"): "rest",
        ("einsum", "einsum"): "rest",
        ("general", "dot_general"): "rest",
        **{(f"attention/{name}", "dot_general"): "rest" for name in projections},
        ("attention", "qk_attn_weights_einsum"): "attention",
        ("attention", "attn_weights_value_einsum"): "attention",
        ("shared", "dot_general"): "rest",
        ("remat", "dot_general"): "rest",
        ("embed", "attend"): "rest",
    }
    assert not found.unreachable
    (attend,) = [c for c in found.contractions if c.op == "attend"]
    assert (attend.lhs.shape, attend.rhs.shape) == ((4, 6, 8), (8, 11))


def test_what_no_hook_reaches_is_listed():
    found = report(Custom(), ALL, X, flag=True)
    hints = {c.path: c.hint for c in found.unreachable}
    assert "own AqtDotGeneral keeps its configuration" in hints.pop("AqtDotGeneral_0")
    assert hints.pop("transposed").startswith("ConvTranspose has no hook")
    assert hints.pop("local").startswith("ConvLocal has no hook")
    assert hints.pop("raw").startswith("Raw has no hook")
    assert hints.pop("").startswith("Custom has no hook")
    assert not hints
    assert [c.path for c in found.contractions if c.hint is None] == ["plain"]


def test_rules_without_effect_are_refused_once_the_model_is_known():
    rules = Rules((*RULES.rules, Rule(modules="encoder/.*", config=INT8)))
    factory = quantize(Everything(), rules)
    for call in (
        lambda: factory(TRAIN).init(jax.random.key(0), TOKENS),
        lambda: factory(CONVERT).apply(everything(), TOKENS, mutable=["aqt"]),
    ):
        with pytest.raises(RuleError, match=r"rule 2 .* is shadowed|matches nothing"):
            call()


@pytest.mark.slow
def test_another_method_of_the_model():
    class Coder(nn.Module):
        def setup(self):
            self.encoder = nn.Dense(8)
            self.decoder = nn.Dense(8)

        def encode(self, x):
            return self.encoder(x)

        def __call__(self, x):
            return self.decoder(self.encode(x))

    variables = init(Coder(), X)

    @jax.jit
    def encoded(variables):
        return quantize(Coder(), ALL)(TRAIN).apply(
            variables, X, method=lambda q, x: q.run(lambda model: model.encode(x))
        )

    by_hand = nn.Dense(8, dot_general=AqtDotGeneral(INT8))
    expected = apply(by_hand, {"params": variables["params"]["encoder"]}, X)
    assert_same_bits(encoded(variables), expected)


@pytest.mark.long
@pytest.mark.slow
def test_noise_is_drawn_anew_for_each_layer():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="a")(x), nn.Dense(8, name="b")(x)

    model = quantize(Twice(), Rules((Rule(modules=".*", config=config.config_v4()),)))(TRAIN)
    params = init(Twice(), X)["params"]
    same = {"params": {"a": params["a"], "b": params["a"]}}

    def loss(x, i):
        answer = model.apply(same, x, rngs={"params": jax.random.key(1)})[i]
        return (answer * jnp.cos(jnp.arange(8.0))).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    first, second = (gradient(X, i) for i in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("static", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_model_quantized_by_rules_is_served_exactly(tmp_path, static):
    rules = RULES
    if static:
        learned = config.update(
            INT8,
            "fwd.lhs",
            calibration=MeanOfAbsMaxCalibration(),
            calibration_mode=config.CalibrationMode.ALL_AXES,
        )
        rules = Rules((Rule(modules=".*", config=learned),))
    factory, variables = quantize(Everything(), rules), everything()
    if static:
        variables = calibrate(factory, variables, [{"tokens": TOKENS}])
    manifest = convert(factory, variables, {"tokens": TOKENS}, tmp_path / "m" / "1", tile=2)
    names = {w.name for w in manifest.weights}
    assert not any(name.endswith("kernel") for name in names)
    assert ("aqt/attention/qk_attn_weights_einsum/AqtDotGeneral_0/qlhs/scale" in names) == static
    assert ("aqt/shared/dot_general/qlhs/scale" in names) == static
    loaded = bundle.load(tmp_path / "m" / "1")
    assert all(v.exact for v in witness.prove(Program(loaded, max_rows=4), loaded.witness).values())
    served = Program(loaded, max_rows=4)({"tokens": TOKENS})["output"]
    assert np.isfinite(served).all()
