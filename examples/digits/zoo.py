"""The digits classifiers as the zoo lists them."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from aqt_engine import QuantMode
from aqt_engine.flax.nnx import split
from examples.digits import convnet, model, perceptron
from examples.digits.train import EPOCHS, split_digits, train
from examples.entry import Arrays, Forward, Model, Quality, answers, forward_of

_FACTORIES = {
    "mixer_float": lambda mode: model.float_model(),
    "mixer": model.int8_model,
    "conv_float": convnet.float_model,
    "conv_int8": convnet.int8_model,
    "conv_int4": convnet.int4_model,
}


def inputs(rng: np.random.Generator, rows: int, length: int) -> Arrays:
    del length
    images = split_digits()[1].images
    return {"image": images[rng.integers(0, len(images), rows)]}


def quality(forward: Forward) -> Quality:
    held_out = split_digits()[1]
    found = answers(forward, {"image": held_out.images})["digit"]
    return {"accuracy": float((found == held_out.labels).mean())}


@functools.cache
def _trained(name: str, fast: bool) -> Mapping[str, Any]:
    if fast:
        image = jax.ShapeDtypeStruct((1, 8, 8), np.float32)
        # Compiled whole: eager, each operation is compiled by itself.
        return jax.jit(lambda: _module(name).lazy_init(jax.random.key(0), image))()
    return train(_module(name), split_digits()[0], epochs=EPOCHS, on_epoch=lambda loss: None)


def _module(name: str) -> nn.Module:
    return _FACTORIES[name](QuantMode.TRAIN)


def _float_quality(name: str) -> Quality:
    return quality(forward_of(_module(name).apply, _trained(name, False)))


@functools.cache
def _perceptron(fast: bool) -> Mapping[str, Any]:
    epochs = 0 if fast else EPOCHS
    return perceptron.train(perceptron.int8_model(), split_digits()[0], epochs=epochs)


@functools.cache
def _perceptron_float_quality() -> Quality:
    model = perceptron.float_model()
    trained = perceptron.train(model, split_digits()[0], epochs=EPOCHS)
    graph = split(model)[0]
    return quality(forward_of(lambda v, **inputs: graph.train(v, inputs), trained))


def _model(name: str, summary: str, factory: str, float_name: str) -> Model:
    return Model(
        name=f"digits_{name}",
        summary=summary,
        factory=factory,
        variables=functools.partial(_trained, name),
        inputs=inputs,
        quality=quality,
        float_quality=functools.partial(_float_quality, float_name),
    )


MODELS = (
    _model(
        "mixer",
        "patch mixer of handwritten digits, trained in int8",
        "examples.digits.model:int8_model",
        "mixer_float",
    ),
    _model(
        "conv_int8",
        "convolutional network of handwritten digits, trained in int8",
        "examples.digits.convnet:int8_model",
        "conv_float",
    ),
    _model(
        "conv_int4",
        "the same, trained with int4 weights and activations",
        "examples.digits.convnet:int4_model",
        "conv_float",
    ),
    Model(
        name="digits_nnx_int8",
        summary="perceptron of handwritten digits in Flax nnx, quantized by rules, trained in int8",
        factory="examples.digits.perceptron:int8_model",
        made=lambda: split(perceptron.int8_model())[0],
        variables=_perceptron,
        inputs=inputs,
        quality=quality,
        float_quality=_perceptron_float_quality,
    ),
)
