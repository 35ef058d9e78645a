"""Quantized convolution in Flax: the modes give the same bits, it trains, and it is served."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from aqt_engine import QuantMode, bundle, config, witness
from aqt_engine.convert import convert
from aqt_engine.execution import Program
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral
from engine.contractions import assert_same_bits

pytestmark = pytest.mark.slow
FULLY = config.fully_quantized()


class ConvNet(nn.Module):
    mode: QuantMode = QuantMode.TRAIN
    quantization: config.DotGeneral | None = FULLY

    @nn.compact
    def __call__(self, x):
        for features in (8, 16):
            convolution = AqtConvGeneralDilated(self.quantization, rhs_quant_mode=self.mode)
            x = nn.relu(nn.Conv(features, (3, 3), strides=2, conv_general_dilated=convolution)(x))
        dot_general = AqtDotGeneral(self.quantization, rhs_quant_mode=self.mode)
        return nn.Dense(10, dot_general=dot_general)(x.reshape(len(x), -1))


def initial(x):
    """What the float model begins with, of the same names; it compiles in a tenth of the time."""
    return jax.jit(ConvNet(quantization=None).init)(jax.random.key(0), x[:2])


def images(count=64):
    digits = load_digits()
    return (digits.images[:count, ..., None] / 16).astype(np.float32), digits.target[:count]


def test_the_modes_give_the_same_bits_and_serving_never_looks_at_the_float_kernel():
    x, _ = images(4)
    variables = initial(x)
    apply = jax.jit(lambda mode, v, x: ConvNet(mode).apply(v, x), static_argnums=0)
    trained = apply(QuantMode.TRAIN, variables, x)
    convert_mode = jax.jit(ConvNet(QuantMode.CONVERT).apply, static_argnames="mutable")
    _, stored = convert_mode(variables, x, mutable="aqt")
    kernel = stored["aqt"]["AqtConvGeneralDilated_0"]["qrhs"]
    assert kernel.qvalue.dtype == np.int8
    assert kernel.scale.shape == (1, 1, 1, 8)
    blank = jax.tree.map_with_path(
        lambda path, leaf: leaf * np.nan if path[-1].key == "kernel" else leaf, variables
    )
    assert_same_bits(apply(QuantMode.SERVE, {**blank, **stored}, x), trained)
    with pytest.raises(ValueError, match="holds no 'qrhs'"):
        apply(QuantMode.SERVE, variables, x)


def test_without_a_configuration_it_is_the_float_convolution():
    x, _ = images(4)

    class Plain(nn.Module):
        given: bool

        @nn.compact
        def __call__(self, x):
            convolution = AqtConvGeneralDilated(None) if self.given else None
            return nn.Conv(8, (3, 3), conv_general_dilated=convolution)(x)

    variables = jax.jit(Plain(False).init)(jax.random.key(0), x)
    assert_same_bits(Plain(True).apply(variables, x), Plain(False).apply(variables, x))


@pytest.mark.long
def test_it_trains_with_every_contraction_quantized():
    x, y = images(512)
    model = ConvNet()
    variables = initial(x)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(variables, state, key):
        def loss(variables):
            logits = model.apply(variables, x, rngs={"params": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(y)).mean()

        value, gradient = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state, value

    state, losses = optimizer.init(variables), []
    for i in range(60):
        # JAX's default generator takes twice as long to compile.
        variables, state, value = step(variables, state, jax.random.key(i, impl="rbg"))
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]


def test_a_converted_convolution_is_exact_in_every_bucket(tmp_path):
    x, _ = images(48)
    variables = initial(x)
    manifest = convert(ConvNet, variables, {"x": x}, tmp_path / "conv" / "1", tile=8)
    assert {w.dtype for w in manifest.weights if w.role == "qvalue"} == {"int8"}
    assert not any(w.name.endswith("kernel") for w in manifest.weights)
    loaded = bundle.load(tmp_path / "conv" / "1")
    verdicts = witness.prove(Program(loaded, max_rows=32), loaded.witness)
    assert all(verdict.exact for verdict in verdicts.values())
