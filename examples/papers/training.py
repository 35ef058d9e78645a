"""What the experiments train with: splits of scikit-learn's digits, one loop, one judgement."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from aqt_engine import config
from examples.digits.train import BATCH, Digits, split_digits

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Trained:
    """Variables after training, the loss of every step, and the digits that were held out."""

    variables: Variables
    losses: np.ndarray
    held_out: Digits


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracy in percent, and mean cross-entropy in nats."""

    accuracy: float
    loss: float


def forward_only(bits: int | None, activation_bits: int | None = None) -> config.DotGeneral | None:
    """Both sides of the forward contraction quantized, gradients in float; None is float.

    The left side, the activations, has `activation_bits` where they are given.
    """
    if bits is None:
        return None
    left = config.int_tensor(bits if activation_bits is None else activation_bits)
    return config.DotGeneral(fwd=config.raw(left, config.int_tensor(bits)))


def train(model: nn.Module, seed: int, *, epochs: int, learning_rate: float = 3e-3) -> Trained:
    """`model`, images to logits, trained from a seed; its step is compiled once for all seeds.

    The seed decides what is held out, the first parameters, the order of the batches, and the
    noise: equal seeds give two models the same data in the same order.
    """
    data, held_out = split_digits(seed)
    steps = len(data.labels) // BATCH
    optimizer = _optimizer(learning_rate, epochs * steps)
    key, init_key = jax.random.split(jax.random.key(seed))
    # Not compiled as a whole: what formats of one model share is then compiled once for all.
    example = jax.ShapeDtypeStruct((1, *data.images.shape[1:]), data.images.dtype)
    variables = model.lazy_init(init_key, example)
    state = optimizer.init(variables)
    rng = np.random.default_rng(seed)
    losses = []
    for epoch in range(epochs):
        order = rng.permutation(len(data.labels))[: steps * BATCH].reshape(steps, BATCH)
        for i, rows in enumerate(order):
            batch = data.images[rows], data.labels[rows]
            number = np.int32(epoch * steps + i)
            variables, state, loss = _step(model, optimizer, variables, state, key, number, *batch)
            losses.append(loss)
    return Trained(variables, np.asarray(losses), held_out)


def training_loss(
    model: nn.Module, variables: Variables, key: jax.Array, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """Mean cross-entropy of a batch; AQT's backward pass draws its noise with `key`."""
    return _cross_entropy(model.apply(variables, images, rngs={"params": key}), labels)


def judge(model: nn.Module, variables: Variables, data: Digits) -> Score:
    """How well `model` does on `data`."""
    logits, loss = _forward(model, variables, data.images, data.labels)
    right = np.argmax(np.asarray(logits), axis=-1) == data.labels
    return Score(float(right.mean()) * 100, float(loss))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(model, optimizer, variables, state, key, number, images, labels):
    loss_of = functools.partial(training_loss, model)
    step_key = jax.random.fold_in(key, number)
    loss, gradients = jax.value_and_grad(loss_of)(variables, step_key, images, labels)
    updates, state = optimizer.update(gradients, state, variables)
    return optax.apply_updates(variables, updates), state, loss


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, variables, images, labels):
    logits = model.apply(variables, images).astype(jnp.float32)
    return logits, _cross_entropy(logits, labels)


@functools.cache
def _optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    # Cached, so that it is the same object, and the step compiled once, for every seed.
    return optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=1e-2)


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
