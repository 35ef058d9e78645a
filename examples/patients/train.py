"""Trains the prognosis on scikit-learn's 442 diabetes patients."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from sklearn.datasets import load_diabetes

from examples.patients.model import DEVIATION, Prognosis

STEPS = 60
HELD_OUT = 110
THRESHOLD = np.array([150], np.float32)


@functools.cache
def split_patients() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Patients to train on and held-out ones: the inputs, `progression` and its `quartile`."""
    data = load_diabetes(scaled=False)
    order = np.random.default_rng(0).permutation(len(data.target))
    features, target = data.data[order], data.target[order].astype(np.float32)
    measured = features[:, 2:]
    measured = (measured - measured[HELD_OUT:].mean(axis=0)) / measured[HELD_OUT:].std(axis=0)
    quartiles = np.quantile(target[HELD_OUT:], [0.25, 0.5, 0.75])
    patients = {
        "age": features[:, 0].astype(np.int32),
        "sex": features[:, 1] == 2,
        "measured": measured.astype(ml_dtypes.bfloat16),
        "progression": target,
        "quartile": np.searchsorted(quartiles, target).astype(np.int32),
    }
    return (
        {name: array[HELD_OUT:] for name, array in patients.items()},
        {name: array[:HELD_OUT] for name, array in patients.items()},
    )


def inputs_of(patients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the model takes, with the threshold that a request has."""
    return {**{name: patients[name] for name in ("age", "sex", "measured")}, "threshold": THRESHOLD}


def initial(model: Prognosis) -> Mapping[str, Any]:
    """The variables of `model` before any training."""
    shapes = jax.eval_shape(lambda inputs: inputs, inputs_of(split_patients()[0]))
    return model.lazy_init(jax.random.key(0), **shapes)


def train(model: Prognosis) -> Mapping[str, Any]:
    """The variables of `model` after training on all patients at once, again and again."""
    patients = split_patients()[0]
    variables = initial(model)
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=0.1)

    @jax.jit
    def step(variables, state, key):
        def loss_of(variables):
            answer = model.apply(variables, **inputs_of(patients), rngs={"params": key})
            error = (
                answer["progression"].astype(jnp.float32) - patients["progression"]
            ) / DEVIATION
            chance = jnp.take_along_axis(answer["chances"], patients["quartile"][:, None], axis=1)
            return (error**2).mean() - jnp.log(chance).mean()

        gradients = jax.grad(loss_of)(variables)
        updates, state = optimizer.update(gradients, state, variables)
        return optax.apply_updates(variables, updates), state

    state = optimizer.init(variables)
    for i in range(STEPS):
        variables, state = step(variables, state, jax.random.fold_in(jax.random.key(1), i))
    return variables
