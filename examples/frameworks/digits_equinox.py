"""Digits in Equinox: the model is a tree of modules, of which conversion takes the arrays.

    python -m examples.frameworks.digits_equinox out/digits_equinox

trains it in int8 and writes what `aqt convert` takes, as `digits_jax` does:

    aqt convert --model examples.frameworks.digits_equinox:classify ...
"""

import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine import Context, config, einsum
from examples.digits.train import split_digits
from examples.frameworks.training import accuracy, train
from examples.pipeline import save

INT8 = config.fully_quantized()


class Dense(eqx.Module):
    """A layer in int8, forward and backward."""

    weight: jax.Array
    bias: jax.Array

    def __init__(self, inputs: int, outputs: int, key: jax.Array):
        self.weight = jax.random.normal(key, (outputs, inputs)) / np.sqrt(inputs)
        self.bias = jnp.zeros(outputs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        context = Context(key=key)
        return einsum("ni,oi->no", x, self.weight, config=INT8, context=context) + self.bias


class Perceptron(eqx.Module):
    """Images (rows, 8, 8) to logits (rows, 10)."""

    hidden: Dense
    last: Dense

    def __init__(self, seed: int):
        first, second = jax.random.split(jax.random.key(seed))
        self.hidden = Dense(64, 64, first)
        self.last = Dense(64, 10, second)

    def __call__(self, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        h = jax.nn.relu(self.hidden(image.reshape(len(image), -1) / 16, keys[0]))
        return self.last(h, keys[1])


ARRAYS, STATIC = eqx.partition(Perceptron(seed=0), eqx.is_array)
# A checkpoint gives the arrays back in a tree of dicts, which has the names of the fields.
NAMES = {"hidden": ("weight", "bias"), "last": ("weight", "bias")}


def named(arrays: Any) -> dict[str, dict[str, jax.Array]]:
    """The arrays of a `Perceptron` by their names."""
    return {
        layer: {field: getattr(getattr(arrays, layer), field) for field in fields}
        for layer, fields in NAMES.items()
    }


def classify(
    variables: dict[str, dict[str, jax.Array]], image: jax.Array, key: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The logits (rows, 10) of images (rows, 8, 8), with the arrays that `named` gives."""
    values = [variables[layer][field] for layer, fields in NAMES.items() for field in fields]
    arrays = jax.tree.unflatten(jax.tree.structure(ARRAYS), values)
    return {"logits": eqx.combine(arrays, STATIC)(image, key)}


def main() -> None:
    out = Path(sys.argv[1])
    seen, held_out = split_digits()
    variables = train(classify, named(ARRAYS), seen)
    print(f"accuracy on held-out digits: {accuracy(classify, variables, held_out):.4f}")
    save(variables, out / "checkpoint")
    np.savez(out / "example.npz", image=held_out.images[:32])


if __name__ == "__main__":
    main()
