"""Linen models in every mode, and what the modes have to agree on."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from aqt_engine import QuantMode, config
from aqt_engine.flax import AqtDotGeneral, AqtEinsum
from aqt_engine.flax.marks import SEPARATOR
from aqt_engine.qtensor import QTensor
from engine.contractions import assert_same_bits

INT8 = config.fully_quantized(fwd_bits=8, bwd_bits=8)
CONFIGS = {bits: config.fully_quantized(fwd_bits=bits) for bits in (4, 8)}
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(7, 6)), jnp.float32)
BATCHED = jnp.asarray(RNG.normal(size=(2, 7, 6)), jnp.float32)

TRAIN, CONVERT, SERVE = QuantMode.TRAIN, QuantMode.CONVERT, QuantMode.SERVE


class Dense(nn.Module):
    mode: QuantMode
    bits: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        dot_general = AqtDotGeneral(CONFIGS[self.bits], rhs_quant_mode=self.mode)
        return nn.Dense(5, dtype=self.dtype, dot_general=dot_general)(x)


class Einsum(nn.Module):
    mode: QuantMode
    bits: int = 8
    equation: str = "nf,fo->no"
    side: str = "rhs"
    shape: tuple[int, ...] = (6, 5)

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), self.shape)
        operands = (x, w) if self.side == "rhs" else (w, x)
        einsum = AqtEinsum(CONFIGS[self.bits], **{f"{self.side}_quant_mode": self.mode})
        return einsum(self.equation, *operands)


def parameters(module, x=X, seed=0):
    """Parameters for `module`, which nothing has to be compiled for."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module(TRAIN).init, jax.random.key(0), x)["params"]
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def run(module, variables, x=X):
    return jax.jit(module.apply)(variables, x)


def converted(module, params, x=X):
    """What CONVERT answers, and the collection that it stores."""
    convert = jax.jit(functools.partial(module(CONVERT).apply, mutable=["aqt"]))
    answer, stored = convert({"params": params}, x)
    return answer, stored["aqt"]


def stored_leaves(aqt):
    """The stored QTensors by their paths; each has its mark beside it."""
    leaves = traverse_util.flatten_dict(aqt, sep="/", is_leaf=lambda _, v: isinstance(v, QTensor))
    tensors = {path: leaf for path, leaf in leaves.items() if SEPARATOR not in path}
    assert all(isinstance(leaf, QTensor) for leaf in tensors.values())
    assert sorted(path.split(SEPARATOR)[0] for path in leaves.keys() - tensors.keys()) == sorted(
        tensors
    )
    return tensors


def with_weights(params, value):
    """The parameters with `value` all over those that are quantized."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {k: jnp.full_like(v, value) if k[-1] in ("kernel", "w") else v for k, v in flat.items()}
    )


def assert_modes_agree(module, x=X):
    """The parameters, the stored collection and the answer that all modes agree on.

    The float weights are NaN in SERVE, so that it cannot have read them, and no mode has a key.
    """
    params = parameters(module, x)
    trained = run(module(TRAIN), {"params": params}, x)
    assert np.isfinite(trained).all()
    answer, aqt = converted(module, params, x)
    assert_same_bits(answer, trained)
    served = run(module(SERVE), {"params": with_weights(params, jnp.nan), "aqt": aqt}, x)
    assert_same_bits(served, trained)
    return params, aqt, trained
