"""Conversion: what is stored, what is refused, and that the result is what was trained."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training import train_state

from aqt_engine import QuantMode, bundle, config
from aqt_engine.checkpoint import CheckpointError, load_variables
from aqt_engine.convert import ConversionError, convert
from aqt_engine.execution import Program
from aqt_engine.flax import AqtDotGeneral, AqtEinsum
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.slow

INT8 = config.fully_quantized(fwd_bits=8, bwd_bits=8)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 6)).astype(np.float32)


def dense(features, mode, cfg=INT8):
    return nn.Dense(features, dot_general=AqtDotGeneral(cfg, rhs_quant_mode=mode))


class Mlp(nn.Module):
    mode: QuantMode

    @nn.compact
    def __call__(self, x):
        return dense(3, self.mode)(nn.relu(dense(8, self.mode)(x)))


class Branchy(nn.Module):
    """Two float inputs, an integer one and a flag; three outputs; a weight on either side."""

    mode: QuantMode

    @nn.compact
    def __call__(self, left, right, token, flag):
        embedded = nn.Embed(11, 6)(token)
        mixing = self.param("mixing", nn.initializers.normal(), (5, 6))
        einsum = AqtEinsum(config.fully_quantized(fwd_bits=4), lhs_quant_mode=self.mode)
        h = einsum("of,nf->no", mixing, left + embedded)
        h = jnp.where(flag[:, None], h, -h) + dense(5, self.mode)(right).astype(jnp.float32)
        return {"z": h, "any": (h > 0).any(axis=1), "half": h.astype(jnp.bfloat16)}


class Normalized(nn.Module):
    mode: QuantMode
    training: bool

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.training)(dense(4, self.mode)(x))
        return dense(2, self.mode)(x)


def init(factory, example):
    return jax.jit(factory(QuantMode.TRAIN).init)(
        jax.random.key(0), **{k: jnp.asarray(v) for k, v in example.items()}
    )


def train_at_tile(factory, variables, inputs, tile):
    forward = jax.jit(lambda v, x: factory(QuantMode.TRAIN).apply(v, **x))
    rows = len(next(iter(inputs.values())))
    padded = {k: np.resize(v, (-(-rows // tile) * tile, *v.shape[1:])) for k, v in inputs.items()}
    tiles = [
        forward(variables, {k: v[i : i + tile] for k, v in padded.items()})
        for i in range(0, -(-rows // tile) * tile, tile)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:rows], *tiles)


@pytest.mark.parametrize(
    "tile", [1, 2, *(pytest.param(t, marks=pytest.mark.long) for t in (8, 16))]
)
def test_served_is_trained(tmp_path, tile):
    variables = init(Mlp, {"x": X})
    manifest = convert(Mlp, variables, {"x": X}, tmp_path / "m" / "1", tile=tile)
    assert manifest.tile == tile
    program = Program(bundle.load(tmp_path / "m" / "1"), max_rows=64)
    fresh = np.random.default_rng(1).normal(size=(37, 6)).astype(np.float32) * 5
    found = program({"x": fresh})["output"]
    assert_same_bits(found, train_at_tile(Mlp, variables, {"x": fresh}, tile))


def branchy_inputs(rows, seed):
    rng = np.random.default_rng(seed)
    return {
        "left": rng.normal(size=(rows, 6)).astype(np.float32),
        "right": rng.normal(size=(rows, 4)).astype(ml_dtypes.bfloat16),
        "token": rng.integers(0, 11, rows, np.int32),
        "flag": rng.integers(0, 2, rows).astype(bool),
    }


def test_several_inputs_and_outputs_of_several_dtypes(tmp_path):
    example = branchy_inputs(20, 0)
    variables = init(Branchy, example)
    manifest = convert(Branchy, variables, example, tmp_path / "m" / "1")
    assert [(t.name, t.dtype, t.shape) for t in manifest.inputs] == [
        ("left", "float32", ("batch", 6)),
        ("right", "bfloat16", ("batch", 4)),
        ("token", "int32", ("batch",)),
        ("flag", "bool", ("batch",)),
    ]
    assert {(t.name, t.dtype) for t in manifest.outputs} == {
        ("z", "float32"),
        ("any", "bool"),
        ("half", "bfloat16"),
    }
    stored = {w.name: w for w in manifest.weights}
    assert stored["aqt/AqtEinsum_0/AqtDotGeneral_0/qlhs/qvalue"].dtype == "int4"
    assert "params/mixing" not in stored
    assert "params/Dense_0/kernel" not in stored
    assert "params/Embed_0/embedding" in stored
    fresh = branchy_inputs(40, 1)
    found = Program(bundle.load(tmp_path / "m" / "1"), max_rows=64)(fresh)
    expected = train_at_tile(Branchy, variables, fresh, 16)
    for name, array in expected.items():
        assert_same_bits(found[name], array)


def test_wide_examples_take_the_dtypes_of_jax(tmp_path):
    variables = init(Mlp, {"x": X})
    manifest = convert(Mlp, variables, {"x": X.astype(np.float64)}, tmp_path / "m" / "1")
    assert manifest.inputs[0].dtype == "float32"
    with pytest.raises(ConversionError, match="do not fit int32"):
        convert(Mlp, variables, {"x": np.array([[2**40] * 6])}, tmp_path / "m" / "2")


def test_inference_mode_batch_norm_converts_and_training_mode_is_refused(tmp_path):
    variables = init(lambda mode: Normalized(mode, training=False), {"x": X})
    convert(lambda mode: Normalized(mode, False), variables, {"x": X}, tmp_path / "m" / "1")

    def batch_mean(mode):
        class Mixing(nn.Module):
            @nn.compact
            def __call__(self, x):
                y = dense(4, mode)(x)
                return y - y.mean(axis=0)

        return Mixing()

    variables = init(batch_mean, {"x": X})
    with pytest.raises(ConversionError, match=r"`reduce_sum` in Mixing \(.*reduces over the rows"):
        convert(batch_mean, variables, {"x": X}, tmp_path / "m" / "2")

    def neighborly(mode):
        class Neighborly(nn.Module):
            @nn.compact
            def __call__(self, x):
                y = dense(4, mode)(x)
                return y * jnp.roll(y, 1, axis=0)

        return Neighborly()

    named = r"not exact.*depends on the other rows.*is `concatenate` in Neighborly.*test_convert.py"
    with pytest.raises(ConversionError, match=named):
        convert(neighborly, variables, {"x": X}, tmp_path / "m" / "2")
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["1"]


def test_a_model_that_counts_its_rows_is_refused(tmp_path):
    def counting(mode):
        class Counting(nn.Module):
            @nn.compact
            def __call__(self, x):
                y = dense(4, mode)(x)
                return y[jnp.arange(len(y))] / (len(y) if mode is QuantMode.TRAIN else 1)

        return Counting()

    variables = init(counting, {"x": X})
    named = r"change with the number of rows.*'output' by more than \d+%.*between 16 and 32 rows"
    with pytest.raises(ConversionError, match=named):
        convert(counting, variables, {"x": X}, tmp_path / "m" / "1")


def _unquantized(mode):
    return nn.Dense(3)


def _scalar(mode):
    class Scalar(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dense(4, mode)(x).sum()

    return Scalar()


@pytest.mark.parametrize(
    ("factory", "example", "tile", "message"),
    [
        (_unquantized, {"inputs": X}, 16, "stored no quantized weight.*rhs_quant_mode"),
        (_scalar, {"x": X}, 16, r"'output' is \(\) for inputs of 16 rows"),
        (Mlp, {}, 16, "holds no input"),
        (Mlp, {"x": np.float32(1)}, 16, r"'x' has shape \[\]"),
        (Mlp, {"x": X[:0]}, 16, "at least one row"),
        (Mlp, {"x": X, "y": X[:3]}, 16, "'x' has 20, 'y' has 3"),
        (Mlp, {"x": X}, 0, "`tile` is a number of rows, at least 1"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path, factory, example, tile, message):
    variables = {"params": {}}
    if example and tile and len(example) == 1 and next(iter(example.values())).size:
        key = next(iter(example))
        variables = init(factory, {key: X})
    with pytest.raises(ConversionError, match=message):
        convert(factory, variables, example, tmp_path / "m" / "1", tile=tile)
    assert not (tmp_path / "m").exists() or not any((tmp_path / "m").iterdir())


def test_a_version_is_never_overwritten(tmp_path):
    (tmp_path / "1").mkdir()
    with pytest.raises(FileExistsError, match="a served version never changes"):
        convert(Mlp, init(Mlp, {"x": X}), {"x": X}, tmp_path / "1")


def test_a_collection_that_the_model_would_store_itself_is_refused(tmp_path):
    """As `aqtp` stores it, and as Orbax restores any without a target."""
    variables = Mlp(QuantMode.TRAIN).init(jax.random.key(0), X)
    stored = {"Dense_0": {"AqtDotGeneral_0": {"qrhs": {"frozen": np.ones((6, 8), np.int8)}}}}
    with pytest.raises(ConversionError, match=r"collection 'aqt'.*give them without it"):
        convert(Mlp, {**variables, "aqt": stored}, {"x": X}, tmp_path / "m" / "1")


def test_checkpoints_in_every_form(tmp_path):
    variables = init(Mlp, {"x": X})
    state = train_state.TrainState.create(
        apply_fn=None, params=variables["params"], tx=optax.adam(1e-3)
    )
    forms = {
        "collections": variables,
        "parameters": variables["params"],
        "state": state,
        "state of collections": state.replace(params=variables),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        for name, tree in forms.items():
            checkpointer.save(tmp_path / name, tree)
    with ocp.CheckpointManager(tmp_path / "manager") as manager:
        for step in (2, 10):
            scaled = jax.tree.map(lambda x, s=step: x * (s == 10), variables)
            manager.save(step, args=ocp.args.StandardSave(scaled))
    for name in (*forms, "manager", "manager/10"):
        loaded = load_variables(tmp_path / name)
        jax.tree.map(assert_same_bits, loaded, jax.tree.map(np.asarray, variables))
    with pytest.raises(CheckpointError, match="holds no Orbax checkpoint"):
        load_variables(tmp_path / "nowhere")
    (tmp_path / "collections" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_variables(tmp_path / "collections")
