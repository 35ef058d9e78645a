"""A convolutional classifier of handwritten digits, with every contraction quantized."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_engine import QuantMode, config
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral

FEATURES = (32, 64)
CLASSES = 10


class ConvNet(nn.Module):
    """Images (rows, 8, 8) of values 0..16 to logits (rows, 10)."""

    config: config.DotGeneral | None
    quant_mode: QuantMode = QuantMode.TRAIN

    @nn.compact
    def __call__(self, image: jax.Array) -> dict[str, jax.Array]:
        x = image[..., None] / 16
        for features in FEATURES:
            convolution = AqtConvGeneralDilated(self.config, rhs_quant_mode=self.quant_mode)
            x = nn.Conv(features, (3, 3), strides=2, conv_general_dilated=convolution)(x)
            x = nn.relu(nn.LayerNorm()(x))
        dot_general = AqtDotGeneral(self.config, rhs_quant_mode=self.quant_mode)
        logits = nn.Dense(CLASSES, dot_general=dot_general)(x.reshape(x.shape[0], -1))
        return {"logits": logits, "digit": jnp.argmax(logits, axis=-1).astype(jnp.int32)}


def float_model(quant_mode: QuantMode) -> ConvNet:
    return ConvNet(config=None, quant_mode=quant_mode)


def int8_model(quant_mode: QuantMode) -> ConvNet:
    return ConvNet(config=config.fully_quantized(fwd_bits=8, bwd_bits=8), quant_mode=quant_mode)


def int4_model(quant_mode: QuantMode) -> ConvNet:
    """Weights and activations in 4 bits; gradients in 8."""
    return ConvNet(config=config.fully_quantized(fwd_bits=4, bwd_bits=8), quant_mode=quant_mode)
