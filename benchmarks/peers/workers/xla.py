"""XLA through plain `jax.jit`: float, and int8 products."""

import jax
import jax.numpy as jnp
import numpy as np
from protocol import work


def layer(arrays, *, rows, dtype):
    w = jnp.asarray(arrays["w"], dtype)

    @jax.jit
    def forward(w, x):
        return (x.astype(dtype) @ w).astype(jnp.float32)

    x = arrays["x"][:rows]
    return lambda: np.asarray(forward(w, x))


def product(arrays, *, rows):
    w = jnp.asarray(arrays["qvalue"])

    @jax.jit
    def forward(w, x):
        return jnp.matmul(x, w, preferred_element_type=jnp.int32)

    x = arrays["xq"][:rows]
    return lambda: np.asarray(forward(w, x))


def encoder(arrays, *, dtype):
    """The zoo's own module in float, for any batch: the whole of it under one jit."""
    from aqt_engine import QuantMode
    from examples.sentences.model import float_model
    from examples.sentences.weights import load_variables

    model = float_model(QuantMode.TRAIN)
    variables = jax.tree.map(lambda a: jnp.asarray(a, dtype), load_variables())
    forward = jax.jit(model.apply)
    inputs = (arrays["input_ids"], arrays["attention_mask"])
    return lambda: np.asarray(forward(variables, *inputs)["embedding"].astype(jnp.float32))


if __name__ == "__main__":
    work({"layer": layer, "product": product, "encoder": encoder})
