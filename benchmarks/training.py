"""What AQT's training step costs against the float one, as ratios measured in one run.

    python -m benchmarks.training --markdown

A step is forward, backward and AdamW update, compiled. In each repeat every configuration of a
model takes its turn, in another order each time, and is divided by the float step of the same
repeat: what slows the machine down slows both. The table gives the median of the ratios and their
quartiles. It runs on whatever device JAX finds, and names it. On a CPU the ratios are also given of
processor time, summed over threads, which hardly changes with what else the machine does.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_engine import config
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral
from benchmarks.environment import described, environment

_INT8 = config.int_tensor(8)
CONFIGURATIONS: dict[str, config.DotGeneral | None] = {
    "float": None,
    "int8 forward only": config.DotGeneral(fwd=config.raw(_INT8, _INT8)),
    "config_v4(): int8, drhs float": config.config_v4(),
    "fully_quantized(8, 8), to nearest": config.fully_quantized(
        8, 8, use_stochastic_rounding=False
    ),
    "fully_quantized(8, 8)": config.fully_quantized(8, 8),
    "config_fwd_fp8()": config.config_fwd_fp8(),
}
DTYPES = (jnp.float32, jnp.bfloat16)
STEPS = 2  # timed together


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows of a batch, and channels: what a model's work grows with."""

    rows: int
    channels: int


class _Model(nn.Module):
    """Floats (rows, ...) to 10 logits each."""

    config: config.DotGeneral | None
    dtype: Any
    channels: int

    def dense(self, features: int) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, dot_general=AqtDotGeneral(self.config))


class Mlp(_Model):
    """Three hidden layers; input (rows, channels)."""

    shape = staticmethod(lambda sizes: (sizes.rows, sizes.channels))

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = nn.relu(self.dense(self.channels)(x))
        return self.dense(10)(x)


class ConvNet(_Model):
    """Four 3x3 convolutions; images (rows, 16, 16, 3)."""

    shape = staticmethod(lambda sizes: (sizes.rows, 16, 16, 3))

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features, stride in ((1, 1), (1, 1), (2, 2), (2, 1)):
            convolution = AqtConvGeneralDilated(self.config)
            x = nn.relu(
                nn.Conv(
                    features * self.channels,
                    (3, 3),
                    strides=stride,
                    dtype=self.dtype,
                    conv_general_dilated=convolution,
                )(x)
            )
        return self.dense(10)(x.mean(axis=(1, 2)))


class Transformer(_Model):
    """Two blocks; sequences (rows, 64, channels). Products inside of the attention are in float."""

    shape = staticmethod(lambda sizes: (sizes.rows, 64, sizes.channels))

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            attention = nn.MultiHeadDotProductAttention(
                num_heads=4,
                dtype=self.dtype,
                qkv_dot_general=AqtDotGeneral(self.config),
                out_dot_general=AqtDotGeneral(self.config),
            )
            x = x + attention(nn.LayerNorm(dtype=self.dtype)(x))
            y = nn.gelu(self.dense(4 * self.channels)(nn.LayerNorm(dtype=self.dtype)(x)))
            x = x + self.dense(self.channels)(y)
        return self.dense(10)(x.mean(axis=1))


MODELS = {
    "MLP": (Mlp, Sizes(rows=512, channels=1024)),
    "conv net": (ConvNet, Sizes(rows=32, channels=32)),
    "transformer": (Transformer, Sizes(rows=8, channels=256)),
}
QUICK = Sizes(rows=2, channels=8)


def stepper(model: _Model, shape: tuple[int, ...]) -> Callable[[], None]:
    """A function that trains `model` for `STEPS` steps, compiled and warm."""
    x = jax.random.normal(jax.random.key(0), shape, model.dtype)
    labels = jnp.arange(shape[0]) % 10
    optimizer = optax.adamw(1e-4)

    @jax.jit
    def step(variables, state, number, x, labels):
        def loss_of(variables):
            rngs = {"params": jax.random.fold_in(jax.random.key(1), number)}
            logits = model.apply(variables, x, rngs=rngs).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        gradients = jax.grad(loss_of)(variables)
        updates, state = optimizer.update(gradients, state, variables)
        return optax.apply_updates(variables, updates), state

    variables = jax.jit(model.init)(jax.random.key(0), x)
    carried = variables, jax.jit(optimizer.init)(variables)

    def run() -> None:
        nonlocal carried
        for number in range(STEPS):
            carried = step(*carried, np.int32(number), x, labels)
        jax.block_until_ready(carried)

    run()
    return run


