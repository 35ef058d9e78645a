"""Bundles that no training makes: one that returns what it is given, one that can be stalled."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from aqt_engine import bundle
from aqt_protos.tensors import DATATYPES

TILE = 4
WIDTH = 3
STALL = 42.0
"""A row of the stalling bundle with this value is computed for ever."""
ARRAY_DATATYPES = [name for name in DATATYPES if name != "BYTES"]
"""Every datatype that a model can have."""
TYPED_DATATYPES = [name for name in ARRAY_DATATYPES if DATATYPES[name].contents]
"""Those whose elements can be typed contents."""


def write_identity(path, datatypes=ARRAY_DATATYPES):
    """One input and one output of each of `datatypes`, `FP32` to `OUT_FP32` and so on."""
    dtypes = {name: DATATYPES[name].dtype for name in datatypes}
    shape = (TILE, WIDTH)
    rows = {name: np.arange(TILE * WIDTH).reshape(shape).astype(d) for name, d in dtypes.items()}
    return _write(
        path,
        lambda weights, inputs: inputs,
        inputs=rows,
        outputs={f"OUT_{name}": array for name, array in rows.items()},
    )


def write_stalling(path):
    """`y` is twice `x`; as long as a row of `x` is STALL, never."""

    def double(weights, inputs):
        (x,) = inputs
        # A generator with period 2**64 counts from 1 to 0: a compiler may drop a loop without end,
        # but not one that has an end in some 100 years.
        state = lax.while_loop(
            lambda state: (state != 0) & jnp.any(x == STALL),
            lambda state: state * jnp.uint64(6364136223846793005) + jnp.uint64(1),
            jnp.uint64(1),
        )
        return [x * 2 + (state > 1)]

    x = np.arange(TILE, dtype=np.float32)[:, None]
    return _write(path, double, inputs={"x": x}, outputs={"y": x * 2})


def _write(path, forward, *, inputs, outputs):
    weights = {"unused": np.zeros(1, np.float32)}
    with jax.enable_x64(True):
        graph = export.export(jax.jit(forward), platforms=("cpu", "cuda", "tpu"))(
            [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights.values()],
            [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs.values()],
        )
    return bundle.write(
        path,
        graph=graph,
        inputs=_specs(inputs),
        outputs=_specs(outputs),
        tile=TILE,
        weights=weights,
        roles={"unused": "float"},
        float_nbytes=4,
        tools={"jax": jax.__version__},
        witness=bundle.Witness(inputs=inputs, outputs=outputs),
    )


def _specs(arrays):
    return tuple(
        bundle.TensorSpec(name=k, dtype=v.dtype.name, shape=(bundle.BATCH, *v.shape[1:]))
        for k, v in arrays.items()
    )
