"""Static calibration: what is learned, when, and that it is served as it was trained."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import QuantMode, bundle, config, witness
from aqt_engine.convert import ConversionError, calibrate, convert
from aqt_engine.execution import Program
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral
from aqt_engine.statistics import (
    DelayedScalingCalibration,
    MeanOfAbsMaxCalibration,
    WeightedStatsCalibration,
)
from engine.contractions import assert_same_bits
from engine.linen_modes import stored_leaves

pytestmark = pytest.mark.in_haste

STATISTICS = "aqt_statistics"
INT8 = config.int_numerics(8)


def static(calibration, mode=config.CalibrationMode.ALL_AXES):
    return config.update(
        config.config_v4(), "fwd.lhs", calibration=calibration, calibration_mode=mode
    )


class Mlp(nn.Module):
    mode: QuantMode = QuantMode.TRAIN
    quantization: config.DotGeneral = static(MeanOfAbsMaxCalibration())

    @nn.compact
    def __call__(self, x):
        for features in (32, 8):
            dot_general = AqtDotGeneral(
                self.quantization, lhs_quant_mode=self.mode, rhs_quant_mode=self.mode
            )
            x = nn.relu(nn.Dense(features, dot_general=dot_general)(x))
        return x


def inputs(rows=40, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).normal(size=(rows, 16))).astype(np.float32)


@functools.cache
def compiled(calibration, axes):
    """The update of statistics, and what was learned of them."""
    update = jax.jit(lambda statistics, x: calibration.update(statistics, x, axes))
    return update, jax.jit(calibration.learned)


def observed(calibration, *tensors, axes=(0, 1)):
    statistics = calibration.empty(jnp.asarray(tensors[0]), axes)
    for x in tensors:
        statistics = compiled(calibration, axes)[0](statistics, x)
    return statistics


def learned(calibration, statistics):
    return np.asarray(compiled(calibration, (0, 1))[1](statistics))


def test_mean_of_absmax():
    calibration = MeanOfAbsMaxCalibration()
    tensors = [inputs(scale=s) for s in (1, 2, 6)]
    statistics = observed(calibration, *tensors)
    assert int(statistics["count"]) == 3
    expected = np.mean([np.abs(x).max() for x in tensors])
    np.testing.assert_allclose(learned(calibration, statistics), [[expected]], rtol=1e-6)


def test_learning_stops_when_it_is_frozen():
    calibration = MeanOfAbsMaxCalibration(freeze_after=2)
    first, second, third = (inputs(scale=s) for s in (1, 2, 6))
    statistics = observed(calibration, first, second, third)
    assert int(statistics["count"]) == 2
    assert_same_bits(
        learned(calibration, statistics), learned(calibration, observed(calibration, first, second))
    )


def test_weighted_statistics_start_as_means_and_then_move():
    calibration = WeightedStatsCalibration(l1_coeff=2.0, max_coeff=0.5, ema_update_count=3)
    tensors = [inputs(seed=s) for s in range(3)]
    found = learned(calibration, observed(calibration, *tensors))
    means = [2.0 * np.abs(x).mean() + 0.5 * np.abs(x).max() for x in tensors]
    np.testing.assert_allclose(found, [[np.mean(means)]], rtol=1e-5)
    moved = learned(calibration, observed(calibration, *tensors, inputs(scale=10)))
    target = 2.0 * np.abs(inputs(scale=10)).mean() + 0.5 * np.abs(inputs(scale=10)).max()
    np.testing.assert_allclose(moved, found + (target - found) / 3, rtol=1e-5)


def test_weighted_statistics_leave_out_zeros():
    x = np.asarray([[1.0, 0.0, 3.0, 0.0]], np.float32)
    for filtered, expected in ((True, 2.0), (False, 1.0)):
        calibration = WeightedStatsCalibration(max_coeff=0.0, l1_coeff=1.0, filter_zeros=filtered)
        assert learned(calibration, observed(calibration, x)).tolist() == [[expected]]


def test_delayed_scaling_forgets_what_is_older_than_its_history():
    calibration = DelayedScalingCalibration(amax_history_length=2)
    large, small = inputs(scale=100), inputs()
    kept = learned(calibration, observed(calibration, large, small))
    assert float(kept[0, 0]) == np.abs(large).max()
    forgotten = learned(calibration, observed(calibration, large, small, small))
    assert float(forgotten[0, 0]) == np.abs(small).max()
    spoiled = observed(calibration, small, np.full_like(small, np.nan))
    assert float(learned(calibration, spoiled)[0, 0]) == np.abs(small).max()


def test_before_anything_was_observed_the_bound_is_that_of_the_tensor():
    x = jnp.asarray(inputs())
    for calibration in (MeanOfAbsMaxCalibration(), DelayedScalingCalibration(4)):
        empty = calibration.empty(x, (0, 1))
        bound = jax.jit(lambda empty, x, c=calibration: c.current_bound(empty, x, (0, 1), INT8))(
            empty, x
        )
        assert np.asarray(bound).item() == np.abs(x).max()


def test_outside_of_a_module_there_is_nowhere_to_learn():
    c = static(MeanOfAbsMaxCalibration())
    x = inputs()
    with pytest.raises(ValueError, match="needs statistics from earlier calls"):
        jax.eval_shape(lambda x, y: c(x, y, (((1,), (0,)), ((), ()))), x, x.T)


@pytest.mark.long
@pytest.mark.slow
def test_only_calibrating_moves_a_mean_of_absmax():
    x = inputs()
    variables = jax.jit(Mlp().init)(jax.random.key(0), x)
    counts = {}
    for mode in (QuantMode.TRAIN, QuantMode.CALIBRATE):
        _, changed = Mlp(mode).apply(variables, x, mutable=[STATISTICS])
        counts[mode] = int(changed[STATISTICS]["AqtDotGeneral_0"]["qlhs"]["count"])
    assert counts == {QuantMode.TRAIN: 0, QuantMode.CALIBRATE: 1}


@pytest.mark.slow
def test_training_moves_a_delayed_scale_where_it_may():
    x = inputs()
    model = Mlp(quantization=static(DelayedScalingCalibration(8)))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    _, changed = jax.jit(lambda v, x: model.apply(v, x, mutable=[STATISTICS]))(variables, x)
    history = changed[STATISTICS]["AqtDotGeneral_0"]["qlhs"]["amax_history"]
    assert float(np.asarray(history)[0, 0, 0]) == np.abs(x).max()
    jax.eval_shape(model.apply, variables, x)  # immutable: nothing is learned, and nothing fails


@pytest.mark.slow
@pytest.mark.parametrize(
    "calibration",
    [
        MeanOfAbsMaxCalibration(),
        pytest.param(WeightedStatsCalibration(), marks=pytest.mark.long),
        pytest.param(DelayedScalingCalibration(8), marks=pytest.mark.long),
    ],
)
def test_a_static_scale_is_served_as_it_was_trained(tmp_path, calibration):
    c = static(calibration)

    def model(mode):
        return Mlp(mode, c)

    x = inputs()
    params = {"params": jax.jit(model(QuantMode.TRAIN).init)(jax.random.key(0), x)["params"]}
    with pytest.raises(ConversionError, match="never calibrated"):
        convert(model, params, {"x": x}, tmp_path / "m" / "1", tile=4)
    variables = calibrate(model, params, [{"x": inputs(seed=s)} for s in range(3)])
    manifest = convert(model, variables, {"x": x}, tmp_path / "m" / "1", tile=4)
    scales = {w.name: w.shape for w in manifest.weights if w.name.endswith("qlhs/scale")}
    assert scales == {f"aqt/AqtDotGeneral_{i}/qlhs/scale": (1, 1) for i in range(2)}
    assert not any(STATISTICS in w.name for w in manifest.weights)
    loaded = bundle.load(tmp_path / "m" / "1")
    # A static scale does not depend on the row: a larger input is clipped, not rescaled.
    program = Program(loaded, max_rows=16)
    assert all(v.exact for v in witness.prove(program, loaded.witness).values())
    huge = program({"x": 1000 * x[:1]})["output"]
    assert np.abs(huge).max() < 20 * np.abs(program({"x": x[:1]})["output"]).max() + 1


@pytest.mark.slow
def test_a_convolution_is_calibrated_too(tmp_path):
    class Conv(nn.Module):
        mode: QuantMode

        @nn.compact
        def __call__(self, x):
            convolution = AqtConvGeneralDilated(
                static(MeanOfAbsMaxCalibration()),
                lhs_quant_mode=self.mode,
                rhs_quant_mode=self.mode,
            )
            return nn.Conv(4, (3, 3), conv_general_dilated=convolution)(x)

    x = np.random.default_rng(0).normal(size=(16, 5, 5, 2)).astype(np.float32)
    params = {"params": jax.jit(Conv(QuantMode.TRAIN).init)(jax.random.key(0), x)["params"]}
    variables = calibrate(Conv, params, [{"x": x}])
    manifest = convert(Conv, variables, {"x": x}, tmp_path / "c" / "1", tile=4)
    assert {w.role for w in manifest.weights} == {"qvalue", "scale", "float"}
    assert any(w.name.endswith("qlhs/scale") for w in manifest.weights)


@pytest.mark.slow
def test_a_model_without_statistics_has_nothing_to_calibrate():
    def dynamic(mode):
        return Mlp(mode, config.config_v4())

    x = inputs(4)
    variables = jax.jit(dynamic(QuantMode.TRAIN).init)(jax.random.key(0), x)
    with pytest.raises(ConversionError, match="keeps no statistics"):
        calibrate(dynamic, variables, [{"x": x}])


@pytest.mark.slow
def test_shards_are_served_as_they_were_trained():
    shards = config.LocalAqt(contraction_axis_shard_count=4)
    c = config.update(config.config_v4(), "fwd", local_aqt=shards)

    def apply(mode, variables, x):
        model = nn.Dense(8, dot_general=AqtDotGeneral(c, rhs_quant_mode=mode))
        return jax.jit(model.apply)(variables, x)

    x = inputs()
    variables = jax.jit(nn.Dense(8).init)(jax.random.key(0), x)
    converting = nn.Dense(8, dot_general=AqtDotGeneral(c, rhs_quant_mode=QuantMode.CONVERT))
    _, stored = jax.jit(functools.partial(converting.apply, mutable=["aqt"]))(variables, x)
    (kernel,) = stored_leaves(stored["aqt"]).values()
    assert (kernel.qvalue.shape, kernel.scale.shape) == ((4, 4, 8), (4, 1, 8))
    assert_same_bits(
        apply(QuantMode.SERVE, {**variables, **stored}, x), apply(QuantMode.TRAIN, variables, x)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightedStatsCalibration(max_coeff=0.0),
        lambda: WeightedStatsCalibration(l1_coeff=-1.0),
        lambda: WeightedStatsCalibration(ema_update_count=0),
        lambda: DelayedScalingCalibration(0),
    ],
)
def test_contradictions_are_refused_at_construction(make):
    with pytest.raises(ValueError, match="at least"):
        make()
