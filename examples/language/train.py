"""Trains the scorer on Python's language reference, which every Python has."""

import functools
import pydoc_data.topics
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from examples.language.model import LONGEST, Scorer

STEPS = 300
BATCH = 16
HELD_OUT = 0.1


@functools.cache
def split_text() -> tuple[np.ndarray, np.ndarray]:
    """The bytes to train on and those held out, uint8: the first topics, and the last."""
    text = "".join(pydoc_data.topics.topics.values()).encode()
    cut = int(len(text) * (1 - HELD_OUT))
    whole = np.frombuffer(text, np.uint8)
    return whole[:cut], whole[cut:]


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The bytes from each start on, uint8 (starts, length)."""
    return text[starts[:, None] + np.arange(length)]


def initial(model: Scorer, seed: int = 0) -> Mapping[str, Any]:
    """The variables of `model` before any training."""
    return model.lazy_init(jax.random.key(seed), jax.ShapeDtypeStruct((2, LONGEST), np.uint8))


def train(model: Scorer, *, steps: int = STEPS, seed: int = 0) -> Mapping[str, Any]:
    """The variables of `model` after so many steps."""
    text = split_text()[0]
    key, variables = jax.random.key(seed + 1), initial(model, seed)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2)
    )

    @jax.jit
    def step(variables, state, key, batch):
        def bits_per_byte(variables):
            # AQT's backward pass rounds stochastically, so training needs a key.
            answer = model.apply(variables, batch, rngs={"params": key})
            return -answer["log_likelihood"].sum() / (answer["bytes"].sum() * np.log(2))

        gradients = jax.grad(bits_per_byte)(variables)
        updates, state = optimizer.update(gradients, state, variables)
        return optax.apply_updates(variables, updates), state

    state = optimizer.init(variables)
    rng = np.random.default_rng(seed)
    for i in range(steps):
        batch = windows(text, rng.integers(0, len(text) - LONGEST, BATCH), LONGEST)
        variables, state = step(variables, state, jax.random.fold_in(key, i), batch)
    return variables
