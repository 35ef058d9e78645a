"""Folding: what variables alone decide is computed beforehand, and nothing else changes."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import aqt_engine
from aqt_engine import bundle, config, convert
from aqt_engine.calibration import ConstantCalibration, MinMaxCalibration
from aqt_engine.execution import Program
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.functions import quantize
from aqt_engine.modes import CalibrationMode
from aqt_engine.ops import conv_general_dilated
from aqt_engine.rules import Rule, Rules
from aqt_engine.statistics import MeanOfAbsMaxCalibration
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.in_haste

INT8 = config.fully_quantized()
ASYMMETRIC = config.update(INT8, "fwd.rhs", calibration=MinMaxCalibration())
MATMUL = (((1,), (0,)), ((), ()))
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X = normal(4, 6)


def dense(x, w, cfg=INT8):
    return cfg(x, w, MATMUL)


def fold(fn, variables, **inputs):
    """The names and dtypes of what the serving graph reads; its answer was compared."""
    serving = convert.Function(fn).serving(variables, inputs)
    values = [leaf.value for leaf in serving.leaves]
    found = jax.jit(serving.forward)(values, inputs)
    assert_same_bits(found, jax.jit(lambda v, i: fn(v, **i))(variables, inputs))
    read = export.export(jax.jit(serving.forward))(values, inputs).module_kept_var_idx
    return {leaf.name: str(leaf.value.dtype) for i, leaf in enumerate(serving.leaves) if i in read}


def test_weights_on_either_side_leave_no_float_copy():
    def mlp(v, x):
        h = jax.nn.relu(dense(x, v["right"]) + v["bias"])
        return aqt_engine.einsum("of,nf->no", v["left"], h, config=INT8)

    variables = {"right": normal(6, 8), "bias": normal(8), "left": normal(3, 8)}
    assert fold(mlp, variables, x=X) == {
        "right/qvalue": "int8",
        "right/scale": "float32",
        "bias": "float32",
        "left/qvalue": "int8",
        "left/scale": "float32",
    }


@pytest.mark.slow
def test_what_is_done_to_a_weight_before_it_is_quantized_is_done_beforehand():
    def standardized(v, x):
        w = v["kernel"]
        w = (w - w.mean(axis=0)) * jax.lax.rsqrt(w.var(axis=0) + 1e-5) * v["gain"]
        return dense(x, w, ASYMMETRIC)

    stored = fold(standardized, {"gain": normal(8), "kernel": normal(6, 8)}, x=X)
    # Called after the first variable that it depends on; an asymmetric weight has a bias.
    assert stored == {"gain/qvalue": "int8", "gain/scale": "float32", "gain/bias": "float32"}


@pytest.mark.parametrize(
    "cfg",
    [
        pytest.param(config.weight_only(), id="weight-only"),
        pytest.param(config.weight_only(bits=4), id="weight-only-4", marks=pytest.mark.slow),
        pytest.param(config.config_v4(fwd_bits=4), id="int4"),
        pytest.param(config.config_fwd_fp8(), id="fp8", marks=pytest.mark.slow),
        pytest.param(
            config.update(INT8, "fwd", local_aqt=config.LocalAqt(3)),
            id="local",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_manner_of_quantizing_is_stored_as_it_is_multiplied(cfg):
    stored = fold(lambda v, x: dense(x, v["w"], cfg), {"w": normal(6, 8)}, x=X)
    assert set(stored) == {"w/qvalue", "w/scale"}
    assert stored["w/qvalue"] in {"int8", "int4", "float8_e4m3fn"}


def test_a_scale_that_nothing_decides_stays_a_constant():
    cfg = config.update(INT8, "fwd.*", calibration=ConstantCalibration(3.0))
    stored = fold(lambda v, x: dense(x, v["w"], cfg), {"w": normal(6, 8)}, x=X)
    assert stored == {"w/qvalue": "int8"}


@pytest.mark.slow
def test_convolution():
    def conv(v, x):
        return conv_general_dilated(
            x, v["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), config=INT8
        )

    stored = fold(conv, {"kernel": normal(3, 3, 2, 4)}, x=normal(2, 5, 5, 2))
    assert stored == {"kernel/qvalue": "int8", "kernel/scale": "float32"}


@pytest.mark.slow
def test_a_weight_that_is_used_twice_is_stored_once_and_otherwise_numbered():
    def twice(v, x):
        once = dense(dense(x, v["w"]), v["w"])
        return dense(once, v["w"].T) @ v["w"]

    stored = fold(twice, {"w": normal(6, 6)}, x=X)
    assert set(stored) == {"w", "w/qvalue", "w/scale", "w_1/qvalue", "w_1/scale"}


def test_weights_in_closures_are_folded_too():
    w = normal(6, 8)
    stored = fold(lambda v, x: dense(x, w) + v["bias"], {"bias": normal(8)}, x=X)
    assert stored == {"bias": "float32", "closure/qvalue": "int8", "closure/scale": "float32"}


@pytest.mark.slow
def test_a_linen_model_needs_no_modes():
    model = nn.Sequential([nn.Dense(6, dot_general=AqtDotGeneral(INT8)), nn.relu])
    variables = jax.jit(model.init)(jax.random.key(0), X)
    assert fold(lambda v, x: model.apply(v, x), variables, x=X) == {
        "params/layers_0/bias": "float32",
        "params/layers_0/kernel/qvalue": "int8",
        "params/layers_0/kernel/scale": "float32",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda f: f, id="plain"),
        pytest.param(jax.checkpoint, id="remat"),
        pytest.param(jax.jit, id="jit"),
    ],
)
def test_layers_that_are_scanned_over(wrap):
    def layers(v, x):
        @wrap
        def layer(h, w):
            return dense(dense(h, w["own"] * 2), v["shared"]) + w["bias"], h.sum(axis=1)

        h, sums = jax.lax.scan(layer, x, {"own": v["own"], "bias": v["bias"]})
        return h + sums.sum(axis=0)[:, None]

    variables = {"own": normal(3, 6, 6), "bias": normal(3, 6), "shared": normal(6, 6)}
    serving = convert.Function(layers).serving(variables, {"x": X})
    shapes = {leaf.name: leaf.value.shape for leaf in serving.leaves}
    assert shapes["own/qvalue"] == (3, 6, 6)
    assert shapes["shared/qvalue"] == (6, 6)
    assert set(fold(layers, variables, x=X)) == {
        "bias",
        "own/qvalue",
        "own/scale",
        "shared/qvalue",
        "shared/scale",
    }


@pytest.mark.slow
def test_scans_in_scans_and_slices_by_a_counter():
    def nested(v, x):
        def outer(h, ws):
            def inner(h, w):
                return dense(dense(h, w), ws[0]), None

            return jax.lax.scan(inner, h, ws, reverse=True)[0], None

        h = jax.lax.scan(outer, x, v["w"])[0]
        return jax.lax.fori_loop(0, 3, lambda i, h: dense(h, v["sliced"][i]), h)

    variables = {"w": normal(2, 3, 6, 6), "sliced": normal(3, 6, 6)}
    serving = convert.Function(nested).serving(variables, {"x": X})
    shapes = {leaf.name: leaf.value.shape for leaf in serving.leaves if leaf.role == "qvalue"}
    assert shapes == {
        "w/qvalue": (2, 6, 6),
        "w_1/qvalue": (2, 3, 6, 6),
        "sliced/qvalue": (3, 6, 6),
    }
    assert not {"w", "sliced"} & set(fold(nested, variables, x=X))


@pytest.mark.slow
def test_while_loops_and_branches():
    def control(v, x):
        def turn(state):
            return state[0] + 1, dense(state[1], v["looped"] * 2)

        h = jax.lax.while_loop(lambda state: state[0] < 3, turn, (0, x))[1]
        return jax.lax.cond(v["flag"], lambda h: dense(h, v["branched"]), lambda h: h, h)

    variables = {"looped": normal(6, 6), "branched": normal(6, 6), "flag": jnp.asarray(True)}
    assert not {"looped", "branched"} & set(fold(control, variables, x=X))


@pytest.mark.slow
def test_the_graph_can_be_traced_at_other_sizes():
    def attention(v, x):
        return jax.nn.softmax(dense(x, v["w"]) @ x.T) @ x

    variables = {"w": normal(6, 6)}
    serving = convert.Function(attention).serving(variables, {"x": X})
    longer = normal(9, 6)
    found = jax.jit(serving.forward)([leaf.value for leaf in serving.leaves], {"x": longer})
    assert_same_bits(found, jax.jit(attention)(variables, longer))


def test_refused_where_it_cannot_be_folded():
    with pytest.raises(convert.ConversionError, match="quantizes no weight"):
        convert.Function(lambda v, x: dense(x, x.T)).serving({}, {"x": X})
    with pytest.raises(convert.ConversionError, match="quantizes no weight"):
        convert.Function(lambda v, x: x @ v["w"]).serving({"w": normal(6, 6)}, {"x": X})

    mesh = jax.make_mesh((1,), ("d",))
    none = jax.sharding.PartitionSpec()

    def sharded(v, x):
        return jax.shard_map(dense, mesh=mesh, in_specs=none, out_specs=none)(x, v["w"])

    with pytest.raises(convert.ConversionError, match="inside `shard_map`"):
        convert.Function(sharded).serving({"w": normal(6, 6)}, {"x": X})


@pytest.mark.slow
def test_marks_are_in_the_jaxpr_alone(monkeypatch):
    def gradient(x, w):
        return jax.grad(
            lambda w: dense(x, w, config.config_v4(use_stochastic_rounding=False)).sum()
        )(w)

    w = normal(6, 8)
    lowered = jax.jit(gradient).lower(X, w).as_text()
    assert "aqt_qvalue" in str(jax.make_jaxpr(gradient)(X, w))
    for module in ("quantizer", "qtensor"):
        monkeypatch.setattr(f"aqt_engine.{module}.checkpoint_name", lambda x, name: x)
    jax.clear_caches()
    assert "aqt_qvalue" not in str(jax.make_jaxpr(gradient)(X, w))
    assert jax.jit(gradient).lower(X, w).as_text() == lowered


@pytest.mark.slow
def test_remat_policies_can_save_what_was_quantized():
    def saved(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        _, gradient = jax.vjp(jax.checkpoint(dense, policy=policy), X, normal(6, 8))
        return {str(leaf.dtype) for leaf in jax.tree.leaves(gradient)}

    assert "int8" in saved("aqt_qvalue", "aqt_scale")
    assert "int8" not in saved()


def assert_served_is_trained(fn, variables, inputs, path):
    """The bundle answers `inputs` as `fn` does at its tile; its manifest is returned."""
    manifest = convert.convert(convert.Function(fn), variables, inputs, path, tile=4)
    found = Program(bundle.load(path), max_rows=8)(inputs)["output"]
    assert_same_bits(found, jax.jit(lambda v, i: fn(v, **i))(variables, inputs))
    return {w.name: w.dtype for w in manifest.weights}


@pytest.mark.slow
def test_similarity_search_is_a_model_too(tmp_path):
    def scores(database, query):
        return aqt_engine.einsum("nf,mf->nm", query, database, config=INT8)

    stored = assert_served_is_trained(
        scores, normal(50, 6), {"query": np.asarray(X)}, tmp_path / "1"
    )
    assert stored == {"weight/qvalue": "int8", "weight/scale": "float32"}


def plain(v, x):
    with jax.named_scope("layers"):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ v["first"], v["rest"])[0]


@pytest.mark.slow
def test_a_function_that_rules_quantize_is_folded_with_its_static_scales():
    static = config.update(INT8, "fwd.lhs", calibration=MeanOfAbsMaxCalibration())
    static = config.update(static, "fwd.lhs", calibration_mode=CalibrationMode.ALL_AXES)
    quantized = quantize(plain, Rules((Rule(modules="layers/.*", config=static),)))
    variables = {"first": normal(6, 6), "rest": normal(2, 6, 6)}
    with pytest.raises(ValueError, match="no statistics"):
        convert.Function(quantized).serving(variables, {"x": X})
    calibrated = convert.calibrate(quantized, variables, [{"x": np.asarray(X)}] * 2)
    serving = convert.Function(quantized).serving(calibrated, {"x": X})
    values = [leaf.value for leaf in serving.leaves]
    found = jax.jit(serving.forward)(values, {"x": X})
    closed = quantized.calibrate([(variables, X)] * 2)
    assert_same_bits(found, jax.jit(closed)(variables, X))
    assert set(fold(closed, variables, x=X)) == {
        "first/qvalue",
        "first/scale",
        "rest/qvalue",
        "rest/scale",
        "closure/scale",
        "closure_1/scale",
    }


@pytest.mark.slow
def test_a_function_that_rules_quantize_is_converted(tmp_path):
    quantized = quantize(plain, Rules((Rule(modules="layers/.*", config=INT8),)))
    variables = {"first": normal(6, 6), "rest": normal(2, 6, 6)}
    manifest = convert.convert(quantized, variables, {"x": np.asarray(X)}, tmp_path / "1", tile=4)
    assert {w.dtype for w in manifest.weights if w.role == "qvalue"} == {"int8"}


@pytest.mark.slow
def test_an_equinox_model(tmp_path):
    class Dense(eqx.Module):
        weight: jax.Array
        bias: jax.Array

        def __call__(self, x):
            return aqt_engine.einsum("of,nf->no", self.weight, x, config=INT8) + self.bias

    first, second = Dense(normal(8, 6), normal(8)), Dense(normal(3, 8), normal(3))
    model = eqx.nn.Sequential([first, eqx.nn.Lambda(jax.nn.relu), second])
    arrays, static = eqx.partition(model, eqx.is_array)

    def classify(arrays, x):
        h = x
        for layer in eqx.combine(arrays, static).layers:
            h = layer(h)
        return h

    stored = assert_served_is_trained(classify, arrays, {"x": np.asarray(X)}, tmp_path / "1")
    assert stored == {
        "layers/0/weight/qvalue": "int8",
        "layers/0/weight/scale": "float32",
        "layers/0/bias": "float32",
        "layers/2/weight/qvalue": "int8",
        "layers/2/weight/scale": "float32",
        "layers/2/bias": "float32",
    }
