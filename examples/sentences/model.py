"""MiniLM, a BERT encoder of sentences, as a Flax module: tokens to one unit vector.

The architecture is that of Devlin et al., arXiv:1810.04805, with the sizes of
`sentence-transformers/all-MiniLM-L6-v2`: the tokens' last states are averaged and normalized.
The factories below differ in what of its Dense layers is quantized after training, and how.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_engine import QuantMode, config
from aqt_engine.calibration import MseCalibration
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.pretrained import TensorRule
from aqt_engine.statistics import MeanOfAbsMaxCalibration

VOCABULARY = 30522
POSITIONS = 512
LAYERS = 6
HEADS = 12
WIDTH = 384
HIDDEN = 1536
EPSILON = 1e-12
_INT8 = config.fully_quantized(fwd_bits=8, bwd_bits=None)
_LAYER = r"encoder\.layer\.(\d+)\."


def _dense(tensor: str, place: str) -> tuple[TensorRule, ...]:
    """A matrix, which PyTorch keeps as (outputs, inputs), and its bias."""
    return (
        TensorRule(rf"{tensor}\.weight", f"params/{place}/kernel", axes=(1, 0)),
        TensorRule(rf"{tensor}\.bias", f"params/{place}/bias"),
    )


def _normalization(tensor: str, place: str) -> tuple[TensorRule, ...]:
    return (
        TensorRule(rf"{tensor}\.weight", f"params/{place}/scale"),
        TensorRule(rf"{tensor}\.bias", f"params/{place}/bias"),
    )


TENSORS = (
    *(
        TensorRule(rf"embeddings\.{tensor}_embeddings\.weight", f"params/{place}/embedding")
        for tensor, place in (
            ("word", "words"),
            ("position", "positions"),
            ("token_type", "segments"),
        )
    ),
    *_normalization(r"embeddings\.LayerNorm", "norm"),
    *_dense(rf"{_LAYER}attention\.self\.(query|key|value)", r"layer_\1/\2"),
    *_dense(rf"{_LAYER}attention\.output\.dense", r"layer_\1/out"),
    *_normalization(rf"{_LAYER}attention\.output\.LayerNorm", r"layer_\1/attention_norm"),
    *_dense(rf"{_LAYER}intermediate\.dense", r"layer_\1/up"),
    *_dense(rf"{_LAYER}output\.dense", r"layer_\1/down"),
    *_normalization(rf"{_LAYER}output\.LayerNorm", r"layer_\1/output_norm"),
    # What BERT was trained with and this encoder does not end in, and a count from 0 on.
    TensorRule(r"pooler\..*|embeddings\.position_ids", None),
)
"""Where each tensor of the published file belongs."""


class Encoder(nn.Module):
    """Token ids (rows, length) and their mask, 0 where padded, to embeddings (rows, 384)."""

    config: config.DotGeneral | None
    quant_mode: QuantMode = QuantMode.TRAIN
    activation_mode: QuantMode = QuantMode.TRAIN
    layers: int = LAYERS

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> dict[str, jax.Array]:
        present = attention_mask > 0
        x = nn.Embed(VOCABULARY, WIDTH, name="words")(input_ids)
        x += nn.Embed(POSITIONS, WIDTH, name="positions")(jnp.arange(input_ids.shape[1]))
        # The second segment's embedding is for pairs of sentences; here there is only the first.
        x += nn.Embed(2, WIDTH, name="segments")(jnp.zeros_like(input_ids))
        x = _norm("norm")(x)
        for layer in range(self.layers):
            x = self.block(layer)(x, present)
        weights = present[..., None].astype(x.dtype)
        mean = (x * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1e-9)
        length = jnp.sqrt((mean * mean).sum(axis=1, keepdims=True))
        return {"embedding": mean / jnp.maximum(length, 1e-12)}

    def block(self, layer: int) -> "Block":
        modes = (self.quant_mode, self.activation_mode)
        return Block(self.config, *modes, name=f"layer_{layer}")


class Block(nn.Module):
    """Attention over the tokens that are present, then a perceptron; each added and normalized."""

    config: config.DotGeneral | None
    quant_mode: QuantMode
    activation_mode: QuantMode

    @nn.compact
    def __call__(self, x: jax.Array, present: jax.Array) -> jax.Array:
        rows, length, _ = x.shape

        def heads(name: str) -> jax.Array:
            return self.dense(WIDTH, name)(x).reshape(rows, length, HEADS, WIDTH // HEADS)

        query, key, value = heads("query"), heads("key"), heads("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / (WIDTH // HEADS) ** 0.5
        scores = jnp.where(present[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
        x = _norm("attention_norm")(x + self.dense(WIDTH, "out")(mixed.reshape(x.shape)))
        y = nn.gelu(self.dense(HIDDEN, "up")(x), approximate=False)
        return _norm("output_norm")(x + self.dense(WIDTH, "down")(y))

    def dense(self, features: int, name: str) -> nn.Dense:
        dot_general = AqtDotGeneral(
            self.config, lhs_quant_mode=self.activation_mode, rhs_quant_mode=self.quant_mode
        )
        return nn.Dense(features, dot_general=dot_general, name=name)


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=EPSILON, name=name)


def float_model(quant_mode: QuantMode) -> Encoder:
    return Encoder(config=None, quant_mode=quant_mode)


def dynamic_int8_model(quant_mode: QuantMode) -> Encoder:
    """Each token's activations get a scale of their own, from the token itself."""
    return Encoder(config=_INT8, quant_mode=quant_mode)


def static_int8_model(quant_mode: QuantMode) -> Encoder:
    """Each layer's activations share one scale, learned beforehand on typical sentences."""
    static = config.update(
        _INT8,
        "fwd.lhs",
        calibration=MeanOfAbsMaxCalibration(),
        calibration_mode=config.CalibrationMode.ALL_AXES,
    )
    # An activation has the mode too: it stores its scale.
    return Encoder(config=static, quant_mode=quant_mode, activation_mode=quant_mode)


def weight_only_int8_model(quant_mode: QuantMode) -> Encoder:
    """Weights are stored in 8 bits, and multiplied in float."""
    return Encoder(config=config.weight_only(8), quant_mode=quant_mode)


def weight_only_int4_model(quant_mode: QuantMode) -> Encoder:
    """Weights are stored in 4 bits, clipped where that gives the least error."""
    int4 = config.update(config.weight_only(4), "fwd.rhs", calibration=MseCalibration())
    return Encoder(config=int4, quant_mode=quant_mode)
