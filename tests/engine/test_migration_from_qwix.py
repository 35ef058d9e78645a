"""What Qwix has quantized after training is served with its integers and its scales."""

import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import qwix

from aqt_engine import QuantMode, bundle, config, flax
from aqt_engine.bundle import read_manifest
from aqt_engine.calibration import MinMaxCalibration
from aqt_engine.checkpoint import load_variables
from aqt_engine.config import LocalAqtBySize
from aqt_engine.convert import ConversionError, Stored, convert
from aqt_engine.execution import Program
from aqt_engine.migration import MigrationError, from_qwix
from aqt_engine.rules import Rule, Rules
from aqt_engine.statistics import MeanOfAbsMaxCalibration
from engine.contractions import assert_same_bits

# The oracle's own, on today's Flax.
VARIABLE_STATE = "ignore:'VariableState' was removed:DeprecationWarning"
pytestmark = [pytest.mark.slow, pytest.mark.in_haste, pytest.mark.filterwarnings(VARIABLE_STATE)]

GUIDE = (Path(__file__).parents[2] / "docs" / "migrating-from-qwix.md").read_text()
X = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
INT8 = config.fully_quantized()


class Layers(nn.Module):
    """One of each layer that both quantize: weights with several axes, and a convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8)(x))
        x = nn.Conv(8, (3,), name="conv")(x)
        x = nn.DenseGeneral((2, 4), name="several")(x)
        return nn.DenseGeneral(3, axis=(-1, -2), name="out")(x)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


@functools.cache
def quantized(model, x=(4, 5, 6), **rule):
    """The model as Qwix has it, and what it made of random parameters."""
    x = X.reshape(x)
    theirs = qwix.quantize_model(model(), qwix.PtqProvider([qwix.QuantizationRule(**rule)]))
    shapes = jax.eval_shape(model().init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    statistics = {}
    if rule.get("act_static_scale"):
        training = qwix.quantize_model(model(), qwix.QtProvider([qwix.QtRule(**rule)]))
        statistics = training.init(jax.random.key(0), x)
        run = jax.jit(functools.partial(training.apply, mutable=True))
        for batch in (x, 2 * x):
            _, statistics = run(statistics, batch)
        statistics = statistics["quant_stats"]
    abstract = jax.eval_shape(theirs.init, jax.random.key(0), x)["params"]
    return theirs, {"params": qwix.quantize_params(params, abstract, statistics)}


def ours(model, cfg):
    return flax.quantize(model(), Rules((Rule(modules=".*", config=cfg),)))


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


STATIC = config.update(
    INT8, "fwd.lhs", calibration=MeanOfAbsMaxCalibration(), calib_shared_axes="per_tensor"
)
TILED = config.update(INT8, "fwd", local_aqt=LocalAqtBySize(2))
ASYMMETRIC = config.update(config.weight_only(8), "fwd.rhs", calibration=MinMaxCalibration())
INT8_BOTH = {"weight_qtype": jnp.int8, "act_qtype": jnp.int8}
CASES = {
    "int8": (Layers, INT8, INT8_BOTH),
    "int4": (Mlp, config.weight_only(4), {"weight_qtype": jnp.int4}),
    "int3": (
        Mlp,
        config.weight_only(4),  # as which Qwix stores it
        {"weight_qtype": "int3"},
    ),
    "tiles": (Mlp, TILED, {**INT8_BOTH, "tile_size": 2}),
    "minmax": (
        Mlp,
        ASYMMETRIC,
        {"weight_qtype": jnp.int8, "weight_calibration_method": "minmax"},
    ),
    "static": (Mlp, STATIC, {**INT8_BOTH, "act_static_scale": True, "x": (20, 6)}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.long] * (c in ("int3", "int4"))) for c in CASES]
)
def test_integers_and_scales_are_moved_as_they_are(case):
    model, cfg, rule = CASES[case]
    theirs, variables = quantized(model, **rule)
    x = X.reshape(rule.get("x", X.shape))
    factory = ours(model, cfg)
    migrated = from_qwix(variables, factory, {"x": x})

    answer = np.asarray(jax.jit(factory(QuantMode.SERVE).apply)(migrated, x))
    expected = np.asarray(jax.jit(theirs.apply)(variables, x))
    # Each rounds an activation by itself: one bucket of 255 at most, of a few of the values.
    np.testing.assert_allclose(answer, expected, atol=0.02 * np.abs(expected).max())
    for name, layer in variables["params"].items():
        q = layer["kernel"].array
        hook = "conv_general_dilated" if name == "conv" else "dot_general"
        stored = at(migrated["aqt"], (name, hook, "qrhs"))
        assert_same_bits(np.asarray(stored.qvalue).reshape(q.qvalue.shape), q.qvalue)
        assert_same_bits(np.asarray(stored.scale).reshape(q.scale.shape), q.scale)
        if case == "static":
            static = at(migrated["aqt"], (name, hook, "qlhs")).scale
            assert_same_bits(static, layer["dot_general0_lhs_scale"].array)


def test_a_checkpoint_is_read_without_qwix(tmp_path):
    _, variables = quantized(Mlp, **CASES["minmax"][2])
    factory = ours(Mlp, ASYMMETRIC)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stored", variables)
    again = from_qwix(load_variables(tmp_path / "stored"), factory, {"x": X})
    jax.tree.map(assert_same_bits, again, from_qwix(variables, factory, {"x": X}))


@pytest.mark.parametrize("case", ["int4", "minmax"])
def test_weights_alone_give_the_answers_of_qwix(case):
    model, cfg, rule = CASES[case]
    theirs, variables = quantized(model, **rule)
    factory = ours(model, cfg)
    migrated = from_qwix(variables, factory, {"x": X})
    answer = jax.jit(factory(QuantMode.SERVE).apply)(migrated, X)
    np.testing.assert_allclose(answer, jax.jit(theirs.apply)(variables, X), rtol=1e-5, atol=1e-6)


def served(path, x):
    return Program(bundle.load(path), max_rows=4)({"x": x})["output"]


def test_what_was_moved_becomes_a_bundle(tmp_path):
    _, variables = quantized(Mlp, **INT8_BOTH)
    factory = ours(Mlp, INT8)
    migrated = from_qwix(variables, factory, {"x": X})

    def fn(variables, x):
        return factory(QuantMode.SERVE).apply(variables, x)

    convert(Stored(fn), migrated, {"x": X}, tmp_path / "m" / "1", tile=2)
    assert_same_bits(served(tmp_path / "m" / "1", X[:2]), jax.jit(fn)(migrated, X[:2]))
    weights = read_manifest(tmp_path / "m" / "1").weights
    assert sum(w.role == "qvalue" for w in weights) == 2
    assert not [w.name for w in weights if w.role == "float" and "kernel" in w.name]


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(INT8_BOTH, id="int8"),
        pytest.param(
            {"weight_qtype": jnp.int8, "tile_size": 2}, id="tiles", marks=pytest.mark.long
        ),
    ],
)
def test_the_forward_of_qwix_is_served_in_every_bit(tmp_path, rule):
    theirs, variables = quantized(Mlp, **rule)

    def fn(variables, x):
        return theirs.apply(variables, x)

    convert(Stored(fn), variables, {"x": X}, tmp_path / "m" / "1", tile=2)
    assert_same_bits(served(tmp_path / "m" / "1", X[:2]), jax.jit(fn)(variables, X[:2]))
    roles = [w.role for w in read_manifest(tmp_path / "m" / "1").weights]
    assert sorted(roles) == ["float", "float", "qvalue", "qvalue", "scale", "scale"]


def plain():
    return {"params": jax.jit(Mlp().init)(jax.random.key(0), X)["params"]}


class Transposed(nn.Module):
    """The same parameter, contracted the other way around."""

    mode: QuantMode

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (6, 6))
        return flax.AqtDotGeneral(INT8, rhs_quant_mode=self.mode)(
            x, kernel.T, (((x.ndim - 1,), (0,)), ((), ()))
        )


def square():
    q = qwix.quantize(X[0, :1] + jnp.eye(6), jnp.int8, channelwise_axes=[1])
    return {"params": {"kernel": q}}


@pytest.mark.parametrize(
    ("variables", "model", "message"),
    [
        (plain, ours(Mlp, INT8), "nothing that Qwix has quantized"),
        (
            lambda: quantized(Mlp, **INT8_BOTH)[1],
            ours(Mlp, config.weight_only(4)),
            r"Dense_0/kernel was stored with values of int8\[8, 3\] and the model has of int4",
        ),
        (
            lambda: quantized(Mlp, weight_qtype=jnp.int8, tile_size=2)[1],
            ours(Mlp, config.weight_only(8)),
            r"scale of float32\[4, 3\] and the model has of float32\[1, 3\]",
        ),
        (
            lambda: quantized(Mlp, weight_qtype=jnp.int8, weight_calibration_method="minmax")[1],
            ours(Mlp, config.weight_only(8)),
            r"bias of float32\[1, 3\] and the model has absent",
        ),
        (
            lambda: quantized(Mlp, weight_qtype="nf4")[1],
            ours(Mlp, config.weight_only(4)),
            "Dense_0/kernel was stored as nf4",
        ),
        (
            lambda: quantized(Mlp, x=(20, 6), **INT8_BOTH, act_static_scale=True)[1],
            ours(Mlp, INT8),
            "Dense_0/dot_general0_lhs_scale is the static scale of an activation, and the model",
        ),
        (
            lambda: quantized(Mlp, module_path="Dense_1", **INT8_BOTH)[1],
            ours(Mlp, INT8),
            "only the model has Dense_0/dot_general/qrhs",
        ),
        (
            lambda: quantized(Mlp, **INT8_BOTH)[1],
            flax.quantize(Mlp(), Rules((Rule(modules="Dense_1", config=INT8),))),
            "only Qwix quantizes Dense_0/kernel",
        ),
        (square, Transposed, "kernel is transposed, reshaped or cast"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(variables, model, message):
    with pytest.raises(MigrationError, match=message):
        from_qwix(variables(), model, {"x": X})


def test_what_cannot_be_a_bundle_is_refused(tmp_path):
    stored = Stored(lambda variables, x: Mlp().apply(variables, x))
    with pytest.raises(ConversionError, match="hold no quantized tensor"):
        convert(stored, plain(), {"x": X}, tmp_path / "m" / "1")
    with pytest.raises(ConversionError, match="uint4, which params/Dense_0/kernel/array/"):
        stored.serving(quantized(Mlp, weight_qtype="nf4")[1], {"x": X})
    with pytest.raises(ConversionError, match="quantized already"):
        stored.calibrated(plain(), [])


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("inputs.npy", X)
    names = {"__name__": "guide"}
    for text in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        exec(text, names)
    assert Path("models/mlp/1/manifest.json").exists()
    assert Path("models/mlp/2/manifest.json").exists()
