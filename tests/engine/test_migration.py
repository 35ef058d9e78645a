"""What `aqtp` trained or stored is served as `aqtp` computes it, in every bit."""

import dataclasses
import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from aqt_engine import QuantMode, bundle, config
from aqt_engine.checkpoint import load_variables
from aqt_engine.config import LocalAqt
from aqt_engine.convert import convert
from aqt_engine.execution import Program
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral, AqtEinsum
from aqt_engine.migration import MigrationError, from_aqtp
from aqt_engine.ops import TileCount, Tiling
from aqt_engine.statistics import MeanOfAbsMaxCalibration
from engine.contractions import assert_same_bits
from engine.linen_modes import stored_leaves

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the oracle's own, on today's JAX
    import aqt.jax.v2.aqt_conv_general as aqtp_conv
    import aqt.jax.v2.config as aqtp_config
    import aqt.jax.v2.flax.aqt_flax as aqtp_flax
    import aqt.jax.v2.flax.aqt_flax_calibration as aqtp_calibration
    import aqt.jax.v2.tiled_dot_general as aqtp_tiled
    import aqt.jax.v2.utils as aqtp_utils

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3, 6)).astype(np.float32)
TRAIN, CONVERT, SERVE = QuantMode.TRAIN, QuantMode.CONVERT, QuantMode.SERVE
KEYS = {"params": jax.random.key(0)}


@dataclasses.dataclass(frozen=True)
class Ours:
    """Gives our modules, with the weight in `mode`."""

    mode: QuantMode
    bits: int = 8
    shards: int | None = None

    def __call__(self, kind="dot_general", side="rhs"):
        cfg = config.fully_quantized(fwd_bits=self.bits, bwd_bits=8)
        if self.shards:
            cfg = config.update(cfg, "fwd", local_aqt=LocalAqt(self.shards))
        module = AqtDotGeneral if kind == "dot_general" else AqtEinsum
        return module(cfg, **{f"{side}_quant_mode": self.mode})


@dataclasses.dataclass(frozen=True)
class Theirs:
    """Gives the modules of `aqtp`, with the weight in `mode`."""

    mode: QuantMode
    bits: int = 8
    legacy: bool = True
    shards: int | None = None

    def __call__(self, kind="dot_general", side="rhs"):
        cfg = aqtp_config.fully_quantized(fwd_bits=self.bits, bwd_bits=8)
        module = aqtp_flax.AqtDotGeneral if kind == "dot_general" else aqtp_flax.AqtEinsum
        tiling = {}
        if self.shards:
            axis = [aqtp_tiled.AxisTiling(axis=0, tile_count=self.shards)]
            lhs = [aqtp_tiled.AxisTiling(axis=2, tile_count=self.shards)]
            tiling["tiling_cfg"] = aqtp_tiled.Cfg(
                lhs=aqtp_tiled.TensorTiling(contraction_axes=lhs, remaining_axes=[]),
                rhs=aqtp_tiled.TensorTiling(contraction_axes=axis, remaining_axes=[]),
            )
        return module(
            cfg,
            use_legacy_freezer=self.legacy,
            **tiling,
            **{
                f"{side}_quant_mode": aqtp_utils.QuantMode[self.mode.name],
                f"{side}_freeze_mode": aqtp_flax.FreezerMode.CALIBRATION_AND_VALUE,
            },
        )


class Mlp(nn.Module):
    make: object

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, dot_general=self.make())(x))
        return nn.Dense(3, dot_general_cls=self.make)(x)


class SeveralAxes(nn.Module):
    """Weights with two remaining and with two contracted axes, and two of the same size."""

    make: object

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((4, 4), dot_general_cls=self.make)(x)
        x = nn.DenseGeneral(5, axis=(-1, -2), dot_general_cls=self.make)(x)
        return nn.DenseGeneral((3, 2), batch_dims=(0, 1), dot_general_cls=self.make)(x)


class Einsums(nn.Module):
    """A weight on either side; batch axes that the weight has last, first and in both orders."""

    make: object

    @nn.compact
    def __call__(self, x):
        def weight(name, *shape):
            return self.param(name, nn.initializers.normal(), shape)

        right = functools.partial(self.make, "einsum", "rhs")
        left = functools.partial(self.make, "einsum", "lhs")
        y = right()("bsf,fo->bso", x, weight("a", 6, 5))
        y = left()("of,bsf->bso", weight("b", 3, 5), y)
        y = right()("bhf,fdh->bhd", y, weight("c", 3, 3, 3))
        y = left()("fhg,bhf->bgh", weight("d", 3, 3, 3), y)
        return right()("bgh,ohg->bgho", y, weight("e", 3, 3, 3))


