"""What was converted by one configuration is served by no other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from aqt_engine import QuantMode, config
from aqt_engine.calibration import AbsMaxCalibration
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.flax.marks import SEPARATOR
from engine.contractions import assert_same_bits

INT8, INT4 = config.config_v4(), config.config_v4(fwd_bits=4)
SERVE, CONVERT = QuantMode.SERVE, QuantMode.CONVERT
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
PARAMS = {"params": {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)}}


def model(mode, configuration=INT8):
    dot_general = AqtDotGeneral(configuration, rhs_quant_mode=mode)
    return nn.Dense(5, dot_general=dot_general)


def converted(configuration=INT8):
    convert = model(CONVERT, configuration)
    return {**PARAMS, **jax.jit(lambda v: convert.apply(v, X, mutable=["aqt"])[1])(PARAMS)}


def mark_of(variables):
    (found,) = [name for name in variables["aqt"]["dot_general"] if SEPARATOR in name]
    return found.split(SEPARATOR)[1]


def test_another_configuration_is_refused_where_it_is_traced():
    variables = converted()
    served = model(SERVE, INT4)
    stored, own = mark_of(variables), mark_of(converted(INT4))
    message = f"dot_general/qrhs was converted by the configuration {stored} and is .* by {own}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(served.apply, variables, X)
    # Where values are known, it says what differs.
    with pytest.raises(ValueError, match=r"fwd\.lhs\.numerics\.bits 8 and 4; "):
        served.apply(variables, X)


def test_the_other_side_of_the_contraction_counts_too():
    clipped = config.update(INT8, "fwd.lhs", calibration=AbsMaxCalibration(0.5))
    with pytest.raises(ValueError, match=r"calibration\.clipping_scale by default and 0\.5"):
        model(SERVE, clipped).apply(converted(), X)


def test_gradients_are_configured_as_one_likes():
    forward = config.DotGeneral(fwd=INT8.fwd)
    variables = converted()
    answers = [
        jax.jit(model(SERVE, c).apply)(variables, X)
        for c in (INT8, forward, config.config_v4(dlhs_bits=4))
    ]
    for answer in answers[1:]:
        assert_same_bits(answer, answers[0])


def test_weights_of_an_earlier_release_are_told_to_be_converted_again():
    variables = converted()
    stored = variables["aqt"]["dot_general"]
    variables["aqt"] = {"dot_general": {"qrhs": stored["qrhs"]}}
    with pytest.raises(ValueError, match="does not say which configuration converted it"):
        model(SERVE).apply(variables, X)


@pytest.mark.slow
def test_converting_over_what_another_configuration_converted_is_refused():
    with pytest.raises(ValueError, match=r"qrhs is there already.*without the collection 'aqt'"):
        model(CONVERT, INT4).apply(converted(), X, mutable=["aqt"])
    model(CONVERT).apply(converted(), X, mutable=["aqt"])


def test_configurations_of_ones_own_are_served_unchecked():
    class Own(AbsMaxCalibration):
        pass

    own = config.update(INT8, "fwd.rhs", calibration=Own())
    variables = converted(own)
    assert mark_of(variables) == "unlisted"
    model(SERVE, own).apply(variables, X)


@pytest.mark.slow
@pytest.mark.parametrize("with_target", [False, True])
def test_marks_survive_a_checkpoint(tmp_path, with_target):
    variables = converted()
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", variables)
        target = variables if with_target else None
        tree = target or checkpointer.metadata(tmp_path / "c").item_metadata.tree
        # As NumPy arrays, whatever devices they were saved from.
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(tmp_path / "c", item=target, restore_args=arguments)
    assert mark_of(restored) == mark_of(variables)
    if with_target:
        served, trained = (model(m).apply(restored, X) for m in (SERVE, QuantMode.TRAIN))
        assert_same_bits(served, trained)
        with pytest.raises(ValueError, match="was converted by the configuration"):
            model(SERVE, INT4).apply(restored, X)
