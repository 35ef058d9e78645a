"""What int8 is worth on a GPU: contractions, encoders, a transformer block, exactness, training.

    python -m benchmarks.gpu --markdown --json out/bench/gpu.json

One command for all tables of one card; it runs on whatever device JAX finds, and names it.
Contractions and layers are timed on the device: one call of an executable goes through many weights
one after the other, more of them than the card's caches hold, so that neither launching nor caching
flatters. Models are timed from arrays of the host to arrays of the host, as a server calls them.
Every table is of ratios whose two sides took turns in one run.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_engine import QTensor, QuantMode, bundle, config, witness
from aqt_engine.convert import convert
from aqt_engine.execution import Mode, Program
from aqt_engine.flax import AqtDotGeneral
from benchmarks import training
from benchmarks.environment import described, environment
from examples.sentences import model as sentences


@dataclasses.dataclass(frozen=True)
class Card:
    """What its maker promises: dense operations and bytes, in units of 1e12 per second."""

    int8: float
    fp8: float
    bf16: float
    memory: float


# NVIDIA's data sheets, without sparsity.
CARDS = {
    "H100 80GB HBM3": Card(int8=1979, fp8=1979, bf16=989, memory=3.35),
    "H100 PCIe": Card(int8=1513, fp8=1513, bf16=756, memory=2.0),
    "H200": Card(int8=1979, fp8=1979, bf16=989, memory=4.8),
    "A100-SXM4-80GB": Card(int8=624, fp8=math.nan, bf16=312, memory=2.039),
    "A100-SXM4-40GB": Card(int8=624, fp8=math.nan, bf16=312, memory=1.555),
    "L4": Card(int8=242, fp8=242, bf16=121, memory=0.3),
}
UNKNOWN = Card(int8=math.nan, fp8=math.nan, bf16=math.nan, memory=math.nan)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: tuple[int, ...] = (1, 8, 32, 128, 512, 2048, 8192)
    widths: tuple[tuple[int, int], ...] = ((1024, 1024), (2048, 8192), (8192, 2048), (4096, 4096))
    weight_nbytes: int = 256 << 20  # in bfloat16: beyond the caches of every card above
    repeats: int = 15
    encoder: tuple[tuple[int, int], ...] = ((1, 128), (32, 128), (256, 128))
    block_width: int = 2048
    block: tuple[tuple[int, int], ...] = ((1, 128), (8, 128), (8, 1024))
    training_rows: int = 32
    training_channels: int = 1024


QUICK = Sizes(
    rows=(1, 16),
    widths=((32, 64),),
    weight_nbytes=1 << 14,
    repeats=2,
    encoder=(),
    block_width=128,
    block=((2, 8),),
    training_rows=2,
    training_channels=8,
)

AXES = (((1,), (0,)), ((), ()))
INT8 = config.fully_quantized(fwd_bits=8, bwd_bits=None)


def card() -> Card:
    """That of the first device, if it is a known one."""
    kind = jax.devices()[0].device_kind
    return next((card for name, card in CARDS.items() if kind.endswith(name)), UNKNOWN)


def contract(x: jax.Array, w: jax.Array, out: Any) -> jax.Array:
    """(rows, k) x (k, n), summed in `out`."""
    return lax.dot_general(x, w, AXES, preferred_element_type=out)


# By name: the dtype of both operands, and that of the sums.
CONTRACTIONS = {
    "bf16": (jnp.bfloat16, jnp.float32),
    "int8": (jnp.int8, jnp.int32),
    "fp8": (jnp.float8_e4m3fn, jnp.float32),
}


def layer(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """A served int8 layer: x (rows, k) in bfloat16 is quantized, contracted and scaled back."""
    return INT8(x, QTensor(w, scale, x.dtype), AXES)


def through(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`f` of x and each of a stack of weights, one after the other."""

    def run(x: jax.Array, *stacks: jax.Array) -> jax.Array:
        return lax.scan(lambda _, each: ((), f(x, *each)), (), stacks)[1]

    return run


