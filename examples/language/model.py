"""A small transformer that scores text, byte by byte, with its contractions in int8.

Those with a weight have it on the right, and conversion stores it. Queries meet keys with both
sides quantized on every call. The mean of the values stays in float: it is over positions, which
would share one scale, and so a byte's chances would depend on the bytes after it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_engine import QuantMode, config
from aqt_engine.flax import AqtDotGeneral, AqtEinsum

BYTES = 256
LONGEST = 128
LAYERS = 3
HEADS = 4
WIDTH = 128


class Scorer(nn.Module):
    """Texts (rows, length) of uint8, padded at their end with 0, to their log-likelihoods (rows,).

    Also gives the number of bytes that were scored.
    """

    config: config.DotGeneral | None
    quant_mode: QuantMode = QuantMode.TRAIN

    @nn.compact
    def __call__(self, text: jax.Array) -> dict[str, jax.Array]:
        scored = text > 0
        before = jnp.pad(text, ((0, 0), (1, 0)))[:, :-1].astype(jnp.int32)
        x = nn.Embed(BYTES, WIDTH, name="bytes")(before)
        x += nn.Embed(LONGEST, WIDTH, name="positions")(jnp.arange(text.shape[1]))
        for layer in range(LAYERS):
            x = Block(self.config, self.quant_mode, name=f"layer_{layer}")(x)
        dot_general = AqtDotGeneral(self.config, rhs_quant_mode=self.quant_mode)
        logits = nn.Dense(BYTES, dot_general=dot_general, name="next")(nn.LayerNorm()(x))
        chances = jnp.take_along_axis(
            nn.log_softmax(logits), text[..., None].astype(jnp.int32), axis=-1
        )[..., 0]
        return {
            "log_likelihood": jnp.where(scored, chances, 0).sum(axis=1),
            "bytes": scored.sum(axis=1, dtype=jnp.int32),
        }


class Block(nn.Module):
    """Attention to what came before, and a perceptron; each is added to what it was given."""

    config: config.DotGeneral | None
    quant_mode: QuantMode

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows, length, _ = x.shape
        y = self.dense(3 * WIDTH, "attention_in")(nn.LayerNorm()(x))
        query, key, value = jnp.split(y.reshape(rows, length, HEADS, -1), 3, axis=-1)
        scores = AqtEinsum(self.config)("bqhd,bkhd->bhqk", query, key) / (WIDTH // HEADS) ** 0.5
        earlier = jnp.tril(jnp.ones((length, length), bool))
        weights = nn.softmax(jnp.where(earlier, scores, jnp.finfo(scores.dtype).min))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        x += self.dense(WIDTH, "attention_out")(mixed.reshape(x.shape))
        y = nn.gelu(self.dense(4 * WIDTH, "up")(nn.LayerNorm()(x)))
        return x + self.dense(WIDTH, "down")(y)

    def dense(self, features: int, name: str) -> nn.Dense:
        dot_general = AqtDotGeneral(self.config, rhs_quant_mode=self.quant_mode)
        return nn.Dense(features, dot_general=dot_general, name=name)


def float_model(quant_mode: QuantMode) -> Scorer:
    return Scorer(config=None, quant_mode=quant_mode)


def int8_model(quant_mode: QuantMode) -> Scorer:
    """Forward and incoming gradients in int8; the gradient of a weight in float."""
    return Scorer(config=config.config_v4(fwd_bits=8, dlhs_bits=8), quant_mode=quant_mode)
