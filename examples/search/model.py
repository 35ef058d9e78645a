"""A search for the most similar vectors: no neural network, and no class, but a function.

Its weight is the database itself, which conversion stores in int8, with a scale for each vector.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from aqt_engine import config, einsum

NEAREST = 5
INT8 = config.fully_quantized(fwd_bits=8, bwd_bits=None)
FLOAT = config.DotGeneral()


def search(variables: Mapping[str, jax.Array], query: jax.Array) -> dict[str, jax.Array]:
    """The cosines (rows, 5) and places (rows, 5) of the nearest to each query (rows, size)."""
    return _search(variables, query, INT8)


def float_search(variables: Mapping[str, jax.Array], query: jax.Array) -> dict[str, jax.Array]:
    return _search(variables, query, FLOAT)


def _search(
    variables: Mapping[str, jax.Array], query: jax.Array, quantization: config.DotGeneral
) -> dict[str, jax.Array]:
    length = jnp.sqrt((query * query).sum(axis=1, keepdims=True))
    unit = query / jnp.maximum(length, 1e-6)
    cosines = einsum("rd,nd->rn", unit, variables["database"], config=quantization)
    nearest, places = lax.top_k(cosines, NEAREST)
    return {"cosines": nearest, "places": places.astype(jnp.int32)}
