"""A model of sequences of any length, with a scalar per request: attention, masked by its ids."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine import QuantMode, config
from aqt_engine.convert import Signature, convert
from aqt_engine.flax import AqtDotGeneral

VOCABULARY = 11
WIDTH = 8
PAD = -1
TILE = 4
LENGTHS = (3, 6)
SIGNATURE = Signature(
    shapes={"ids": ("batch", "length")},
    lengths={"length": LENGTHS},
    pads={"ids": PAD},
    per_request=("temperature",),
)
INT8 = config.fully_quantized(fwd_bits=8)


class Tagger(nn.Module):
    """For each position logits, and for each row a flag, the mean in bfloat16 and a best class."""

    mode: QuantMode

    @nn.compact
    def __call__(self, ids, bias, temperature):
        int8 = AqtDotGeneral(INT8, rhs_quant_mode=self.mode)
        there = ids != PAD
        h = nn.Embed(VOCABULARY, WIDTH)(jnp.maximum(ids, 0)) + bias[:, None, None]
        q, k, v = jnp.split(nn.Dense(3 * WIDTH, dot_general=int8)(nn.LayerNorm()(h)), 3, axis=-1)
        scores = jnp.einsum("nqd,nkd->nqk", q, k) / temperature[:, None, None]
        scores = jnp.where(there[:, None, :], scores, -1e9)
        h = h + jax.nn.softmax(scores) @ v
        logits = nn.Dense(4, dot_general=int8)(h) * there[..., None]
        return {
            "logits": logits,
            "any": there.any(axis=1),
            "mean": logits.mean(axis=1).astype(jnp.bfloat16),
            "best": jnp.argmax(logits.sum(axis=1), axis=-1).astype(jnp.int32),
        }


def inputs_of(rows, length, seed=0, temperature=1.5):
    """As a model is called: the temperature once for each row."""
    rng = np.random.default_rng(seed)
    return {
        "ids": rng.integers(0, VOCABULARY, (rows, length), np.int32),
        "bias": rng.normal(size=rows).astype(np.float32),
        "temperature": np.full(rows, temperature, np.float32),
    }


def variables():
    return jax.jit(Tagger(QuantMode.TRAIN).init)(jax.random.key(0), **inputs_of(TILE, LENGTHS[0]))


def write(path):
    """The tagger, untrained, as a bundle at `path`."""
    return convert(Tagger, variables(), inputs_of(10, 5), path, signature=SIGNATURE, tile=TILE)


class Training:
    """R: the training forward at the tile and at a request's own length bucket."""

    def __init__(self):
        self._variables = variables()
        self._forward = jax.jit(Tagger(QuantMode.TRAIN).apply)

    def __call__(self, inputs):
        rows, length = inputs["ids"].shape
        bucket = next(size for size in LENGTHS if size >= length)
        ids = np.full((-(-rows // TILE) * TILE, bucket), PAD, np.int32)
        ids[:rows, :length] = inputs["ids"]
        others = {k: np.resize(v, len(ids)) for k, v in inputs.items() if k != "ids"}
        tiles = [
            self._forward(
                self._variables,
                ids=ids[i : i + TILE],
                **{k: v[i : i + TILE] for k, v in others.items()},
            )
            for i in range(0, len(ids), TILE)
        ]
        whole = {k: np.concatenate([np.asarray(t[k]) for t in tiles])[:rows] for k in tiles[0]}
        return {**whole, "logits": whole["logits"][:, :length]}