def contraction_runs(rows: int, k: int, n: int, count: int) -> dict[str, Callable[[], object]]:
    """What contracts `count` weights each: the bare contractions, and the layer in int8."""
    key = jax.random.key(0)
    runs = {}
    for name, (dtype, out) in CONTRACTIONS.items():
        x = jax.random.uniform(key, (rows, k), minval=-100, maxval=100).astype(dtype)
        w = jax.random.uniform(key, (count, k, n), minval=-100, maxval=100).astype(dtype)
        runs[name] = warm(through(functools.partial(contract, out=out)), x, w)
    x = jax.random.normal(key, (rows, k), jnp.bfloat16)
    w = jax.random.randint(key, (count, k, n), -127, 128, jnp.int8)
    scale = jnp.full((count, 1, n), 0.01, jnp.bfloat16)
    runs["int8 layer"] = warm(through(layer), x, w, scale)
    return runs


def warm(f: Callable[..., jax.Array], *arguments: jax.Array) -> Callable[[], object]:
    """A call of `f`, compiled, that waits for the device."""
    compiled = jax.jit(f).lower(*arguments).compile()

    def call() -> object:
        return jax.block_until_ready(compiled(*arguments))

    call()
    return call


def turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each call of each, in another order each time."""
    order = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in order.permutation(list(runs)):
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(of) for name, of in times.items()}


def ratios(times: dict[str, np.ndarray], reference: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """By name: median milliseconds, and how many times as fast as `reference`, with quartiles."""
    for name, own in times.items():
        low, middle, high = np.percentile(times[reference] / own, (25, 50, 75)).tolist()
        found = {"ms": float(np.median(own)) * 1e3, "times_as_fast": middle}
        yield name, found | {"quartiles": [low, high], "seconds": own.tolist()}


def of_contractions(sizes: Sizes) -> list[dict[str, Any]]:
    """Speed and shares of the card, for every shape."""
    here, found = card(), []
    for k, n in sizes.widths:
        count = max(2, sizes.weight_nbytes // (2 * k * n))
        for rows in sizes.rows:
            told(f"{rows} x {k} x {n}")
            times = turns(contraction_runs(rows, k, n, count), sizes.repeats)
            for name, row in ratios(times, "bf16"):
                width, most = (2, here.bf16) if name == "bf16" else (1, here.int8)
                most = here.fp8 if name == "fp8" else most
                seconds = float(np.median(times[name])) / count
                row["tops"] = 2 * rows * k * n / seconds / 1e12
                row["share_of_peak"] = row["tops"] / most
                row["share_of_bandwidth"] = k * n * width / seconds / 1e12 / here.memory
                found.append({"rows": rows, "k": k, "n": n, "what": name, **row})
    return found


class Block(nn.Module):
    """Token ids (rows, length) to states (rows, width), through one block of a large transformer.

    Causal attention with heads of 64, and a gated perceptron four times as wide: at a width of
    2,048, sixteen such blocks make a model of a billion parameters.
    """

    config: config.DotGeneral | None
    width: int
    quant_mode: QuantMode = QuantMode.TRAIN

    @nn.compact
    def __call__(self, ids: jax.Array) -> dict[str, jax.Array]:
        rows, length = ids.shape
        x = nn.Embed(256, self.width, name="tokens")(ids)
        y = nn.RMSNorm(name="before_attention")(x)
        query, key, value = (
            self.dense(self.width, name)(y).reshape(rows, length, -1, 64)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 8
        earlier = jnp.tril(jnp.ones((length, length), bool))
        weights = nn.softmax(jnp.where(earlier, scores, jnp.finfo(scores.dtype).min))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        x += self.dense(self.width, "mixed")(mixed.reshape(x.shape))
        y = nn.RMSNorm(name="before_perceptron")(x)
        gated = nn.silu(self.dense(4 * self.width, "gate")(y)) * self.dense(4 * self.width, "up")(y)
        x += self.dense(self.width, "down")(gated)
        return {"state": x[:, -1].astype(jnp.float32)}

    def dense(self, features: int, name: str) -> nn.Dense:
        dot_general = AqtDotGeneral(self.config, rhs_quant_mode=self.quant_mode)
        return nn.Dense(features, use_bias=False, dot_general=dot_general, name=name)


def model_runs(
    factory: Callable[[config.DotGeneral | None, QuantMode], nn.Module],
    inputs: bundle.Arrays,
    scratch: Path,
) -> tuple[dict[str, Callable[[], object]], int]:
    """The model in float32, in bfloat16 and served in both modes; how many rows differ in these."""
    plain = factory(None, QuantMode.TRAIN)
    variables = jax.jit(plain.init)(jax.random.key(0), **inputs)
    runs: dict[str, Callable[[], object]] = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), variables)
        forward = jax.jit(plain.apply)
        runs[np.dtype(dtype).name] = functools.partial(
            lambda forward, cast: jax.device_get(forward(cast, **inputs)), forward, cast
        )
    path = scratch / "model" / "1"
    rows = len(next(iter(inputs.values())))
    convert(functools.partial(factory, INT8), variables, inputs, path, tile=max(2, min(16, rows)))
    loaded = bundle.load(path)
    programs = {mode: Program(loaded, max_rows=rows, mode=mode) for mode in Mode}
    for mode, program in programs.items():
        runs[f"int8, {mode.value}"] = functools.partial(program, inputs)
    for run in runs.values():
        run()
    verdict = witness.compare(programs[Mode.FAST](inputs), programs[Mode.EXACT](inputs))
    return runs, max(difference.rows for difference in verdict.differences)


def of_models(sizes: Sizes) -> list[dict[str, Any]]:
    """End to end: MiniLM, and the block of a model of a billion parameters."""

    def encoder(quantized: config.DotGeneral | None, mode: QuantMode) -> nn.Module:
        return sentences.Encoder(config=quantized, quant_mode=mode)

    def block(quantized: config.DotGeneral | None, mode: QuantMode) -> nn.Module:
        return Block(quantized, sizes.block_width, quant_mode=mode)

    random = np.random.default_rng(0)
    found = []
    for name, factory, shapes in (
        ("MiniLM", encoder, sizes.encoder),
        (f"block of {sizes.block_width}", block, sizes.block),
    ):
        for rows, length in shapes:
            told(f"{name}, {rows} x {length}")
            ids = random.integers(1, 256, (rows, length), np.int32)
            inputs = {"ids": ids}
            if factory is encoder:
                inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            with tempfile.TemporaryDirectory() as scratch:
                runs, differing = model_runs(factory, inputs, Path(scratch))
                times = turns(runs, sizes.repeats)
            for what, row in ratios(times, "bfloat16"):
                shape = {"model": name, "rows": rows, "length": length, "what": what}
                found.append(shape | row | {"rows_that_differ_in_mode_fast": differing})
    return found


def of_training(sizes: Sizes) -> list[dict[str, Any]]:
    """A step of a transformer in bfloat16, and with its contractions in int8."""
    model = training.Transformer
    shape = model.shape(training.Sizes(sizes.training_rows, sizes.training_channels))
    steppers = {}
    for name, quantized in training.CONFIGURATIONS.items():
        told(f"training step, {name}")
        instance = model(quantized, jnp.bfloat16, sizes.training_channels)
        steppers[name] = training.stepper(instance, shape)
    times = turns(steppers, sizes.repeats)
    times = {name: of / training.STEPS for name, of in times.items()}
    return [{"what": name, **row} for name, row in ratios(times, "float")]


TABLES = {"contractions": of_contractions, "models": of_models, "training": of_training}
FORMATS = {
    "ms": "{:.3f}",
    "times_as_fast": "{:.2f}",
    "tops": "{:.1f}",
    "share_of_peak": "{:.0%}",
    "share_of_bandwidth": "{:.0%}",
}


def show(title: str, rows: Sequence[dict[str, Any]], *, markdown: bool) -> None:
    """Prints a table; what no data sheet says of this card is left open."""
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, title=title)
    columns = [name for name in rows[0] if name != "seconds"]
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for row in rows:
        low, high = row["quartiles"]
        cells = {**row, "quartiles": f"{low:.2f} to {high:.2f}"}
        for name, form in FORMATS.items():
            if name in cells:
                cells[name] = "-" if math.isnan(cells[name]) else form.format(cells[name])
        table.add_row(*(str(cells[name]) for name in columns))
    Console(width=max(140, Console().width)).print(table)


def told(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time measured")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--quick", action="store_true", help="tiny: only shows that it runs")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    document: dict[str, Any] = {"environment": environment(), "sizes": dataclasses.asdict(sizes)}
    # What was measured is kept if a later table does not fit into the card's memory.
    with contextlib.ExitStack() as kept:
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            kept.callback(lambda: options.json.write_text(json.dumps(document, indent=1) + "\n"))
        for name in options.tables:
            document[name] = TABLES[name](sizes)
            show(name, document[name], markdown=options.markdown)
    Console().print(
        f"{sizes.repeats} repeats; {described(document['environment'])}", soft_wrap=True
    )


if __name__ == "__main__":
    main()
