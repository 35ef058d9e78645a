"""The scorer of text as the zoo lists it."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aqt_engine import QuantMode
from aqt_engine.convert import Signature
from examples.entry import Arrays, Forward, Model, Quality, answers, forward_of
from examples.language.model import LONGEST, float_model, int8_model
from examples.language.train import initial, split_text, train, windows

LENGTHS = (64, LONGEST)
COMPARED = 256


@functools.cache
def variables(fast: bool) -> Mapping[str, Any]:
    model = int8_model(QuantMode.TRAIN)
    # Compiled whole: eager, each operation is compiled by itself.
    return jax.jit(lambda: initial(model))() if fast else train(model)


def inputs(rng: np.random.Generator, rows: int, length: int) -> Arrays:
    """Pieces of the text that was held out."""
    text = split_text()[1]
    return {"text": windows(text, rng.integers(0, len(text) - length, rows), length)}


def quality(forward: Forward) -> Quality:
    """Bits that a held-out byte costs: lower is better; 8 without a model."""
    text = split_text()[1]
    starts = np.linspace(0, len(text) - LONGEST, COMPARED).astype(int)
    answer = answers(forward, {"text": windows(text, starts, LONGEST)})
    total = answer["log_likelihood"].astype(np.float64).sum() / np.log(2)
    return {"bits per byte": float(-total / answer["bytes"].sum())}


@functools.cache
def float_quality() -> Quality:
    model = float_model(QuantMode.TRAIN)
    return quality(forward_of(model.apply, train(model)))


MODELS = (
    Model(
        name="language_int8",
        summary="byte-level transformer that scores text, trained in int8",
        factory="examples.language.model:int8_model",
        variables=variables,
        inputs=inputs,
        quality=quality,
        float_quality=float_quality,
        cost=10,
        signature=Signature(shapes={"text": ("batch", "length")}, lengths={"length": LENGTHS}),
    ),
)
