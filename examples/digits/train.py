"""Trains the digits classifier, in float and with AQT int8, on scikit-learn's 1,797 digits."""

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

EPOCHS = 30
BATCH = 64
HELD_OUT = 450


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images (rows, 8, 8) float32 of values 0..16, and their labels (rows,) int32."""

    images: np.ndarray
    labels: np.ndarray


def split_digits(seed: int = 0) -> tuple[Digits, Digits]:
    """The digits to train on and those held out, split at random by the seed."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.images))
    images = data.images.astype(np.float32)[order]
    labels = data.target.astype(np.int32)[order]
    return (
        Digits(images[HELD_OUT:], labels[HELD_OUT:]),
        Digits(images[:HELD_OUT], labels[:HELD_OUT]),
    )


def train(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    on_epoch: Callable[[float], None],
) -> Mapping[str, jax.Array]:
    """The variables of `model` after training; `on_epoch` is told each epoch's mean loss."""
    steps = len(data.labels) // BATCH
    key, init_key = jax.random.split(jax.random.key(seed))
    variables = model.lazy_init(init_key, jax.ShapeDtypeStruct((1, 8, 8), np.float32))
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, epochs * steps), weight_decay=1e-2)

    @jax.jit
    def step(variables, state, key, images, labels):
        def loss_of(variables):
            # AQT's backward pass rounds stochastically, so training needs a key.
            logits = model.apply(variables, images, rngs={"params": key})["logits"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradients = jax.value_and_grad(loss_of)(variables)
        updates, state = optimizer.update(gradients, state, variables)
        return optax.apply_updates(variables, updates), state, loss

    state = optimizer.init(variables)
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        order = rng.permutation(len(data.labels))[: steps * BATCH].reshape(steps, BATCH)
        losses = []
        for i, rows in enumerate(order):
            step_key = jax.random.fold_in(key, epoch * steps + i)
            variables, state, loss = step(
                variables, state, step_key, data.images[rows], data.labels[rows]
            )
            losses.append(loss)
        on_epoch(float(np.mean(losses)))
    return variables


def accuracy(model: nn.Module, variables: Mapping[str, jax.Array], data: Digits) -> float:
    """The share of `data` that is classified rightly."""
    digit = jax.jit(model.apply)(variables, data.images)["digit"]
    return float((np.asarray(digit) == data.labels).mean())