def quietly(run):
    """`run` without the warnings that today's JAX gives to the oracle."""

    @functools.wraps(run)
    def quiet(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(*args, **kwargs)

    return quiet


MODELS = [Mlp, SeveralAxes, Einsums]


@functools.cache
@quietly
def stored(model, bits, legacy, shards=None):
    """What `aqtp` has stored, and its training forward, which its serving forward agrees with."""
    give = functools.partial(Theirs, bits=bits, legacy=legacy, shards=shards)
    shapes = jax.eval_shape(model(give(TRAIN)).init, KEYS["params"], X)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    convert_theirs = jax.jit(functools.partial(model(give(CONVERT)).apply, mutable=True))
    trained = jax.jit(model(give(TRAIN)).apply)({"params": params}, X, rngs=KEYS)
    _, variables = convert_theirs({"params": params}, X, rngs=KEYS)
    served = jax.jit(model(give(SERVE)).apply)(variables, X, rngs=KEYS)
    assert_same_bits(served, trained)
    return variables, np.asarray(trained)


def factory(model, bits=8, shards=None):
    return lambda mode: model(Ours(mode, bits, shards))


def serve(model, variables):
    """The answer of our SERVE, which has no weight in float to fall back on."""
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: p if path[-1].key == "bias" else jnp.full_like(p, jnp.nan),
        variables["params"],
    )
    return jax.jit(model(SERVE).apply)({**variables, "params": params}, X)


both_layouts = pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "frozen"])
# int4 is stored as int8 is: each model in both, in the long form.
widths = pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.long)])


# Each model in one of the layouts, in turn, and in the long form in both.
@pytest.mark.parametrize(
    ("model", "legacy"),
    [
        pytest.param(model, legacy, marks=() if (i + legacy) % 2 else pytest.mark.long)
        for i, model in enumerate(MODELS)
        for legacy in (True, False)
    ],
)
@widths
def test_a_live_tree_is_served_as_aqtp_trains(model, bits, legacy):
    variables, trained = stored(model, bits, legacy)
    ours = factory(model, bits)
    migrated = from_aqtp(variables, ours, {"x": X})
    assert stored_leaves(migrated["aqt"])
    assert migrated["params"] is variables["params"]
    assert_same_bits(serve(ours, migrated), trained)


@widths
@pytest.mark.parametrize("model", [pytest.param(Mlp, marks=pytest.mark.long), *MODELS[1:]])
def test_plain_parameters_give_the_integers_that_aqtp_stores(model, bits):
    variables, trained = stored(model, bits, legacy=False)
    ours = factory(model, bits)
    params = {"params": variables["params"]}
    assert_same_bits(jax.jit(ours(TRAIN).apply)(params, X), trained)
    convert_ours = jax.jit(functools.partial(ours(CONVERT).apply, mutable=["aqt"]))
    _, converted = convert_ours(params, X)
    migrated = from_aqtp(variables, ours, {"x": X})
    jax.tree.map(assert_same_bits, converted["aqt"], migrated["aqt"])


