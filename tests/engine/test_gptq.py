"""GPTQ: less error than rounding to nearest, and integers that train and serve agree on."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from aqt_engine import QuantMode, bundle, config
from aqt_engine.calibration import ConstantCalibration, MinMaxCalibration, PercentileCalibration
from aqt_engine.convert import convert
from aqt_engine.execution import Program
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral, AqtEinsum, quantize
from aqt_engine.ops import TileCount, Tiling
from aqt_engine.ptq import gptq
from aqt_engine.ptq.gptq import GptqError
from aqt_engine.ptq.weights import Weights
from aqt_engine.rules import Rule, Rules
from engine.contractions import assert_same_bits
from engine.linen_modes import stored_leaves

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]

TRAIN, CONVERT = QuantMode.TRAIN, QuantMode.CONVERT


def weights_of(bits, **changes):
    """8-bit activations and weights of `bits`."""
    right = config.int_tensor(bits)
    c = config.DotGeneral(fwd=config.raw(config.int_tensor(8), right))
    return config.update(c, "fwd.rhs", **changes) if changes else c


class Digits(nn.Module):
    """A convolution, a dense layer, two axes at once, and a weight on the left."""

    mode: QuantMode = TRAIN
    quantization: config.DotGeneral | None = None

    @nn.compact
    def __call__(self, x):
        c = self.quantization
        conv = AqtConvGeneralDilated(c, rhs_quant_mode=self.mode)
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, conv_general_dilated=conv)(x))
        dot_general = AqtDotGeneral(c, rhs_quant_mode=self.mode)
        x = x.reshape(len(x), 4, -1)
        x = nn.relu(nn.DenseGeneral(48, axis=(-2, -1), dot_general=dot_general)(x))
        x = nn.relu(nn.Dense(32, dot_general=dot_general)(x))
        w = self.param("w", nn.initializers.lecun_normal(), (10, 32))
        einsum = AqtEinsum(None if c is None else c.swapped(), lhs_quant_mode=self.mode)
        return einsum("of,nf->no", w, x)


@functools.cache
def trained():
    """Images for calibration and others, and parameters trained in float."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    labels = digits.target
    params = jax.jit(Digits().init)(jax.random.key(0), images[:2])
    optimizer = optax.adam(3e-3)

    def loss(params, x, y):
        logits = Digits().apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(i, state):
        params, moments = state
        rows = jax.random.randint(jax.random.key(i), (64,), 0, 1000)
        found = jax.grad(loss)(params, jnp.asarray(images)[rows], jnp.asarray(labels)[rows])
        updates, moments = optimizer.update(found, moments)
        return optax.apply_updates(params, updates), moments

    params, _ = jax.lax.fori_loop(0, 300, step, (params, optimizer.init(params)))
    calibration = [{"x": images[i : i + 64]} for i in range(0, 256, 64)]
    held_out = {"x": images[1000:1400]}
    return params, calibration, held_out


def squared_errors(model, before, after, inputs):
    """By weight, those of a layer's output: for the original rounded to nearest, and for `after`.

    Both for the same inputs, those that the layer has behind layers that GPTQ has rounded.
    """
    weights = Weights(model, after, inputs)
    nearest, found = {}, {}
    for weight in weights:
        original = weights.operand(before, inputs, weight)

        def look(w, x, weight=weight, original=original):
            def squared(v):
                rounded = weight.quantize(v).dequant().reshape(v.shape)
                form = weight.form
                return jnp.sum((form.inputs(x) @ form.matrix(rounded - original)) ** 2)

            return squared(original), squared(w)

        ((a, b),) = weights.look(after, inputs, [(weight, look)])
        nearest[weight.parameter], found[weight.parameter] = float(a), float(b)
    return nearest, found


@pytest.mark.parametrize(
    ("bits", "act_order"),
    [pytest.param(*of, marks=pytest.mark.long) for of in ((4, False), (3, True))],
)
def test_every_layer_is_closer_than_rounded_to_nearest(bits, act_order):
    params, calibration, held_out = trained()
    model = functools.partial(Digits, quantization=weights_of(bits))
    rounded = gptq(model, params, calibration, act_order=act_order, block_size=16)
    seen = {"x": np.concatenate([batch["x"] for batch in calibration])}
    nearest, found = squared_errors(model, params, rounded, seen)
    assert len(found) == 4
    assert all(found[name] < nearest[name] for name in found), (nearest, found)
    nearest, found = squared_errors(model, params, rounded, held_out)
    assert sum(found.values()) < sum(nearest.values())


@pytest.mark.long
def test_the_integers_are_stored_and_served_as_they_train(tmp_path):
    params, calibration, _ = trained()
    model = functools.partial(Digits, quantization=weights_of(4))
    rounded = gptq(model, params, calibration[:1])
    stored = functools.partial(model(CONVERT).apply, mutable=["aqt"])
    before, after = (jax.jit(stored)(v, calibration[0]["x"])[1]["aqt"] for v in (params, rounded))
    tensors = zip(*(stored_leaves(s).values() for s in (before, after)), strict=True)
    for nearest, found in tensors:
        assert_same_bits(found.scale, nearest.scale)
        assert (found.qvalue != nearest.qvalue).any()
    # Every value is its integer times the scale, but those that the scale comes from.
    kernel = rounded["params"]["Dense_0"]["kernel"]
    dense = after["AqtDotGeneral_0"]["qrhs_1"]
    free = np.abs(kernel) < np.abs(kernel).max(axis=0)
    assert_same_bits(np.asarray(kernel)[free], np.asarray(dense.dequant())[free])
    convert(model, rounded, calibration[0], tmp_path / "m" / "1", tile=4)
    program = Program(bundle.load(tmp_path / "m" / "1"), max_rows=4)
    images = calibration[1]["x"][:4]
    trains = jax.jit(model(TRAIN).apply)(rounded, images)
    assert_same_bits(program({"x": images})["output"], trains)


