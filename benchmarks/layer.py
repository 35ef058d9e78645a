"""Where the time of one quantized dense layer goes, in processor time.

    python -m benchmarks.layer

Processor time, summed over threads, hardly changes with what else the machine does; the least of
`REPEATS` is given. Arrays are of (ROWS, WIDTH) and (WIDTH, WIDTH), in float32.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_engine import Context, config
from aqt_engine.numerics import Uniform
from benchmarks.environment import described, environment

ROWS, WIDTH = 512, 1024
REPEATS = 5
AXES = (((1,), (0,)), ((), ()))
FIRST_AXES = (((0,), (0,)), ((), ()))
LAYERS = {
    "in float": None,
    "config_v4()": config.config_v4(),
    "fully_quantized(8, 8), to nearest": config.fully_quantized(use_stochastic_rounding=False),
    "fully_quantized(8, 8)": config.fully_quantized(8, 8),
}


def milliseconds(f: Callable[..., object], *arguments: jax.Array) -> float:
    """The least processor time of a call of `f`, compiled."""
    compiled = jax.jit(f).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        jax.block_until_ready(compiled(*arguments))
        found.append(time.process_time() - start)
    return min(found) * 1e3


def layer(quantized: config.DotGeneral | None, x, w, g, key):
    """Both gradients of a layer whose output's gradient is `g`."""

    def loss(x, w):
        if quantized is None:
            return (lax.dot_general(x, w, AXES) * g).sum()
        return (quantized(x, w, AXES, context=Context(key=key)) * g).sum()

    return jax.grad(loss, (0, 1))(x, w)


def main() -> None:
    key = jax.random.key(0)
    x, g = jax.random.normal(key, (2, ROWS, WIDTH))
    w = jax.random.normal(key, (WIDTH, WIDTH))
    x8, g8, w8 = ((a * 30).astype(jnp.int8) for a in (x, g, w))
    table = Table(box=box.MARKDOWN)
    table.add_column("what", no_wrap=True)
    table.add_column("ms", justify="right")

    def row(name: str, f: Callable[..., object], *arguments: jax.Array) -> None:
        table.add_row(name, f"{milliseconds(f, *arguments):.1f}")

    for name, quantized in LAYERS.items():
        row(f"layer, {name}", functools.partial(layer, quantized), x, w, g, key)
    integers = functools.partial(lax.dot_general, preferred_element_type=jnp.int32)
    row("contraction, float32", lambda a, b: lax.dot_general(a, b, AXES), x, w)
    row("contraction, int8", lambda a, b: integers(a, b, AXES), x8, w8)
    row("first axes, float32", lambda a, b: lax.dot_general(a, b, FIRST_AXES), g, x)
    row("first axes, int8, as XLA compiles it", lambda a, b: integers(a, b, FIRST_AXES), g8, x8)
    for name, noise in (("to nearest", None), ("stochastically", Uniform())):
        tensor = config.int_tensor(8, noise_fn=noise)
        row(
            f"quantizing {WIDTH}x{WIDTH} values {name}",
            lambda w, key, tensor=tensor: tensor.quantizer(key).quant(w, calibration_axes=0)[0],
            w,
            key,
        )
    Console(width=100).print(table)
    Console().print(described(environment()), soft_wrap=True)


if __name__ == "__main__":
    main()
