"""Small bundles for tests that need one, made without training anything."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from aqt_engine import bundle
from aqt_engine.manifest import Axes
from aqt_engine.materialization import materialized_on_cpu

FEATURES = 6
CLASSES = 4
TILE = 4
_UNNAMED: Mapping[str, Axes] = {}
SPECS = {
    "inputs": (bundle.TensorSpec(name="x", dtype="float32", shape=(bundle.BATCH, FEATURES)),),
    "outputs": (bundle.TensorSpec(name="y", dtype="float32", shape=(bundle.BATCH, CLASSES)),),
}


def linear(weights, inputs):
    """An int8 linear layer, as conversion leaves it: integers, their scale, a float bias."""
    qvalue, scale, bias = weights
    (x,) = inputs
    s = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127.5
    s = jnp.where(s == 0, 1.0, s)
    q = jnp.round(jnp.clip(x * (1 / s), -127, 127)).astype(jnp.int8)
    q = materialized_on_cpu(q)
    acc = lax.dot_general(q, qvalue, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    acc = materialized_on_cpu(acc)
    return [acc.astype(jnp.float32) * s * scale + bias]


def write_linear(
    path: Path, *, seed: int = 0, wrong_witness: bool = False, axes: Mapping[str, Axes] = _UNNAMED
) -> bundle.Manifest:
    """Writes a bundle of `linear` at `path`, say `repository/linear/1`."""
    rng = np.random.default_rng(seed)
    weights = {
        "kernel/qvalue": rng.integers(-127, 128, (FEATURES, CLASSES), np.int8),
        "kernel/scale": rng.uniform(0.01, 0.02, (1, CLASSES)).astype(np.float32),
        "bias": rng.normal(size=CLASSES).astype(np.float32),
    }
    x = rng.normal(size=(4 * TILE, FEATURES)).astype(np.float32)
    at_tile = jax.jit(linear)
    tiles = [at_tile(list(weights.values()), [t])[0] for t in np.split(x, 4)]
    y = np.concatenate([np.asarray(t) for t in tiles])
    if wrong_witness:
        y[3, 1] = np.nextafter(y[3, 1], np.float32(np.inf))
    return bundle.write(
        path,
        graph=export.export(at_tile, platforms=("cpu", "cuda", "tpu"))(
            [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights.values()],
            [jax.ShapeDtypeStruct((TILE, FEATURES), np.float32)],
        ),
        tile=TILE,
        weights=weights,
        roles={"kernel/qvalue": "qvalue", "kernel/scale": "scale", "bias": "float"},
        axes=axes,
        float_nbytes=4 * (FEATURES * CLASSES + CLASSES),
        tools={"jax": jax.__version__},
        witness=bundle.Witness(inputs={"x": x}, outputs={"y": y}),
        **SPECS,
    )


def reference(path: Path, x: np.ndarray) -> np.ndarray:
    """What the bundle at `path` has to answer to `x`, computed without serving code."""
    loaded = bundle.load(path)
    at_tile = jax.jit(linear)
    padded = np.concatenate([x, np.zeros((-len(x) % TILE, FEATURES), np.float32)])
    tiles = [
        np.asarray(at_tile(list(loaded.weights), [padded[i : i + TILE]])[0])
        for i in range(0, len(padded), TILE)
    ]
    return np.concatenate(tiles)[: len(x)]
