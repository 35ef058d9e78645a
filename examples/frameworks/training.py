"""A training loop that takes any function of variables, whatever the framework they are from.

    python -m examples.frameworks.training out/resumed --steps 60

trains the digits of `digits_jax` and keeps a checkpoint every ten steps by Orbax. Killed at any
moment and started again with the same words, it goes on from the last one, and ends with the same
bits as if it had never stopped: everything that a step takes is in the checkpoint, or made of the
seed and the number of the step, the noise by which AQT rounds gradients too.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from examples.digits.train import BATCH, Digits, split_digits

Forward = Callable[[Any, jax.Array, jax.Array], Mapping[str, jax.Array]]

OPTIMIZER = optax.adam(3e-3)
STEPS = 300
KEPT_EVERY = 10


def stepping(forward: Forward, data: Digits) -> Callable[[Any, Any, int], tuple[Any, Any]]:
    """A function from variables, optimizer state and the number of a step to what is after it."""

    @jax.jit
    def step(
        variables: Any, state: Any, key: jax.Array, images: jax.Array, labels: jax.Array
    ) -> tuple[Any, Any]:
        def loss(variables: Any) -> jax.Array:
            logits = forward(variables, images, key)["logits"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = OPTIMIZER.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    def numbered(variables: Any, state: Any, number: int) -> tuple[Any, Any]:
        batch = np.random.default_rng(number).integers(0, len(data.labels), BATCH)
        key = jax.random.fold_in(jax.random.key(1), number)
        return step(variables, state, key, data.images[batch], data.labels[batch])

    return numbered


def train(forward: Forward, variables: Any, data: Digits, *, steps: int = STEPS) -> Any:
    """`variables` after so many steps."""
    step, state = stepping(forward, data), OPTIMIZER.init(variables)
    for number in range(steps):
        variables, state = step(variables, state, number)
    return variables


def train_resumed(
    forward: Forward, variables: Any, data: Digits, checkpoints: Path, *, steps: int
) -> Any:
    """The same, from the last of the `checkpoints`, which it goes on to keep."""
    step = stepping(forward, data)
    reached = {"variables": variables, "state": OPTIMIZER.init(variables)}
    with ocp.CheckpointManager(checkpoints.absolute()) as manager:
        last = manager.latest_step()
        if last is not None:
            print(f"going on after step {last}", flush=True)
            reached = manager.restore(last, args=ocp.args.StandardRestore(reached))
        for number in range(last or 0, steps):
            variables, state = step(reached["variables"], reached["state"], number)
            reached = {"variables": variables, "state": state}
            if (number + 1) % KEPT_EVERY == 0:
                manager.save(number + 1, args=ocp.args.StandardSave(reached))
                print(f"step {number + 1}", flush=True)
    return reached["variables"]


def accuracy(
    forward: Callable[..., Mapping[str, jax.Array]], variables: Any, data: Digits
) -> float:
    """The part of `data` that is classified rightly."""
    found = jax.jit(forward)(variables, data.images)["logits"].argmax(axis=1)
    return float(np.mean(np.asarray(found) == data.labels))


def main() -> None:
    from examples.frameworks.digits_jax import classify, initial

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    seen, held_out = split_digits()
    variables = train_resumed(
        classify, initial(0), seen, options.out / "checkpoints", steps=options.steps
    )
    np.savez(options.out / "variables.npz", **variables)
    print(f"accuracy on held-out digits: {accuracy(classify, variables, held_out):.4f}")


if __name__ == "__main__":
    main()
