"""How diabetes will progress: a model of several inputs and outputs, of many dtypes, with branches.

A patient is an int32 age, a bool sex and bfloat16 measurements; a request has one threshold for all
of its patients. The network computes in bfloat16, its contractions in int8.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_engine import QuantMode, config
from aqt_engine.flax import AqtDotGeneral

DECADES = 10
WIDTH = 64
QUARTILES = 4
# Of the progression in the patients that are trained on, which the network sees standardized.
MEAN, DEVIATION = 152.0, 77.0


class Prognosis(nn.Module):
    """Ages, sexes and thresholds (rows,) and measurements (rows, 8) to the progression (rows,).

    Also gives the chances of its quartiles (rows, 4) with the likeliest, and whether it is above
    the threshold.
    """

    config: config.DotGeneral | None
    quant_mode: QuantMode = QuantMode.TRAIN

    @nn.compact
    def __call__(
        self, age: jax.Array, sex: jax.Array, measured: jax.Array, threshold: jax.Array
    ) -> dict[str, jax.Array]:
        decade = jnp.clip(age // 10, 0, DECADES - 1)
        embed = nn.Embed(DECADES, WIDTH, dtype=jnp.bfloat16, name="decades")
        x = nn.gelu(self.dense(WIDTH, "measurements")(measured) + embed(decade))
        branches = [nn.gelu(self.dense(WIDTH, f"branch_{i}")(x)) for i in range(2)]
        x += jnp.where(sex[:, None], *branches)
        standardized = self.dense(1, "progression")(x)[:, 0]
        progression = (MEAN + DEVIATION * standardized).astype(jnp.bfloat16)
        logits = self.dense(QUARTILES, "quartiles")(x).astype(jnp.float32)
        return {
            "progression": progression,
            "above": progression.astype(jnp.float32) > threshold,
            "chances": nn.softmax(logits),
            "quartile": jnp.argmax(logits, axis=-1).astype(jnp.int32),
        }

    def dense(self, features: int, name: str) -> nn.Dense:
        dot_general = AqtDotGeneral(self.config, rhs_quant_mode=self.quant_mode)
        return nn.Dense(features, dtype=jnp.bfloat16, dot_general=dot_general, name=name)


def float_model(quant_mode: QuantMode) -> Prognosis:
    return Prognosis(config=None, quant_mode=quant_mode)


def int8_model(quant_mode: QuantMode) -> Prognosis:
    return Prognosis(config=config.config_v4(), quant_mode=quant_mode)
