"""A factor for each channel."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ChannelScale(nn.Module):
    """Multiplies by a parameter `scale` for each channel, which begins as ones.

    The place where `aqt_engine.ptq.smooth` divides, before a layer that no normalization or other
    layer precedes.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`, its last axis multiplied by `scale`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return x * jnp.asarray(scale, x.dtype)
