"""SmoothQuant: less error where channels are uneven, and the same function in float."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import QuantMode, config
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral, AqtEinsum, ChannelScale
from aqt_engine.ptq import Smoothing, smooth
from aqt_engine.ptq.smooth import SmoothingError
from engine.contractions import assert_same_bits

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]

INT8 = config.fully_quantized()
RNG = np.random.default_rng(0)
OUTLIERS = np.where(np.arange(32) % 11 == 0, 60, 1).astype(np.float32)
X = RNG.normal(size=(64, 32)).astype(np.float32)
TRAIN = QuantMode.TRAIN


@dataclasses.dataclass(frozen=True)
class Factory:
    """Gives a model for a mode, quantized or in float."""

    module: type
    quantization: config.DotGeneral | None = INT8

    def __call__(self, mode):
        return self.module(mode, self.quantization)


class Base(nn.Module):
    mode: QuantMode
    quantization: config.DotGeneral | None

    def dot_general(self):
        return AqtDotGeneral(self.quantization, rhs_quant_mode=self.mode)


class Normalized(Base):
    """A normalization with outlier channels before two layers; the second before a third."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(bias_init=nn.initializers.normal(), name="norm")(x)
        a = nn.Dense(24, dot_general=self.dot_general(), name="first")(x)
        b = nn.Dense(24, dot_general=self.dot_general(), name="second")(x)
        return nn.Dense(8, dot_general=self.dot_general(), name="third")(nn.relu(a) * b)


class Blocks(Base):
    """Heads, a convolution and an einsum; nothing before the first layer."""

    @nn.compact
    def __call__(self, x):
        x = ChannelScale(name="block_0")(x * OUTLIERS)
        x = nn.DenseGeneral((4, 8), dot_general=self.dot_general(), name="heads_0")(x)
        x = nn.relu(x)
        x = nn.DenseGeneral(32, (-2, -1), dot_general=self.dot_general(), name="merge_0")(x)
        conv = AqtConvGeneralDilated(self.quantization, rhs_quant_mode=self.mode)
        x = x.reshape(len(x), 8, 4)
        x = nn.Conv(6, (3,), feature_group_count=2, conv_general_dilated=conv, name="conv_0")(x)
        c = None if self.quantization is None else self.quantization.swapped()
        w = self.param("w", nn.initializers.normal(), (5, 6))
        return AqtEinsum(c, lhs_quant_mode=self.mode)("of,nsf->nso", w, nn.relu(x))


NORMALIZED = [
    Smoothing("norm", ("first", "second")),
    Smoothing("second", ("third",)),
]
BLOCKS = [
    Smoothing(r"block_(\d)", (r"heads_\1",)),
    Smoothing(r"heads_(\d)", (r"merge_\1",)),
    Smoothing(r"conv_(\d)", ("",)),
]


def with_outliers(model):
    """Variables of which channels of activations are large, and of weights as much smaller."""
    params = dict(jax.jit(model(TRAIN).init)(jax.random.key(0), X)["params"])
    if "norm" in params:
        params["norm"] = jax.tree.map(lambda p: p * OUTLIERS, params["norm"])
    for name in ("first", "second", "heads_0"):
        if name in params:
            kernel = params[name]["kernel"]
            shrunk = kernel / OUTLIERS.reshape(-1, *[1] * (kernel.ndim - 1))
            params[name] = {**params[name], "kernel": shrunk}
    return {"params": params}


def error(model, variables, truth):
    """The quantized model's, relative to what float answers."""
    found = jax.jit(model(TRAIN).apply)(variables, X)
    return float(jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth))


@pytest.mark.parametrize(
    ("module", "smoothings"),
    [
        (Normalized, NORMALIZED),
        pytest.param(Blocks, BLOCKS, marks=pytest.mark.long),
    ],
)
def test_the_error_falls_and_the_function_stays(module, smoothings):
    model, plain = Factory(module), jax.jit(Factory(module, None)(TRAIN).apply)
    variables = with_outliers(model)
    smoothed = smooth(model, variables, [{"x": X[:32]}, {"x": X[32:]}], smoothings)
    truth = plain(variables, X)
    assert_same_bits(plain(smoothed, X), truth)
    before, after = error(model, variables, truth), error(model, smoothed, truth)
    assert after < before / 8, (before, after)


def test_factors_are_those_of_the_paper_to_the_nearest_power_of_two():
    model = Factory(Normalized)
    variables = with_outliers(model)
    alpha = 0.7
    smoothed = smooth(model, variables, [{"x": X}], NORMALIZED[:1], alpha=alpha)
    old, new = variables["params"], smoothed["params"]
    normal = nn.LayerNorm().apply({"params": old["norm"]}, X)
    kernels = np.concatenate([np.abs(old[n]["kernel"]) for n in ("first", "second")], axis=1)
    exact = np.abs(normal).max(0) ** alpha / kernels.max(1) ** (1 - alpha)
    factors = np.exp2(np.round(np.log2(exact)))
    for name in ("scale", "bias"):
        assert_same_bits(new["norm"][name], np.float32(old["norm"][name] / factors))
    for name in ("first", "second"):
        grown = np.float32(old[name]["kernel"] * factors[:, None])
        assert_same_bits(new[name]["kernel"], grown)
    assert_same_bits(new["third"]["kernel"], old["third"]["kernel"])


class Residual(Base):
    """The output of the normalization is read twice, and there is a gelu."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(x)
        x = x + nn.Dense(32, dot_general=self.dot_general(), name="first")(x)
        return nn.Dense(4, dot_general=self.dot_general(), name="second")(nn.gelu(x))


@pytest.mark.parametrize(
    ("smoothing", "arguments", "message"),
    [
        (Smoothing("norm", ("first",)), {}, r"norm -> first.*a residual perhaps"),
        (Smoothing("first", ("second",)), {}, r"answers something else.*gelu"),
        (Smoothing("layer_.*", ("first",)), {}, "matches no layer.*there are first, norm, second"),
        (Smoothing("norm", ("norm",)), {}, "contracts no parameter.*those that do are first, sec"),
        (Smoothing("second", ("first",)), {}, r"second/bias has shape \(4,\)"),
        (Smoothing("norm", ("first",)), {"alpha": 2}, "needs batches and an `alpha`"),
    ],
)
def test_what_would_change_the_model_is_refused(smoothing, arguments, message):
    model = Factory(Residual)
    variables = jax.jit(model(TRAIN).init)(jax.random.key(0), OUTLIERS * X)
    with pytest.raises(SmoothingError, match=message):
        smooth(model, variables, [{"x": OUTLIERS * X}], [smoothing], **arguments)
