"""Operations that mix rows are found in the program and named; what does not is not accused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sequences
from aqt_engine import QuantMode, config
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.rows import counting, first_mixing, mixing

ROWS, LENGTH, WIDTH = 5, 5, 6  # as many rows as positions, so that sizes tell nothing


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


X = struct(ROWS, LENGTH, WIDTH)
FLAT = struct(ROWS, WIDTH)
IDS = struct(ROWS, LENGTH, dtype=jnp.int32)


def found(fn, *inputs, variables=None):
    """What is found in `fn(variables, *inputs)`."""
    named = {f"in{i}": x for i, x in enumerate(inputs)}

    def forward(variables, of):
        answer = fn(variables, *(of[name] for name in named))
        return answer if isinstance(answer, dict) else {"y": answer}

    return mixing(forward, variables, named)


def of_module(module, *inputs, **apply):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return found(lambda v, *x: module.apply(v, *x, **apply), *inputs, variables=shapes)


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.GroupNorm(2)(nn.Conv(4, (3, 3), feature_group_count=2)(x))
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        h = (
            nn.Embed(11, 8)(ids)
            + self.param("p", nn.initializers.normal(), (20, 8))[: ids.shape[1]]
        )
        mask = nn.combine_masks(nn.make_causal_mask(ids), nn.make_attention_mask(ids > 0, ids > 0))
        h = h + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(h), mask=mask)
        h = nn.Dense(8)(nn.gelu(nn.RMSNorm()(h)))
        last = jnp.take_along_axis(h, (ids > 0).sum(1)[:, None, None] - 1, axis=1)[:, 0]
        return {"last": last, "top": lax.top_k(last, 2)[1], "logits": nn.Embed(11, 8).attend(h)}


class Mixture(nn.Module):
    """Experts chosen by token: sorted by expert over all rows, and put back."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (3, WIDTH, 4))
        tokens = x.reshape(-1, WIDTH)
        expert = jnp.argmax(nn.Dense(3)(tokens), axis=-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=3)
        y = lax.ragged_dot(tokens[order], w, sizes.astype(jnp.int32))
        return y[jnp.argsort(order)].reshape(*x.shape[:-1], 4)


def quantized(mode=QuantMode.TRAIN):
    cfg = config.fully_quantized(fwd_bits=8)
    return nn.Sequential([nn.Dense(4, dot_general=AqtDotGeneral(cfg)), nn.relu, nn.Dense(2)])


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Convolutional(), [struct(ROWS, 8, 8, 3)]),
        (Transformer(), [IDS]),
        (nn.RNN(nn.GRUCell(4)), [X]),
        (nn.Bidirectional(nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.GRUCell(4))), [X]),
        (Mixture(), [X]),
        (quantized(), [X]),
        (nn.ConvTranspose(3, (3,)), [X]),
        (nn.WeightNorm(nn.Dense(3)), [FLAT]),
        (nn.Dropout(0.5, deterministic=True), [FLAT]),
        (sequences.Tagger(QuantMode.TRAIN), [IDS, struct(ROWS), struct(ROWS)]),
    ],
)
def test_layers_of_all_kinds_are_not_accused(module, inputs):
    assert of_module(module, *inputs) == []


ROWWISE = {
    "batched gather": lambda _, x: x[jnp.arange(ROWS), 0],
    "merged and parted": lambda _, x: x.reshape(-1, WIDTH).cumsum(1).reshape(x.shape).sum((1, 2)),
    "merged the other way": lambda _, x: (
        x.transpose(1, 0, 2).reshape(-1, WIDTH).max(1).reshape(LENGTH, ROWS).T
    ),
    "in halves": lambda _, x: jnp.concatenate([x[:2] * 2, x[2:] * 2]),
    "stacked twice": lambda _, x: jnp.concatenate([x, -x]).reshape(2, ROWS, LENGTH, WIDTH)[0],
    "by row": lambda _, x: lax.map(lambda row: row.sum(), x),
    "vmapped": lambda _, x: jax.vmap(lambda row: row @ row.T)(x),
    "sorted within rows": lambda _, x: jnp.sort(x, axis=1) + jnp.median(x, axis=2, keepdims=True),
    "until all are done": lambda _, x: lax.while_loop(
        lambda s: (s < 10).any(), lambda s: jnp.where(s < 10, s + 1, s), x
    ),
    "set and padded": lambda _, x: jnp.pad(x.at[:, 0].set(1.0), ((0, 0), (1, 0), (0, 0))),
    "fourier": lambda _, x: jnp.fft.fft(x).real,
    "the same noise for all": lambda _, x: x + jax.random.normal(jax.random.key(0), (WIDTH,)),
    "shared scale of the weights": lambda _, x: x @ jnp.ones((WIDTH, 3)) / jnp.max(jnp.ones(7)),
    "checkpointed": lambda _, x: jax.checkpoint(lambda y: jnp.sin(y).sum(-1))(x),
    "variables choose": lambda _, x: jnp.where(jnp.ones(()) > 0, x, x / jnp.abs(x).max()),
    "what mixes is not answered": lambda _, x: (x.mean(0), x * 2)[1],
}


@pytest.mark.parametrize("name", ROWWISE)
def test_what_computes_row_by_row_is_not_accused(name):
    assert found(ROWWISE[name], X) == []


