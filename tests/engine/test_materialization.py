"""What is behind a barrier is compiled alike, whether it is computed or read."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from aqt_engine import QuantMode, config
from aqt_engine.convertible import LinenModel
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.materialization import materialized
from engine.contractions import assert_same_bits

X = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
VALUES = np.float32([-1.5, 0.0, -0.0, np.inf, np.nan, 3.0])


@pytest.mark.parametrize("first", VALUES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_it_changes_no_value(first, dtype):
    x = jnp.asarray(np.concatenate([[first], VALUES]), dtype)
    assert_same_bits(materialized(x), x)
    assert_same_bits(jax.jit(materialized)(x), x)
    assert_same_bits(jax.jit(jax.vmap(materialized))(x), x)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 3)])
def test_it_takes_any_shape(shape):
    x = jnp.ones(shape)
    assert_same_bits(jax.jit(materialized)(x), x)


def test_gradients_pass():
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(materialized(x) * jnp.arange(3.0))))
    assert_same_bits(gradient(jnp.ones(3)), jnp.arange(3.0))
    _, tangent = jax.jvp(materialized, (jnp.ones(3),), (jnp.arange(3.0),))
    assert_same_bits(tangent, jnp.arange(3.0))


def test_it_is_lowered_for_every_platform():
    platforms = ("cpu", "cuda", "tpu")
    exported = export.export(jax.jit(materialized), platforms=platforms)(jnp.ones(3))
    assert exported.platforms == platforms
    for platform, op in (("cpu", "call @aqt_materialize"), ("cuda", "optimization_barrier")):
        text = export.export(jax.jit(materialized), platforms=(platform,))(jnp.ones(3))
        assert op in text.mlir_module()


TAILS = {
    "norm": lambda y: nn.LayerNorm(name="norm")(y),
    "gelu_norm": lambda y: nn.LayerNorm(name="norm")(nn.gelu(y)),
    "softmax": jax.nn.softmax,
    "sum": lambda y: y.sum(axis=1) / jnp.sqrt((y * y).sum(axis=1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("po2", [True, False])
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_float_sums_behind_a_scale_are_served_as_trained(tail, po2):
    # Without the barrier a layer norm behind scales that are powers of two differs on CPU, since
    # the computation of the weight's scale is compiled into its sums.
    int8 = config.update(config.fully_quantized(), "fwd.*", po2_scale=po2)

    class Net(nn.Module):
        mode: QuantMode

        @nn.compact
        def __call__(self, x):
            hook = AqtDotGeneral(int8, rhs_quant_mode=self.mode)
            return tail(nn.Dense(16, bias_init=nn.initializers.normal(), dot_general=hook)(x))

    model = LinenModel(Net)
    variables = jax.jit(Net(QuantMode.TRAIN).init)(jax.random.key(0), X)
    serving = model.serving(variables, {"x": X})
    served = jax.jit(lambda v, x: serving.forward(v, {"x": x}))
    trained = jax.jit(lambda v, x: model.train(v, {"x": x}))
    assert_same_bits(served([leaf.value for leaf in serving.leaves], X), trained(variables, X))
