"""Functions quantized by rules: what is replaced, wherever it stands, and what is said of it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import Context, config
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.functions import quantize
from aqt_engine.ops import conv_general_dilated, ragged_dot
from aqt_engine.rules import Rule, RuleError, Rules
from aqt_engine.statistics import MeanOfAbsMaxCalibration
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.in_haste

INT8 = config.fully_quantized(use_stochastic_rounding=False)
INT4 = config.config_v4(fwd_bits=4, use_stochastic_rounding=False)
NOISY = config.fully_quantized()
MATMUL = (((1,), (0,)), ((), ()))
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X, W, V = normal(4, 6), normal(6, 6), normal(6, 6)


def everywhere(cfg=INT8):
    return Rules((Rule(modules=".*", config=cfg),))


def dense(x, w, cfg=INT8):
    return cfg(x, w, MATMUL)


def two_layers(v, x):
    with jax.named_scope("encoder"):
        h = jnp.tanh(x @ v["first"])
    with jax.named_scope("decoder"):
        return jnp.einsum("nf,fo->no", h, v["second"]) @ v["second"]


LAYERS = {"first": W, "second": V}


@pytest.mark.slow
def test_the_first_rule_that_matches_decides_and_the_report_says_so():
    rules = Rules(
        (
            Rule(modules="encoder/.*", config=INT4, name="encoder"),
            Rule(modules=r"decoder/1", config=None, name="last"),
            Rule(modules="decoder/.*", config=INT8),
        )
    )
    quantized = quantize(two_layers, rules)
    h = dense(jnp.tanh(dense(X, W, INT4)), V)
    assert_same_bits(quantized(LAYERS, X), h @ V)
    report = quantized.report(LAYERS, jax.ShapeDtypeStruct(X.shape, X.dtype))
    decided = {c.path: (c.op, report.rule_of(c)) for c in report.contractions}
    assert decided == {
        "encoder/0": ("dot_general", 0),
        "decoder/0": ("dot_general", 2),
        "decoder/1": ("dot_general", 1),
    }


def test_rules_without_effect_are_refused():
    rules = Rules((Rule(modules="encodr/.*", config=INT8), *everywhere().rules))
    with pytest.raises(RuleError, match=r"encodr.*matches nothing.*encoder/0:dot_general"):
        quantize(two_layers, rules)(LAYERS, X)


@pytest.mark.long
@pytest.mark.slow
def test_gradients_jit_and_vmap_are_those_of_our_ops():
    def by_hand(v, x):
        return dense(dense(jnp.tanh(dense(x, v["first"])), v["second"]), v["second"])

    quantized = quantize(two_layers, everywhere())
    loss = lambda f: lambda v, x: (f(v, x) ** 2).sum()  # noqa: E731
    for transform in (jax.jit, lambda f: jax.jit(jax.grad(loss(f), (0, 1)))):
        found, expected = (transform(f)(LAYERS, X) for f in (quantized, by_hand))
        jax.tree.map(assert_same_bits, found, expected)
    batches = normal(3, 4, 6)
    for f in (quantized, by_hand):
        mapped = jax.vmap(f, (None, 0))(LAYERS, batches)
        assert_same_bits(mapped, jnp.stack([f(LAYERS, x) for x in batches]))


@pytest.mark.slow
def test_convolutions_and_ragged_contractions():
    def conv(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 1), "SAME", feature_group_count=2)

    x, k = normal(2, 4, 5, 5), normal(6, 2, 3, 3)
    expected = conv_general_dilated(x, k, (2, 1), "SAME", feature_group_count=2, config=INT8)
    assert_same_bits(quantize(conv, everywhere())(x, k), expected)

    sizes = jnp.asarray([1, 3])
    experts = normal(2, 6, 3)
    quantized = quantize(jax.lax.ragged_dot, everywhere())
    assert_same_bits(quantized(X, experts, sizes), ragged_dot(X, experts, sizes, config=INT8))
    assert quantized.report(X, experts, sizes).contractions[0].op == "ragged_dot"


def looped(contract):
    """The same function of contractions in loops, branches and calls."""

    def fn(v, x):
        def layer(h, w):
            return jnp.tanh(contract(h, w)), None

        h = jax.lax.scan(jax.checkpoint(layer), x, jnp.stack([v["first"], v["second"]]))[0]
        h = jax.lax.cond(x[0, 0] > 9, lambda h: h, lambda h: contract(h, v["first"]), h)
        h = jax.jit(contract)(h, v["second"])
        return jax.lax.fori_loop(0, x.shape[0] - 1, lambda i, h: contract(h, v["first"]), h)

    return fn


@pytest.mark.slow
def test_loops_branches_calls_and_their_gradients():
    quantized, by_hand = quantize(looped(jnp.matmul), everywhere()), looped(dense)
    for transform in (jax.jit, lambda f: jax.jit(jax.grad(lambda v, x: (f(v, x) ** 2).sum()))):
        found, expected = (transform(f)(LAYERS, X) for f in (quantized, by_hand))
        jax.tree.map(assert_same_bits, found, expected)


@pytest.mark.slow
def test_while_loops():
    def fn(contract):
        return lambda x, w: jax.lax.while_loop(
            lambda h: contract(h, w).sum() < 1e3, lambda h: contract(h, w) ** 2 + 1, x
        )

    quantized = quantize(fn(jnp.matmul), everywhere())
    assert_same_bits(jax.jit(quantized)(X, W), jax.jit(fn(dense))(X, W))


@pytest.mark.slow
def test_shard_map():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    sharded = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, None), out_specs=spec)
    found = quantize(lambda x, w: sharded(x, w), everywhere(NOISY))
    assert_same_bits(jax.jit(found)(X, W), jax.jit(dense)(X, W))
    context = Context(key=jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda w: found(X, w, context=context).sum()))
    assert gradient(W).shape == W.shape


@pytest.mark.slow
def test_noise_needs_a_key_and_every_site_and_turn_has_its_own():
    def fn(v, x):
        def turn(total, _):
            return total + x @ v, None

        return jax.lax.scan(turn, x @ v, None, length=2)[0]

    forward_noise = config.update(NOISY, "fwd.*", numerics=NOISY.dlhs.lhs.numerics)
    quantized = quantize(fn, everywhere(forward_noise))
    with pytest.raises(ValueError, match="key"):
        quantized(W, X)
    found = [quantized(W, X, context=Context(key=jax.random.key(i))) for i in (0, 0, 1)]
    assert_same_bits(found[0], found[1])
    assert (found[0] != found[2]).any()
    once = quantize(lambda v, x: x @ v, everywhere(forward_noise))
    assert (found[0] != 3 * once(W, X, context=Context(key=jax.random.key(0)))).any()


@pytest.mark.slow
def test_functions_with_a_derivative_of_their_own_stay_as_they_are():
    @jax.custom_vjp
    def doubled(x, w):
        return x @ w

    doubled.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (2 * g @ r[1].T, 2 * r[0].T @ g))

    def fn(x, w):
        return jax.nn.relu(doubled(x, w) @ w) + dense(x, w)

    quantized = quantize(fn, everywhere())
    report = quantized.report(X, W)
    reached, unreachable = (
        {c.path for c in report.contractions if (c.hint is None) is wanted}
        for wanted in (True, False)
    )
    # One that is quantized already is not listed at all.
    assert (reached, unreachable) == ({"1"}, {"0"})
    assert "derivative of its own" in report.unreachable[0].hint
    only = quantize(doubled, everywhere(None))
    with pytest.raises(RuleError, match="cannot be reached"):
        only(X, W)
    alone = jax.grad(lambda x: quantized(x, W).sum())(X)
    by_hand = jax.grad(lambda x: (jax.nn.relu(dense(doubled(x, W), W)) + dense(x, W)).sum())(X)
    assert_same_bits(alone, by_hand)


@pytest.mark.slow
def test_paths_of_linen_modules_and_of_transformed_scopes():
    model = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
    variables = jax.jit(model.init)(jax.random.key(0), X)
    rules = Rules((Rule(modules=".*/layers_0/0", config=INT8),))
    int8 = nn.Sequential([nn.Dense(6, dot_general=AqtDotGeneral(INT8)), nn.relu, nn.Dense(3)])
    assert_same_bits(quantize(model.apply, rules)(variables, X), int8.apply(variables, X))

    def fn(x, w):
        with jax.named_scope("outer"):
            return jax.vmap(lambda r: jax.named_scope("inner")(jnp.dot)(r, w))(x)

    (contraction,) = quantize(fn, everywhere()).report(X, W).contractions
    assert contraction.path == "outer/inner/0"


def test_arguments_that_are_no_arrays_reach_the_function():
    def fn(v, x, activation, *, repeat=1, name=None):
        assert name == "m"
        for _ in range(repeat):
            x = activation(x @ v)
        return {"y": x, "nothing": None}

    found = quantize(fn, everywhere())(W, X, jnp.tanh, repeat=2, name="m")
    assert found["nothing"] is None
    assert_same_bits(found["y"], jnp.tanh(dense(jnp.tanh(dense(X, W)), W)))


STATIC = config.update(INT8, "fwd.lhs", calibration=MeanOfAbsMaxCalibration())


@pytest.mark.slow
def test_static_calibration_of_functions():
    def fn(v, x):
        h = jnp.tanh(x @ v["first"])
        return jax.lax.scan(lambda h, _: (h @ v["second"], None), h, None, length=2)[0]

    function = quantize(fn, everywhere(STATIC))
    with pytest.raises(ValueError, match="no statistics: call `calibrate`"):
        function(LAYERS, X)
    calls = [(LAYERS, X), (LAYERS, 3 * X)]
    calibrated = function.calibrate(calls)
    statistics = calibrated.statistics
    expected = (jnp.abs(X) + jnp.abs(3 * X)).max(axis=1, keepdims=True)
    assert_same_bits(statistics["0"]["lhs"]["sum_of_max"], expected)
    # In a scan each turn has its own.
    assert statistics["1"]["lhs"]["sum_of_max"].shape == (2, 4, 1)
    assert statistics["1"]["lhs"]["count"].tolist() == [2, 2]
    first = dataclasses.replace(
        function, fn=lambda v, x: x @ v["first"], statistics={"0": statistics["0"]}
    )
    static = AqtDotGeneral(STATIC)
    learned = {"aqt_statistics": {"qlhs": statistics["0"]["lhs"]}}
    assert_same_bits(first(LAYERS, 2 * X), static.apply(learned, 2 * X, W, MATMUL))
    assert (calibrated(LAYERS, X) != quantize(fn, everywhere())(LAYERS, X)).any()


def test_a_learned_scale_that_does_not_fit_is_refused():
    calibrated = quantize(jnp.matmul, everywhere(STATIC)).calibrate([(X, W)])
    with pytest.raises(ValueError, match=r"scale of shape \(4, 1\) was learned.*ALL_AXES"):
        calibrated(X[:2], W)


def test_calibration_that_meets_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to calibrate"):
        quantize(two_layers, everywhere()).calibrate([(LAYERS, X)])

    def branching(x, w):
        return jax.lax.cond(x.sum() > 1e6, lambda: x @ w, lambda: x)

    with pytest.raises(ValueError, match="'0' was not met"):
        quantize(branching, everywhere(STATIC)).calibrate([(X, W)])

    def looping(x, w):
        return jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ w, x)

    with pytest.raises(ValueError, match="inside `while_loop`"):
        quantize(looping, everywhere(STATIC))(X, W)