MIXING = {
    "reduce_sum": lambda _, x: x - x.mean(axis=0),
    "reduce_max": lambda _, x: x / jnp.max(jnp.abs(x)),
    "sort": lambda _, x: jnp.sort(x, axis=0),
    "cumsum": lambda _, x: jnp.cumsum(x, axis=0),
    "dot_general": lambda _, x: x @ jnp.einsum("nlw,nlv->wv", x, x),
    "rev": lambda _, x: x[::-1],
    "argmax": lambda _, x: x * jnp.argmax(x, axis=0),
    "random_bits": lambda _, x: x * jax.random.uniform(jax.random.key(0), x.shape),
    "fft": lambda _, x: jnp.fft.fftn(x).real,
    "reduce_window_sum": lambda _, x: lax.reduce_window(
        x, 0.0, lax.add, (2, 1, 1), (1, 1, 1), "SAME"
    ),
    "cond": lambda _, x: lax.cond((x > 0).any(), lambda y: y, lambda y: -y, x),
    "top_k": lambda _, x: x * lax.top_k(x.T, 1)[0].T,
}


@pytest.mark.parametrize("primitive", MIXING)
def test_what_mixes_rows_is_named(primitive):
    (mixed,) = found(MIXING[primitive], X)
    assert mixed.op.primitive == primitive
    assert "test_rows.py" in mixed.op.source
    assert mixed.output == "y"


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        return nn.Dense(2)(nn.BatchNorm(use_running_average=False, name="norm")(x))


def test_batch_norm_in_training_mode_is_named_with_its_module_and_line():
    shapes = jax.eval_shape(Normalized().init, jax.random.key(0), FLAT)

    def training(variables, x):
        return Normalized().apply(variables, x, mutable=["batch_stats"])[0]

    (mixed,) = found(training, FLAT, variables=shapes)
    assert mixed.op.path == "Normalized/norm"
    assert str(mixed).startswith("output 'y': `reduce_sum` in Normalized/norm (")
    assert mixed.op.source.endswith("__call__")
    assert str(mixed).endswith("reduces over the rows")


def test_dropout_and_what_is_within_loops_and_branches_is_named():
    dropout = nn.Dropout(0.5, deterministic=False)
    rngs = {"dropout": jax.random.key(0)}
    (mixed,) = found(lambda _, x: dropout.apply({}, x, rngs=rngs), FLAT)
    assert (mixed.op.primitive, mixed.does) == (
        "random_bits",
        "draws other random numbers for each row",
    )

    def looped(_, x):
        def turn(carry, t):
            return carry + lax.cond(t.shape[0] > 3, lambda: t.mean(0), lambda: t[0] * 0), t

        return lax.scan(turn, jnp.zeros(WIDTH), x.swapaxes(0, 1))[0] + x[:, 0]

    (mixed,) = found(looped, X)
    assert mixed.op.primitive == "reduce_sum"


TRIED = {
    "sub": lambda _, x: x - x[:1],
    "concatenate": lambda _, x: x + jnp.roll(x, 1, axis=0)[..., ::-1],
    "mul": lambda _, x: x * jnp.arange(3.0)[:, None],
    "scatter-add": lambda _, x: jnp.zeros_like(x).at[jnp.argmax(x, axis=1)].add(x),
}


@pytest.mark.parametrize("primitive", TRIED)
def test_what_the_program_does_not_say_is_found_by_trial(primitive):
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    assert found(TRIED[primitive], struct(3, 4)) == []
    op = first_mixing(lambda v, of: {"y": TRIED[primitive](v, of["x"])}, None, {"x": x})
    assert op is not None
    assert op.primitive == primitive


def test_trials_find_nothing_in_what_computes_row_by_row():
    x = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)

    def fine(_, of):
        return {"y": jax.jit(lambda x: jax.nn.softmax(x @ x.swapaxes(1, 2)))(of["x"])}

    assert first_mixing(fine, None, {"x": x}) is None


def counted(fn, tile=4):
    """What is found of `fn` with four rows, computed `tile` at once."""
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    x[1] = np.nan
    parts = [np.asarray(fn(None, {"x": x[i : i + tile]})["y"]) for i in range(0, 4, tile)]
    return counting(fn, None, {"x": x}, {"y": np.concatenate(parts)}, tile)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x / x.shape[0],
        lambda x: x * 2 if len(x) > 5 else x,
        lambda x: x + jnp.arange(8.0)[len(x) - 1],
        lambda x: lax.fori_loop(0, len(x), lambda i, y: y * 2, x),
        lambda x: jnp.argmax(x, axis=1) + len(x),
    ],
)
def test_answers_that_depend_on_how_many_rows_there_are_are_found(fn):
    for tile in (1, 4):
        found = counted(lambda _, of: {"y": fn(jnp.asarray(of["x"]))}, tile)
        assert f"between {tile} and 8 rows" in found


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[jnp.arange(len(x)), jnp.argmax(x, axis=1)],
        lambda x: lax.map(lambda row: row * 2, x),
        lambda x: x.reshape(4, 3) * 2,
        lambda x: x.at[-1].get()[None] + 0 * x,
        lambda x: jax.nn.softmax(x),
    ],
)
def test_answers_that_do_not_are_not_accused(fn):
    assert counted(lambda _, of: {"y": fn(jnp.asarray(of["x"]))}) is None
