"""Draws the pictures of docs/concepts.md: `python docs/make/figures.py DIRECTORY`."""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from aqt_engine import Quantizer, QuantMode, config, flax
from aqt_engine.analysis import Evaluator, observe, sensitivities
from aqt_engine.analysis.plots import plot_histograms, plot_sensitivity
from aqt_engine.rules import Rule, Rules

BITS = 3
STEPS = 200


def rounding(file: Path) -> None:
    """Draws the staircase from values to the buckets of 3 bits, and where some values end."""
    some = np.random.default_rng(1).normal(scale=0.4, size=20).clip(-1, 1)
    values = jnp.concatenate([jnp.linspace(-1.0, 1.0, 2001), jnp.asarray(some, jnp.float32)])
    q, _ = Quantizer(config.int_numerics(BITS)).quant(values, calibration_axes=0)
    scale, dequantized = float(q.scale[0]), np.asarray(q.dequant())

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for edge in (np.arange(-(2 ** (BITS - 1)), 2 ** (BITS - 1)) + 0.5) * scale:
        if abs(edge) <= 1.01:
            axes.axvline(edge, color="0.88", zorder=0)
    line = np.asarray(values[: -len(some)])
    axes.plot(line, line, color="tab:blue", lw=1, label="the value")
    axes.plot(line, dequantized[: -len(some)], color="tab:orange", label="its integer x scale")
    axes.vlines(some, some, dequantized[-len(some) :], color="tab:red", lw=1)
    axes.scatter(some, dequantized[-len(some) :], s=14, color="tab:red", label="errors of some")
    axes.set_yticks(np.unique(dequantized), [f"{i} x scale" for i in np.unique(q.qvalue)])
    axes.set_xlabel("value over the largest magnitude")
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=110)


def report(directory: Path) -> None:
    """Draws what `aqt report --out` draws, for a classifier of digits after some steps in int8."""
    data = load_digits()
    x, labels = np.float32(data.data / 16), data.target
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32), nn.relu, nn.Dense(10)])
    factory = flax.quantize(model, Rules((Rule(modules=".*", config=config.fully_quantized()),)))
    variables = _trained(factory(QuantMode.TRAIN), x, labels)
    inputs = {"inputs": x[:512]}
    contractions = observe(factory, variables, [inputs])
    places = [contraction.place for contraction in contractions]
    alone = sensitivities(Evaluator(factory, variables, inputs), places, (8, 4, 2))
    plot_histograms(contractions, directory / "histograms.png")
    plot_sensitivity(alone, directory / "sensitivity.png")


def _trained(model: nn.Module, x: np.ndarray, labels: np.ndarray):
    optimizer, key = optax.adam(3e-3), jax.random.key(0)

    @jax.jit
    def step(variables, state, key, x, labels):
        def loss(variables):
            logits = model.apply(variables, x, rngs={"params": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(variables), state, variables)
        return optax.apply_updates(variables, updates), state

    variables = model.init(key, x[:1])
    state = optimizer.init(variables)
    rng = np.random.default_rng(0)
    for i in range(STEPS):
        rows = rng.integers(len(x), size=64)
        keys = jax.random.fold_in(key, i)
        variables, state = step(variables, state, keys, x[rows], labels[rows])
    return variables


if __name__ == "__main__":
    (directory,) = map(Path, sys.argv[1:])
    directory.mkdir(parents=True, exist_ok=True)
    rounding(directory / "rounding.png")
    report(directory)