Times = dict[str, list[tuple[float, float]]]
"""By configuration, for each repeat: seconds of one step, and seconds of all processors."""


def measure(steppers: dict[str, Callable[[], None]], repeats: int) -> Times:
    """The times of every configuration, each repeat in random order."""
    order = np.random.default_rng(0)
    times: Times = {name: [] for name in steppers}
    for _ in range(repeats):
        for name in order.permutation(list(steppers)):
            before = time.perf_counter(), time.process_time()
            steppers[name]()
            after = time.perf_counter(), time.process_time()
            elapsed, processor = (np.subtract(after, before) / STEPS).tolist()
            times[name].append((elapsed, processor))
    return times


def rows_of(name: str, dtype: Any, times: Times) -> list[dict[str, Any]]:
    """What is reported of one model in one dtype."""
    reference = np.array(times["float"])
    found = []
    for configuration, own in times.items():
        low, middle, high = np.percentile(np.array(own) / reference, (25, 50, 75), axis=0)
        row = {"model": name, "dtype": np.dtype(dtype).name, "configuration": configuration}
        row |= {"ms": float(np.median(own, axis=0)[0]) * 1e3, "ratio": float(middle[0])}
        row |= {"quartiles": [float(low[0]), float(high[0])]}
        if jax.default_backend() == "cpu":
            row |= {"processor_ratio": float(middle[1])}
            row |= {"processor_quartiles": [float(low[1]), float(high[1])]}
        found.append(row | {"seconds": own})
    return found


def show(rows: Sequence[dict[str, Any]], *, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for column in ("model", "dtype", "configuration"):
        table.add_column(column, no_wrap=True)
    measured = [kind for kind in ("", "processor_") if f"{kind}ratio" in rows[0]]
    for kind in measured:
        table.add_column(f"x float{', processor' if kind else ''}", justify="right", no_wrap=True)
        table.add_column("quartiles", justify="right", no_wrap=True)
    table.add_column("ms a step", justify="right", no_wrap=True)
    for row in rows:
        figures: list[str] = []
        for kind in measured:
            quartiles = "{:.2f} to {:.2f}".format(*row[f"{kind}quartiles"])
            figures += [f"{row[f'{kind}ratio']:.2f}", quartiles]
        names = (row["model"], row["dtype"], row["configuration"])
        table.add_row(*names, *figures, f"{row['ms']:.1f}")
    Console(width=max(140, Console().width)).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time measured")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--repeats", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    names = [np.dtype(dtype).name for dtype in DTYPES]
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names)
    parser.add_argument("--quick", action="store_true", help="tiny: only shows that it runs")
    options = parser.parse_args(arguments)
    before = environment()
    rows = []
    for name in options.models:
        model, sizes = MODELS[name]
        sizes = QUICK if options.quick else sizes
        for dtype in map(jnp.dtype, options.dtypes[:1] if options.quick else options.dtypes):
            steppers = {}
            for configuration, quantized in CONFIGURATIONS.items():
                instance = model(quantized, dtype, sizes.channels)
                steppers[configuration] = stepper(instance, model.shape(sizes))
            print(f"{name}, {np.dtype(dtype).name}: compiled", file=sys.stderr, flush=True)
            times = measure(steppers, 2 if options.quick else options.repeats)
            rows += rows_of(name, dtype, times)
    show(rows, markdown=options.markdown)
    Console().print(
        f"{options.repeats} repeats of {STEPS} steps; {described(before)}", soft_wrap=True
    )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": before, "steps": STEPS, "quick": options.quick, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
