"""One bit for weights and activations: how far from float, and at which clipping bound?

After Zhang et al., PokeBNN (arXiv:2112.00133). Binary values are -0.5 and 0.5 times a scale, AQT's
one-bit numerics without a zero. The gradient passes straight through where an activation is
within the bound B, and is 0 beyond: a hyper-parameter that the paper found to be neglected. Each
binary convolution has a residual connection around it and a PReLU behind it, as PokeConv does; the
first and the last layer have 8 bits.

What is smaller here: the paper's blocks have more residual paths, its training has two stages and a
teacher, and its problem is ImageNet. Padding is of zeros, which are no binary value.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np

from aqt_engine import config
from aqt_engine.calibration import AbsMaxCalibration, ConstantCalibration
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral
from aqt_engine.numerics import IntNumerics
from examples.papers import report
from examples.papers.training import forward_only, judge, train

WIDTH = 16
EPOCHS = 15
LEARNING_RATE = 2e-2
EDGE_BITS = 8
BOUNDS = (0.25, 0.5, 1.0, 2.0)


class Net(nn.Module):
    """Images (rows, 8, 8) to logits (rows, 10), with the four convolutions inside by `binary`."""

    inner: config.DotGeneral | None
    edge: config.DotGeneral | None

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = self._conv(self.edge)(image[..., None] / 16)
        for layer in range(4):
            if layer == 2:
                x = nn.avg_pool(x, (2, 2), (2, 2))
            y = self._conv(self.inner)(self._normalized(x))
            x = x + nn.PReLU()(self._normalized(y))
        dense = nn.Dense(10, dot_general=AqtDotGeneral(self.edge))
        return dense(self._normalized(x).mean(axis=(1, 2)))

    def _conv(self, quantized: config.DotGeneral | None) -> nn.Conv:
        convolution = AqtConvGeneralDilated(quantized)
        return nn.Conv(WIDTH, (3, 3), use_bias=False, conv_general_dilated=convolution)

    def _normalized(self, x: jax.Array) -> jax.Array:
        return nn.GroupNorm(num_groups=1)(x)


def binary(bound: float | None) -> config.DotGeneral:
    """One bit on both sides, with the gradient of activations beyond `bound` stopped, or of none.

    One bit clips at half of the scale, so that a scale of twice the bound clips at the bound.
    """
    numerics = IntNumerics(
        bits=1,
        preserve_zero=False,
        preserve_max_val=False,
        clip=True,
        clip_gradient=bound is not None,
        round=True,
    )
    calibration = AbsMaxCalibration() if bound is None else ConstantCalibration(2 * bound)
    activations = config.Tensor(numerics=numerics, calibration=calibration)
    return config.DotGeneral(fwd=config.raw(activations, config.int_tensor(1)))


def main(arguments: Sequence[str] | None = None) -> None:
    options = report.options("binary", __doc__, arguments, seeds=3)
    bounds, epochs = ((1.0,), 1) if options.quick else ((*BOUNDS, None), EPOCHS)
    models: list[tuple[str, float | str, Net]] = [("float32", "", Net(None, None))]
    for bound in bounds:
        model = Net(binary(bound), forward_only(EDGE_BITS))
        models.append(("1 bit", "none" if bound is None else bound, model))
    rows: list[report.Row] = []
    for name, bound, model in models:
        trained = [
            train(model, seed, epochs=epochs, learning_rate=LEARNING_RATE) for seed in options.seeds
        ]
        scores = [judge(model, t.variables, t.held_out) for t in trained]
        row = {
            "convolutions": name,
            "gradient bound": bound,
            "last training loss": [float(t.losses[-20:].mean()) for t in trained],
            "held-out loss": [s.loss for s in scores],
            "accuracy %": [s.accuracy for s in scores],
        }
        rows.append(row)
        report.progress(f"{name} {bound}: {np.mean(row['accuracy %']):.2f} %")
    figure = report.publish(options, "Digits: one bit, by the bound of its gradient", rows)
    axes = figure.subplots()
    swept = [row for row in rows if isinstance(row["gradient bound"], float)]
    axes.errorbar(
        [row["gradient bound"] for row in swept],
        [np.mean(row["accuracy %"]) for row in swept],
        [np.std(row["accuracy %"], ddof=1) for row in swept],
        marker="o",
        capsize=3,
        label="1 bit",
    )
    for row, style in zip((rows[0], rows[-1]), ("-", "--"), strict=True):
        axes.axhline(
            np.mean(row["accuracy %"]),
            color="gray",
            linestyle=style,
            label=f"{row['convolutions']}, bound {row['gradient bound'] or 'n/a'}",
        )
    axes.set_xscale("log", base=2)
    report.label(axes, "gradient bound", "held-out accuracy, %")
    report.save_plot(options, figure)


if __name__ == "__main__":
    main()