@pytest.mark.parametrize(
    ("form", "legacy"),
    [
        ("orbax", True),
        ("msgpack", False),
        pytest.param("orbax", False, marks=pytest.mark.long),
        pytest.param("msgpack", True, marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_is_loaded_without_aqtp(tmp_path, legacy, form):
    variables, trained = stored(Einsums, 8, legacy)
    if form == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "stored", variables)
        restored = load_variables(tmp_path / "stored")
    else:
        restored = serialization.msgpack_restore(serialization.to_bytes(variables))
    ours = factory(Einsums)
    assert_same_bits(serve(ours, from_aqtp(restored, ours, {"x": X})), trained)


@both_layouts
def test_tiles_are_local_aqt_or_a_tiling(legacy):
    variables, trained = stored(Mlp, 8, legacy, shards=2)
    ours = factory(Mlp, shards=2)
    if legacy:
        with pytest.raises(MigrationError, match="no place for a layer that is tiled"):
            from_aqtp(variables, ours, {"x": X})
        return
    tiling = Tiling(lhs=(TileCount(2, 2),), rhs=(TileCount(0, 2),))

    def tiled(mode):
        c = config.fully_quantized()
        return Mlp(lambda: AqtDotGeneral(c, rhs_quant_mode=mode, tiling=tiling))

    for model in (ours, tiled):
        migrated = from_aqtp(variables, model, {"x": X})
        assert_same_bits(serve(model, migrated), trained)
    with pytest.raises(MigrationError, match="the tiles that it was stored with"):
        from_aqtp(variables, factory(Mlp), {"x": X})


class Statically(nn.Module):
    """A dense layer and a convolution whose activations have learned scales."""

    dot_general: object
    convolution: object

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, dot_general=self.dot_general())(x)
        return nn.Conv(3, (2,), padding="VALID", conv_general_dilated=self.convolution())(x)


@quietly
def test_learned_scales_and_convolutions():
    modes = aqtp_utils.QuantMode
    freeze = aqtp_flax.FreezerMode

    def theirs(mode):
        cfg = aqtp_config.fully_quantized()
        mean = functools.partial(aqtp_calibration.MeanOfAbsMaxCalibration, quant_collection="qc")
        aqtp_config.set_fwd_calibration(cfg, mean)
        cfg.fwd.dg_quantizer.lhs.calib_shared_axes = "per_tensor"
        sides = {
            "lhs_quant_mode": mode,
            "rhs_quant_mode": mode,
            "lhs_freeze_mode": freeze.CALIBRATION,
            "rhs_freeze_mode": freeze.CALIBRATION_AND_VALUE,
            "use_legacy_freezer": False,
        }
        conv = aqtp_config.fully_quantized()
        conv.fwd = aqtp_conv.conv_general_dilated_make(1, 8, 8)
        return Statically(
            lambda: aqtp_flax.AqtDotGeneral(cfg, **sides),
            lambda: aqtp_flax.AqtConvGeneralDilated(
                conv,
                rhs_quant_mode=modes.TRAIN if mode is modes.CALIBRATE else mode,
                rhs_freeze_mode=freeze.CALIBRATION_AND_VALUE,
            ),
        )

    def ours(mode):
        preset = config.fully_quantized()
        static = config.update(
            preset, "fwd.lhs", calibration=MeanOfAbsMaxCalibration(), calib_shared_axes="per_tensor"
        )
        return Statically(
            lambda: AqtDotGeneral(static, lhs_quant_mode=mode, rhs_quant_mode=mode),
            lambda: AqtConvGeneralDilated(preset, rhs_quant_mode=mode),
        )

    variables = theirs(modes.TRAIN).init(KEYS["params"], X)
    for mode in (modes.CALIBRATE, modes.CALIBRATE, modes.CONVERT):
        run = functools.partial(theirs(mode).apply, mutable=True, rngs=KEYS)
        _, variables = jax.jit(run)(variables, X)
    served = jax.jit(theirs(modes.SERVE).apply)(variables, X, rngs=KEYS)
    migrated = from_aqtp(variables, ours, {"x": X})
    assert_same_bits(serve(ours, migrated), served)


@pytest.mark.parametrize(
    ("spoil", "model", "message"),
    [
        (lambda v: {"params": v["params"]}, factory(Mlp), "no collection 'aqt'"),
        (lambda v: v, factory(Mlp, 4), r"values of int8\[6, 8\] and the model has of int4"),
        (lambda v: v, lambda mode: Mlp(Ours(TRAIN)), "only stored are .*AqtDotGeneral_0/qrhs"),
        (
            lambda v: {**v, "aqt": {"Dense_1": v["aqt"]["Dense_1"]}},
            factory(Mlp),
            "only the model has AqtDotGeneral_0/qrhs",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(spoil, model, message):
    variables, _ = stored(Mlp, 8, legacy=False)
    spoiled = spoil({**variables, "aqt": layers_of(variables["aqt"])})
    with pytest.raises(MigrationError, match=message):
        from_aqtp(spoiled, model, {"x": X})


def layers_of(aqt):
    """Stored tensors as a checkpoint holds them, to be spoiled."""
    return serialization.to_state_dict(aqt)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("scale", {"0": np.ones((1, 8)), "1": np.ones((1, 8))}, "with 2 tensors as its scale"),
        ("scale", {"0": np.ones((1, 8), np.float16)}, r"scale of float16\[1, 8\]"),
        ("sparsity_mask", np.ones((6, 8)), "a sparsity mask"),
        ("qvalue", None, "values absent"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(part, value, message):
    variables, _ = stored(Mlp, 8, legacy=False)
    aqt = layers_of(variables["aqt"])
    aqt["AqtDotGeneral_0"]["qrhs"]["frozen"][part] = value
    with pytest.raises(MigrationError, match=message):
        from_aqtp({**variables, "aqt": aqt}, factory(Mlp), {"x": X})


def test_a_legacy_scale_of_another_contraction_is_refused():
    variables, _ = stored(Mlp, 8, legacy=True)
    aqt = layers_of(variables["aqt"])
    aqt["AqtDotGeneral_0"]["qrhs"]["scale"] = np.ones((1, 1, 4), np.float32)
    with pytest.raises(MigrationError, match=r"scale of shape \(1, 1, 4\) in the layout of the"):
        from_aqtp({**variables, "aqt": aqt}, factory(Mlp), {"x": X})


def test_a_model_trained_with_aqtp_is_converted_and_served_as_it_was_trained(tmp_path):
    variables, _ = stored(Mlp, 8, legacy=True)
    params = {"params": variables["params"]}
    convert(factory(Mlp), params, {"x": X}, tmp_path / "m" / "1", tile=2)
    trained = quietly(jax.jit(Mlp(Theirs(TRAIN)).apply))(params, X[:2], rngs=KEYS)
    program = Program(bundle.load(tmp_path / "m" / "1"), max_rows=4)
    assert_same_bits(program({"x": X})["output"][:2], trained)
