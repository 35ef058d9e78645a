"""Trained in 4 bits, or quantized to 4 bits after training: how much of the gap is won back?

After Ding et al., 4-bit Conformer with Native Quantization Aware Training (arXiv:2203.15952), with
a model of the same parts (feed-forward, attention, depthwise convolution) that reads a digit as a
sequence of eight rows. Native: the forward pass of training contracts the integers that serving
would, nothing is emulated in float. Every layer with weights is quantized; the two products inside
of the attention are in float. Quantized after training (PTQ) means the float model's weights, each
output channel scaled by its largest magnitude, or by the bound with the least squared error;
activations are calibrated on every call, as in training. The gap recovered is

    (QAT - PTQ) / (float - PTQ)    of the means, with the better of the two PTQs

What is smaller here: no speech, two blocks of 16 channels, and a gap of a few digits in 450.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np

from aqt_engine import config
from aqt_engine.calibration import MseCalibration
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral
from examples.papers import report
from examples.papers.training import Score, forward_only, judge, train

WIDTH = 16
BLOCKS = 2
EPOCHS = 20
LEARNING_RATE = 1e-2


class Conformer(nn.Module):
    """Images (rows, 8, 8) to logits (rows, 10)."""

    config: config.DotGeneral | None
    blocks: int = BLOCKS

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = self._dense(WIDTH)(image / 16)
        x = x + self.param("position", nn.initializers.normal(0.1), x.shape[1:])
        for _ in range(self.blocks):
            y = nn.silu(self._dense(2 * WIDTH)(nn.LayerNorm()(x)))
            x = x + self._dense(WIDTH)(y)
            attention = nn.MultiHeadDotProductAttention(
                num_heads=2,
                qkv_dot_general=AqtDotGeneral(self.config),
                out_dot_general=AqtDotGeneral(self.config),
            )
            x = x + attention(nn.LayerNorm()(x))
            y = nn.glu(self._dense(2 * WIDTH)(nn.LayerNorm()(x)))
            y = nn.silu(nn.LayerNorm()(self._depthwise()(y)))
            x = x + self._dense(WIDTH)(y)
        return self._dense(10)(nn.LayerNorm()(x).mean(axis=1))

    def _dense(self, features: int) -> nn.Dense:
        return nn.Dense(features, dot_general=AqtDotGeneral(self.config))

    def _depthwise(self) -> nn.Conv:
        convolution = AqtConvGeneralDilated(self.config)
        return nn.Conv(WIDTH, (3,), feature_group_count=WIDTH, conv_general_dilated=convolution)


def main(arguments: Sequence[str] | None = None) -> None:
    options = report.options("native_4bit", __doc__, arguments, seeds=3)
    how = {"epochs": 1 if options.quick else EPOCHS, "learning_rate": LEARNING_RATE}
    blocks = 1 if options.quick else BLOCKS
    formats = ((4, 4),) if options.quick else ((4, 8), (4, 4), (3, 8))
    exact = Conformer(None, blocks)
    floats = [train(exact, seed, **how) for seed in options.seeds]
    reference = [judge(exact, t.variables, t.held_out) for t in floats]
    rows = [_row("float32", "", reference)]
    report.progress(f"float32: {np.mean(rows[0]['accuracy %']):.2f} %")
    for weights, activations in formats:
        qat = Conformer(forward_only(weights, activations), blocks)
        least_error = config.update(qat.config, "fwd.rhs", calibration=MseCalibration())
        after = {
            "PTQ, largest magnitude": qat,
            "PTQ, least error": dataclasses.replace(qat, config=least_error),
        }
        bits = f"{weights} and {activations}"
        ptq = {n: [judge(m, t.variables, t.held_out) for t in floats] for n, m in after.items()}
        trained = [train(qat, seed, **how) for seed in options.seeds]
        native = [judge(qat, t.variables, t.held_out) for t in trained]
        rows += [_row(bits, name, scores) for name, scores in ptq.items()]
        rows.append(_row(bits, "QAT, native", native, recovered(reference, ptq.values(), native)))
        report.progress(f"{bits}: {np.mean(rows[-1]['accuracy %']):.2f} %")
    title = "Digits by rows: quantized after training and in training"
    figure = report.publish(options, title, rows)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        mean, spread = np.mean(row["accuracy %"]), np.std(row["accuracy %"], ddof=1)
        name = f"{row['bits of weights and activations']} {row['how']}"
        axes.errorbar(i, mean, spread, marker="o", capsize=3, label=name)
    axes.set_xticks([])
    report.label(axes, "", "held-out accuracy, %")
    report.save_plot(options, figure)


def recovered(reference, ptqs, native) -> str:
    """The share of the gap to float, in accuracy, that native training wins back."""
    exact, found = _accuracy(reference), _accuracy(native)
    best = max(map(_accuracy, ptqs))
    return f"{(found - best) / (exact - best):.0%}" if exact > best else "no gap"


def _accuracy(scores: Sequence[Score]) -> float:
    return float(np.mean([s.accuracy for s in scores]))


def _row(bits: str, how: str, scores: Sequence[Score], gap: str = "") -> report.Row:
    return {
        "bits of weights and activations": bits,
        "how": how,
        "held-out loss": [s.loss for s in scores],
        "accuracy %": [s.accuracy for s in scores],
        "gap recovered": gap,
    }


if __name__ == "__main__":
    main()