@dataclasses.dataclass(frozen=True)
class One:
    """A model of one dense layer."""

    quantization: config.DotGeneral
    dtype: jnp.dtype = jnp.float32

    def __call__(self, mode):
        dot_general = AqtDotGeneral(self.quantization, rhs_quant_mode=mode)
        return nn.Dense(30, use_bias=False, dtype=self.dtype, dot_general=dot_general)


RNG = np.random.default_rng(0)
X = (RNG.normal(size=(80, 24)) @ RNG.normal(size=(24, 24))).astype(np.float32)
KERNEL = {"params": {"kernel": jnp.asarray(RNG.normal(size=(24, 30)), jnp.float32)}}


@pytest.mark.parametrize(
    ("act_order", "block_size"),
    [
        (True, 7),
        *(
            pytest.param(*of, marks=pytest.mark.long)
            for of in ((False, 1), (True, 1), (False, 7), (False, 128), (True, 128))
        ),
    ],
)
def test_the_integers_are_those_of_the_paper(act_order, block_size):
    """Optimal brain surgery step by step: the inverse of H of what is left, each time anew."""
    w = np.asarray(KERNEL["params"]["kernel"], np.float64)
    scale = np.abs(w).max(axis=0) / 7.5
    h = X.astype(np.float64).T @ X
    h += 0.01 * np.diag(h).mean() * np.eye(24)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(24)
    left, integers = w.copy(), np.zeros_like(w)
    for step, i in enumerate(order):
        pinned = np.abs(w[i]) == np.abs(w).max(axis=0)
        scaled = np.where(pinned, w[i], left[i]) / scale
        integers[i] = np.round(np.clip(scaled, -7, 7))
        rest = order[step:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        left[rest] -= np.outer(inverse[:, 0], (left[i] - integers[i] * scale) / inverse[0, 0])
    rounded = gptq(
        One(weights_of(4)), KERNEL, [{"inputs": X}], act_order=act_order, block_size=block_size
    )
    weight = next(iter(Weights(One(weights_of(4)), rounded, {"inputs": X})))
    found = weight.quantize(rounded["params"]["kernel"]).qvalue
    np.testing.assert_array_equal(found.astype(np.int32), integers)


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        (weights_of(4, calibration=MinMaxCalibration()), jnp.float32),
        pytest.param(weights_of(4), jnp.bfloat16, marks=pytest.mark.long),
        *(
            pytest.param(quantization, jnp.float32, marks=pytest.mark.long)
            for quantization in (
                config.update(weights_of(3), "fwd", local_aqt=config.LocalAqt(2)),
                config.weight_only(4),
                weights_of(4, calibration=ConstantCalibration(3.0)),
            )
        ),
    ],
)
def test_other_weights(quantization, dtype):
    model = One(quantization, dtype)
    rounded = gptq(model, KERNEL, [{"inputs": X[:40]}, {"inputs": X[40:]}])
    nearest, found = squared_errors(model, KERNEL, rounded, {"inputs": X})
    assert found[("kernel",)] < nearest[("kernel",)]


def in_tiles(mode):
    tiling = Tiling(rhs=(TileCount(1, 2),))
    dot_general = AqtDotGeneral(weights_of(4), rhs_quant_mode=mode, tiling=tiling)
    return nn.Dense(30, use_bias=False, dot_general=dot_general)


class Tied(nn.Module):
    """A matrix that is contracted from both sides."""

    mode: QuantMode

    @nn.compact
    def __call__(self, inputs):
        w = self.param("w", nn.initializers.normal(), (24, 24))
        einsum = AqtEinsum(weights_of(4), rhs_quant_mode=self.mode)
        return einsum("ni,ij->nj", einsum("ni,ij->nj", inputs, w), w.T)


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (One(weights_of(4)), [], "`batches` is empty"),
        (lambda mode: One(weights_of(4))(TRAIN), [X], "contracts no parameter that is stored"),
        (One(weights_of(4, calibration=PercentileCalibration(80))), [X], "kernel has Percentile"),
        (One(weights_of(8), jnp.bfloat16), [X], "cannot tell the values of its buckets apart"),
        (in_tiles, [X], "kernel is quantized in tiles by `tiling`"),
        (Tied, [X], "w is contracted in several ways"),
    ],
)
def test_what_cannot_be_rounded_is_refused_by_name(model, batches, message):
    variables = jax.jit(model(TRAIN).init)(jax.random.key(0), X) if model is Tied else KERNEL
    with pytest.raises(GptqError, match=message):
        gptq(model, variables, [{"inputs": x} for x in batches])


def test_a_model_that_is_quantized_by_rules():
    model = quantize(nn.Dense(30, use_bias=False), Rules((Rule(modules="", config=weights_of(4)),)))
    rounded = gptq(model, KERNEL, [{"inputs": X}])
    by_hand = gptq(One(weights_of(4)), KERNEL, [{"inputs": X}])
    jax.tree.map(assert_same_bits, rounded, by_hand)
