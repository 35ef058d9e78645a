"""An int8 backward pass against a float one: are the loss curves the same?

The same model, seeds and batches with gradients in float, in int8 and in 4 bits, with stochastic
rounding and without. Model: the mixer of `examples.digits` with one block, every contraction of it
quantized.

`fully_quantized` rounds stochastically so that gradients are less wrong in the mean. So beside the
curves there is the error of one gradient, |g - g_float| / |g_float|, against the one that a float
backward pass gives of the same int8 forward, and the error of a mean of many draws: rounding to the
nearest has an error that no mean removes. It is the gradient before the first step.

What it cannot show: what happens in a long training of a large model, where biases add up.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from aqt_engine import config
from examples.digits.model import Mixer
from examples.digits.train import BATCH, split_digits
from examples.papers import report
from examples.papers.training import forward_only, judge, train, training_loss

EPOCHS = 10
SHOWN_EPOCHS = (1, 2, 4, 7, EPOCHS)
DRAWS = 64
SMOOTHED = 20  # steps


class Classifier(nn.Module):
    """Images (rows, 8, 8) to logits (rows, 10)."""

    config: config.DotGeneral | None

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        return Mixer(self.config, blocks=1)(image)["logits"]


def configurations(*, quick: bool) -> dict[str, config.DotGeneral | None]:
    float_backward: dict[str, config.DotGeneral | None] = {"float32": None}
    if quick:  # Without the noise, a step compiles in half the time.
        choices = ((8, False),)
    else:
        float_backward["int8, backward float"] = forward_only(8)
        choices = ((8, True), (8, False), (4, True), (4, False))
    return float_backward | {
        f"int8, backward {bits} bits, {'stochastic' if stochastic else 'nearest'}": (
            config.fully_quantized(8, bits, use_stochastic_rounding=stochastic)
        )
        for bits, stochastic in choices
    }


def gradient_errors(model: Classifier, seed: int, draws: int) -> tuple[float, float]:
    """Relative error of one gradient, and of the mean of `draws`, before the first step."""
    data, _ = split_digits(seed)
    images, labels = data.images[:BATCH], data.labels[:BATCH]
    variables = model.lazy_init(jax.random.key(seed), jax.ShapeDtypeStruct(images.shape, "float32"))

    keys = jax.random.split(jax.random.key(seed), draws)
    float_backward = Classifier(forward_only(8))
    exact = _gradient(float_backward, variables, keys[0], images, labels)
    drawn = jnp.stack([_gradient(model, variables, key, images, labels) for key in keys])

    def error(found: jax.Array) -> float:
        return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))

    return error(drawn[0]), error(drawn.mean(axis=0))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(model, variables, key, images, labels):
    found = jax.grad(functools.partial(training_loss, model))(variables, key, images, labels)
    return jax.flatten_util.ravel_pytree(found)[0]


def curve_rows(curves: dict[str, list[list[float]]], epochs: int) -> list[report.Row]:
    """The mean loss of some epochs, by seed, of each named list of curves (seeds, steps)."""
    rows: list[report.Row] = []
    for name, losses in curves.items():
        by_epoch = np.array(losses).reshape(len(losses), epochs, -1).mean(axis=2)
        shown = {f"epoch {n}": by_epoch[:, n - 1].tolist() for n in SHOWN_EPOCHS if n <= epochs}
        rows.append({"training": name} | shown)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = report.options("int8_backward", __doc__, arguments, seeds=3)
    epochs, draws = (1, 2) if options.quick else (EPOCHS, DRAWS)
    rows: list[report.Row] = []
    curves: dict[str, list[list[float]]] = {}
    for name, quantized in configurations(quick=options.quick).items():
        model = Classifier(quantized)
        trained = [train(model, seed, epochs=epochs) for seed in options.seeds]
        scores = [judge(model, t.variables, t.held_out) for t in trained]
        curves[name] = [t.losses.tolist() for t in trained]
        row: report.Row = {"training": name}
        float_curves = np.array(next(iter(curves.values())))
        apart = np.array([t.losses for t in trained]) - float_curves
        row["loss - float's"] = apart[:, -SMOOTHED:].mean(axis=1).tolist()
        row["held-out loss"] = [s.loss for s in scores]
        row["accuracy %"] = [s.accuracy for s in scores]
        errors = (0.0, 0.0) if quantized is None else gradient_errors(model, 0, draws)
        row["gradient error"], row[f"of {draws} draws"] = errors if quantized else ("", "")
        rows.append(row)
        report.progress(f"{name}: {np.mean(row['accuracy %']):.2f} %")
    title = "Digits: gradients in float, int8 and 4 bits"
    report.show(options, "Training loss, mean of an epoch", curve_rows(curves, epochs))
    figure = report.publish(options, title, rows, {"losses": curves})
    axes = figure.subplots()
    for name, losses in curves.items():
        window = np.ones(SMOOTHED) / SMOOTHED
        smooth = np.convolve(np.mean(losses, axis=0), window, mode="valid")
        axes.plot(np.arange(len(smooth)) + SMOOTHED, smooth, label=name, alpha=0.8)
    axes.set_yscale("log")
    report.label(axes, "step", f"training loss, mean of {SMOOTHED} steps")
    report.save_plot(options, figure)


if __name__ == "__main__":
    main()
