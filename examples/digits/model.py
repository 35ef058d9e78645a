"""A classifier of handwritten digits that mixes patches, with every contraction quantized.

An 8x8 image is cut into 16 patches of 2x2. Blocks then mix first over patches (an einsum with the
weight on the left), then over channels (Dense layers, the weight on the right).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_engine import QuantMode, config
from aqt_engine.flax import AqtDotGeneral, AqtEinsum

PATCHES = 16
CHANNELS = 96
CLASSES = 10


class Mixer(nn.Module):
    """Images (rows, 8, 8) of values 0..16 to logits (rows, 10)."""

    config: config.DotGeneral | None
    quant_mode: QuantMode = QuantMode.TRAIN
    blocks: int = 2

    @nn.compact
    def __call__(self, image: jax.Array) -> dict[str, jax.Array]:
        rows = image.shape[0]
        patches = (image / 16).reshape(rows, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4)
        x = self._dense(CHANNELS)(patches.reshape(rows, PATCHES, 4))
        for block in range(self.blocks):
            y = nn.LayerNorm()(x)
            mixing = self.param(
                f"patch_mixing_{block}", nn.initializers.lecun_normal(), (PATCHES, PATCHES)
            )
            einsum = AqtEinsum(self.config, lhs_quant_mode=self.quant_mode)
            x = x + nn.gelu(einsum("qp,npc->nqc", mixing, y))
            y = nn.gelu(self._dense(2 * CHANNELS)(nn.LayerNorm()(x)))
            x = x + self._dense(CHANNELS)(y)
        logits = self._dense(CLASSES)(nn.LayerNorm()(x).mean(axis=1))
        return {"logits": logits, "digit": jnp.argmax(logits, axis=-1).astype(jnp.int32)}

    def _dense(self, features: int) -> nn.Dense:
        dot_general = AqtDotGeneral(self.config, rhs_quant_mode=self.quant_mode)
        return nn.Dense(features, dot_general=dot_general)


def float_model() -> Mixer:
    return Mixer(config=None)


def int8_model(quant_mode: QuantMode) -> Mixer:
    """What `aqt convert --model examples.digits.model:int8_model` takes."""
    return Mixer(config=config.fully_quantized(fwd_bits=8, bwd_bits=8), quant_mode=quant_mode)
