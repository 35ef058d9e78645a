"""An int8 backward pass against a float one: are the loss curves the same?

The same model, seeds and batches with gradients in float, in int8 and in 4 bits, with stochastic
rounding and without. Model: the mixer of `examples.digits` with one block, every contraction of it
quantized.

`fully_quantized` rounds stochastically so that gradients are right in the mean. So beside the
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

EPOCHS = 15
DRAWS = 64
SMOOTHED = 20  # steps


class Classifier(nn.Module):
    """Images (rows, 8, 8) to logits (rows, 10)."""

    config: config.DotGeneral | None

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        return Mixer(self.config, blocks=1)(image)["logits"]


def configurations(*, quick: bool) -> dict[str, config.DotGeneral | None]:
    found = {"float32": None, "int8, backward float": forward_only(8)}
    for bits in (8,) if quick else (8, 4):
        for stochastic in (True,) if quick else (True, False):
            name = f"int8, backward {bits} bits, {'stochastic' if stochastic else 'nearest'}"
            found[name] = config.fully_quantized(8, bits, use_stochastic_rounding=stochastic)
    return found


def gradient_errors(model: Classifier, seed: int, draws: int) -> tuple[float, float]:
    """Relative error of one gradient, and of the mean of `draws`, before the first step."""
    data, _ = split_digits(seed)
    images, labels = data.images[:BATCH], data.labels[:BATCH]
    variables = model.lazy_init(jax.random.key(seed), jax.ShapeDtypeStruct(images.shape, "float32"))

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(of, variables, key, images, labels):
        found = jax.grad(functools.partial(training_loss, of))(variables, key, images, labels)
        return jax.flatten_util.ravel_pytree(found)[0]

    keys = jax.random.split(jax.random.key(seed), draws)
    float_backward = Classifier(forward_only(8))
    exact = gradient(float_backward, variables, keys[0], images, labels)
    drawn = jnp.stack([gradient(model, variables, key, images, labels) for key in keys])

    def error(found: jax.Array) -> float:
        return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))

    return error(drawn[0]), error(drawn.mean(axis=0))


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
        row["last training loss"] = [float(t.losses[-SMOOTHED:].mean()) for t in trained]
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
