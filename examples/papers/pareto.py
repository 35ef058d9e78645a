"""Accuracy against size and compute: is a 4-bit ResNet worth more than a smaller float one?

After Abdolrashidi et al., Pareto-Optimal Quantized ResNet Is Mostly 4-bit (arXiv:2105.03536), with
a ResNet of two blocks at several widths on 8x8 digits. Convolutions are quantized forward by
`AqtConvGeneralDilated`, weights and activations alike, the first layer and the last at 8 bits;
gradients are in float. The size is that of all parameters: kernels at their bits, and their scales,
biases and normalization in float32. The cost is ACE, the sum of multiply-accumulates times the bits
of both factors (arXiv:2112.00133). bfloat16 is the float32 model, cast after training.

What it cannot show: ImageNet at 77 % top-1. It compares formats on a problem that a model of a few
thousand weights solves, with differences of the size of their standard deviations at the top.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral
from examples.papers import report
from examples.papers.training import forward_only, judge, train

WIDTHS = (2, 4, 8, 16)
EPOCHS = 15
LEARNING_RATE = 2e-2
EDGE_BITS = 8
FLOAT_BITS = {jnp.float32: 32, jnp.bfloat16: 16}


class ResNet(nn.Module):
    """Images (rows, 8, 8) to logits (rows, 10); `bits` None is float, computed in `dtype`."""

    width: int
    bits: int | None
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        edge = None if self.bits is None else EDGE_BITS
        x = self._conv(self.width, bits=edge)(image[..., None] / 16)
        for features, stride in ((self.width, 1), (2 * self.width, 2)):
            y = self._activated(x)
            shortcut = x if stride == 1 else self._conv(features, stride, size=1)(y)
            y = self._activated(self._conv(features, stride)(y))
            x = shortcut + self._conv(features)(y)
        dot_general = AqtDotGeneral(forward_only(edge))
        dense = nn.Dense(10, dtype=self.dtype, dot_general=dot_general)
        return dense(self._activated(x).mean(axis=(1, 2)))

    def _conv(self, features: int, stride: int = 1, *, size: int = 3, bits: int | None = None):
        convolution = AqtConvGeneralDilated(forward_only(bits or self.bits))
        return nn.Conv(
            features,
            (size, size),
            strides=stride,
            use_bias=False,
            dtype=self.dtype,
            conv_general_dilated=convolution,
        )

    def _activated(self, x: jax.Array) -> jax.Array:
        return nn.relu(nn.GroupNorm(num_groups=1, dtype=self.dtype)(x))


def cost(model: ResNet) -> tuple[int, int]:
    """Bytes of all parameters, and ACE of one image."""
    ace, kernel_bits, kernel_values, scales = 0, 0, 0, 0

    def count(call, args, kwargs, context):
        nonlocal ace, kernel_bits, kernel_values, scales
        out = call(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, nn.Conv | nn.Dense):
            op = layer.conv_general_dilated if isinstance(layer, nn.Conv) else layer.dot_general
            bits = FLOAT_BITS[model.dtype]
            kernel = layer.get_variable("params", "kernel")
            if op.config is not None:
                bits = op.config.fwd.rhs.numerics.bits
                scales += kernel.shape[-1]
            ace += out.size * math.prod(kernel.shape[:-1]) * bits * bits
            kernel_bits += kernel.size * bits
            kernel_values += kernel.size
        return out

    with nn.intercept_methods(count):
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8)))
    values = sum(leaf.size for leaf in jax.tree.leaves(variables))
    other = FLOAT_BITS[model.dtype] // 8
    return kernel_bits // 8 + 4 * scales + other * (values - kernel_values), ace


def front(costs: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Which points no other beats: none is as cheap and better, or cheaper and as good."""
    points = list(zip(costs, accuracies, strict=True))
    return [
        not any((c <= cost and a > accuracy) or (c < cost and a >= accuracy) for c, a in points)
        for cost, accuracy in points
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = report.options("pareto", __doc__, arguments, seeds=3)
    widths, formats, epochs = (
        ((2,), (None, 4), 1) if options.quick else (WIDTHS, (None, 8, 4, 2), EPOCHS)
    )
    rows: list[report.Row] = []
    for width in widths:
        for bits in formats:
            model = ResNet(width, bits)
            judged = {"float32" if bits is None else f"{bits} bits": model}
            if bits is None:
                judged["bfloat16"] = ResNet(width, None, jnp.bfloat16)
            accuracies: dict[str, list[float]] = {name: [] for name in judged}
            for seed in options.seeds:
                trained = train(model, seed, epochs=epochs, learning_rate=LEARNING_RATE)
                for name, m in judged.items():
                    score = judge(m, trained.variables, trained.held_out)
                    accuracies[name].append(score.accuracy)
            for name, m in judged.items():
                size, ace = cost(m)
                row = {"weights": name, "width": width, "bytes": size, "ACE": ace}
                rows.append(row | {"accuracy %": accuracies[name]})
            report.progress(
                f"width {width}, {next(iter(judged))}: {np.mean(accuracies[name]):.2f} %"
            )
    means = [float(np.mean(row["accuracy %"])) for row in rows]
    for measure in ("bytes", "ACE"):
        on_front = front([row[measure] for row in rows], means)
        for row, best in zip(rows, on_front, strict=True):
            row[f"on front of {measure}"] = best
    rows.sort(key=lambda row: (row["weights"], row["width"]))
    figure = report.publish(options, "Digits: accuracy against size and compute", rows)
    for axes, measure in zip(figure.subplots(1, 2), ("bytes", "ACE"), strict=True):
        for name in dict.fromkeys(row["weights"] for row in rows):
            own = [row for row in rows if row["weights"] == name]
            accuracy = [np.mean(row["accuracy %"]) for row in own]
            spread = [np.std(row["accuracy %"], ddof=1) for row in own]
            costs = [row[measure] for row in own]
            axes.errorbar(costs, accuracy, spread, marker="o", capsize=3, label=name)
        axes.set_xscale("log")
        report.label(axes, measure, "held-out accuracy, %")
    report.save_plot(options, figure)


if __name__ == "__main__":
    main()
