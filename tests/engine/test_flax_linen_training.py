"""Linen modules under Flax's transformations, and in training."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aqt_engine import QuantMode
from aqt_engine.flax import AqtDotGeneral
from engine.contractions import assert_same_bits
from engine.linen_modes import (
    INT8,
    RNG,
    SERVE,
    TRAIN,
    X,
    assert_modes_agree,
    converted,
    parameters,
    run,
    stored_leaves,
)

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]


class Residual(nn.Module):
    mode: QuantMode

    @nn.compact
    def __call__(self, x, _=None):
        dot_general = AqtDotGeneral(INT8, rhs_quant_mode=self.mode)
        return x + nn.relu(nn.Dense(6, dot_general=dot_general)(x)), None


class Lifted(nn.Module):
    """Three residual layers, made by one of Flax's transformations."""

    mode: QuantMode
    how: str

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "aqt": 0}
        layers = {"variable_axes": axes, "split_rngs": {"params": True}, "length": 3}
        match self.how:
            case "scan":
                return nn.scan(Residual, **layers)(self.mode)(x, None)[0]
            case "both":
                block = nn.remat(Residual, prevent_cse=False)
                return nn.scan(block, **layers)(self.mode)(x, None)[0]
            case "vmap":
                stacked = jnp.stack([x, x + 1, -x])
                mapped = nn.vmap(
                    Residual, in_axes=0, variable_axes=axes, split_rngs={"params": True}
                )
                return mapped(self.mode)(stacked)[0]
            case "remat" | "jit":
                block = {"remat": nn.remat, "jit": nn.jit}[self.how](Residual)
                for _ in range(3):
                    x, _ = block(self.mode)(x)
                return x
            case "loop":
                for _ in range(3):
                    x, _ = Residual(self.mode)(x)
                return x
        raise AssertionError(self.how)


@pytest.mark.parametrize(
    "how",
    ["scan", "vmap", "jit", *(pytest.param(h, marks=pytest.mark.long) for h in ("remat", "both"))],
)
def test_lifted_modules_store_and_serve(how):
    _, aqt, _ = assert_modes_agree(functools.partial(Lifted, how=how))
    leaves = stored_leaves(aqt)
    assert {p.split("/")[-1] for p in leaves} == {"qrhs"}
    assert sum(leaf.qvalue.size for leaf in leaves.values()) == 3 * 6 * 6


@pytest.mark.parametrize(
    "how", ["both", *(pytest.param(h, marks=pytest.mark.long) for h in ("jit", "scan", "remat"))]
)
def test_lifting_changes_no_answer_and_leaves_a_gradient(how):
    lifted = Lifted(TRAIN, how)
    params = parameters(functools.partial(Lifted, how="loop"))
    layers = [params[f"Residual_{i}"] for i in range(3)]
    names = sorted(parameters(functools.partial(Lifted, how=how)))
    stacked = [jax.tree.map(lambda *p: jnp.stack(p), *layers)] if len(names) == 1 else layers
    moved = dict(zip(names, stacked, strict=True))
    assert_same_bits(run(Lifted(TRAIN, "loop"), {"params": params}), run(lifted, {"params": moved}))

    def loss(params, key):
        return (lifted.apply({"params": params}, X, rngs={"params": key}) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(moved, jax.random.key(1))
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradient))


class Mlp(nn.Module):
    mode: QuantMode = TRAIN
    prng_name: str | None = "params"

    @nn.compact
    def __call__(self, x):
        def dense(features):
            dot_general = AqtDotGeneral(INT8, rhs_quant_mode=self.mode, prng_name=self.prng_name)
            return nn.Dense(features, dot_general=dot_general)

        return dense(1)(nn.tanh(dense(16)(x)))


def regression(module, stream):
    """Training data, first parameters and a jitted loss with its gradient."""
    x = jnp.asarray(RNG.normal(size=(64, 6)), jnp.float32)
    y = jnp.tanh(x @ jnp.asarray([[1.0], [-1.0], [0.5], [0.0], [0.2], [-0.7]])) + 0.5
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]

    @jax.jit
    def loss_and_gradient(params, key):
        def loss(p):
            found = module.apply({"params": p}, x, rngs={stream: key})
            return ((found - y) ** 2).mean()

        return jax.value_and_grad(loss)(params)

    return params, loss_and_gradient


@pytest.mark.long
def test_training_with_stochastic_rounding_lowers_the_loss():
    params, loss_and_gradient = regression(Mlp(), "params")
    optimizer = optax.sgd(0.1)
    state = optimizer.init(params)
    losses = []
    for key in jax.random.split(jax.random.key(1), 100):
        loss, gradient = loss_and_gradient(params, key)
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    _, aqt = converted(Mlp, params)
    served = run(Mlp(SERVE), {"params": params, "aqt": aqt})
    assert_same_bits(served, run(Mlp(), {"params": params}))


@pytest.mark.parametrize("stream", [pytest.param("params", marks=pytest.mark.long), "noise"])
def test_the_noise_comes_from_the_stream_that_is_named(stream):
    params, loss_and_gradient = regression(Mlp(prng_name=stream), stream)
    first, again, other = (loss_and_gradient(params, jax.random.key(k)) for k in (1, 1, 2))
    jax.tree.map(assert_same_bits, first, again)
    assert first[0] == other[0]  # the forward draws no noise
    same = jax.tree.map(np.array_equal, first[1], other[1])
    assert not any(layer["kernel"] for layer in same.values())
