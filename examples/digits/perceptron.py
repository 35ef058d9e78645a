"""A classifier of handwritten digits in Flax nnx: a float model, and rules that quantize it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from aqt_engine import config
from aqt_engine.flax import nnx as aqt_nnx
from aqt_engine.rules import Rule, Rules
from examples.digits.train import BATCH, Digits

WIDTH = 128
RULES = Rules((Rule(modules=".*", config=config.fully_quantized(fwd_bits=8, bwd_bits=8)),))


class Perceptron(nnx.Module):
    """Images (rows, 8, 8) of values 0..16 to logits (rows, 10)."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, image: jax.Array) -> dict[str, jax.Array]:
        x = nnx.relu(self.first(image.reshape(image.shape[0], 64) / 16))
        logits = self.last(nnx.relu(self.second(x)))
        return {"logits": logits, "digit": jnp.argmax(logits, axis=-1).astype(jnp.int32)}


def float_model() -> Perceptron:
    return Perceptron(nnx.Rngs(0))


def int8_model() -> nnx.Module:
    """What `aqt convert --model examples.digits.perceptron:int8_model` takes."""
    return aqt_nnx.quantize(float_model(), RULES, rngs=nnx.Rngs(1))


def train(model: nnx.Module, data: Digits, *, epochs: int) -> Mapping[str, Any]:
    """Trains `model` in place; gives its variables."""
    steps = len(data.labels) // BATCH
    schedule = optax.cosine_decay_schedule(3e-3, max(1, epochs * steps))
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss_of(model):
            logits = model(images)["logits"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        optimizer.update(model, nnx.grad(loss_of)(model))

    rng = np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(len(data.labels))[: steps * BATCH].reshape(steps, BATCH)
        for rows in order:
            step(model, optimizer, data.images[rows], data.labels[rows])
    return aqt_nnx.split(model)[1]
