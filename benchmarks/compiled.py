"""What XLA makes of a layer that is served: counted, not timed, and so the same on any machine.

    python -m benchmarks.compiled

The graph of a dense layer is compiled at its tile, and the same in float32 at as many rows. Both
are asked for the bytes that they read and write, by XLA's own cost analysis, which is the same
in every run. Weights in int8 are a quarter of those in float, unless the compiler widens them
before it multiplies: then it reads and writes more than in float, and is slower.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_engine import bundle
from aqt_engine.convert import convert
from benchmarks.peers.layers import SHAPES, int8_layer

TILE = 16


def bytes_accessed(shape: tuple[int, int]) -> tuple[int, int]:
    """Of the graph that is served, at its tile, and of the one in float32."""
    x, w = np.ones((TILE, shape[0]), np.float32), np.ones(shape, np.float32)
    with tempfile.TemporaryDirectory() as made:
        path = Path(made, "layer", "1")
        variables = {"params": {"kernel": w}}
        convert(int8_layer(shape[1]), variables, {"inputs": x}, path, tile=TILE)
        loaded = bundle.load(path)
        served = jax.jit(loaded.graph.call).lower(list(loaded.weights), [x]).compile()
    in_float = jax.jit(jnp.matmul).lower(x, w).compile()
    both = (each.cost_analysis()["bytes accessed"] for each in (served, in_float))
    of_served, of_float = (int(of) for of in both)
    return of_served, of_float


def main() -> None:
    table = Table(box=box.MARKDOWN)
    for column in ("layer", "bytes, int8", "bytes, float32", "ratio"):
        table.add_column(column, justify="right")
    for shape in SHAPES:
        served, in_float = bytes_accessed(shape)
        name = "x".join(map(str, shape))
        table.add_row(name, f"{served:,}", f"{in_float:,}", f"{served / in_float:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
