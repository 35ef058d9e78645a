"""Digits in plain JAX: parameters are a dict of arrays, and the model is a function.

    python -m examples.frameworks.digits_jax out/digits_jax

trains it in int8, forward and backward, with Optax, and writes what `aqt convert` takes:

    aqt convert --model examples.frameworks.digits_jax:classify \\
        --checkpoint out/digits_jax/checkpoint --example out/digits_jax/example.npz \\
        --output out/digits_jax/repository/digits/1
"""

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from aqt_engine import Context, config, einsum
from examples.digits.train import split_digits
from examples.frameworks.training import accuracy, train
from examples.pipeline import save

INT8 = config.fully_quantized()
SIZES = (64, 64, 10)


def initial(seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(SIZES) - 1)
    shapes = itertools.pairwise(SIZES)
    return {
        f"w{i}": jax.random.normal(key, shape) / np.sqrt(shape[0])
        for i, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    }


def classify(
    variables: Mapping[str, jax.Array], image: jax.Array, key: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The logits (rows, 10) of images (rows, 8, 8). The key is for the rounding of gradients."""
    h = image.reshape(len(image), -1) / 16
    for i in range(len(SIZES) - 1):
        context = Context(key=None if key is None else jax.random.fold_in(key, i))
        h = einsum(
            "ni,io->no",
            jax.nn.relu(h) if i else h,
            variables[f"w{i}"],
            config=INT8,
            context=context,
        )
    return {"logits": h}


def main() -> None:
    out = Path(sys.argv[1])
    seen, held_out = split_digits()
    variables = train(classify, initial(0), seen)
    print(f"accuracy on held-out digits: {accuracy(classify, variables, held_out):.4f}")
    save(variables, out / "checkpoint")
    np.savez(out / "example.npz", image=held_out.images[:32])


if __name__ == "__main__":
    main()
