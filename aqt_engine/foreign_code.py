"""What a graph calls outside of itself: a bundle may hold arithmetic, and no way out of it.

StableHLO computes; only its `custom_call` runs code that it names, which is compiled into the
process. Some of that code takes an address from the graph and calls it (Python callbacks), or
compiles what the graph brings (GPU kernels): who writes such a graph runs code where it is loaded.
"""

import re

from jax import export

_CALL = re.compile(r'custom_call(?: @("(?:[^"\\]|\\.)*"|[\w.$-]+))?')
_HARMLESS = frozenset(
    {
        "AllocateBuffer",
        "ApproxTopK",
        "SPMDFullToShardShape",
        "SPMDShardToFullShape",
        "Sharding",
        "annotate_device_placement",
        "cu_threefry2x32_ffi",
        "hip_threefry2x32_ffi",
        "shape_assertion",
        "stablehlo.dynamic_approx_top_k",
        "stablehlo.dynamic_reduce_window",
        "stablehlo.dynamic_rng_bit_generator",
        "stablehlo.dynamic_top_k",
    }
)


def foreign_calls(graph: export.Exported) -> tuple[str, ...]:
    """Names of what `graph` calls that is neither StableHLO nor known to do arithmetic only."""
    named = {match[1] or "(unnamed)" for match in _CALL.finditer(graph.mlir_module())}
    return tuple(sorted(named - _HARMLESS))
