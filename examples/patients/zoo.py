"""The prognosis as the zoo lists it."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aqt_engine import QuantMode
from aqt_engine.convert import Signature
from examples.entry import Arrays, Forward, Model, Quality, answers, forward_of
from examples.patients.model import float_model, int8_model
from examples.patients.train import initial, inputs_of, split_patients, train


@functools.cache
def variables(fast: bool) -> Mapping[str, Any]:
    model = int8_model(QuantMode.TRAIN)
    # Compiled whole: eager, each operation is compiled by itself.
    return jax.jit(lambda: initial(model))() if fast else train(model)


def inputs(rng: np.random.Generator, rows: int, length: int) -> Arrays:
    """Held-out patients, and a threshold in the midst of what is answered."""
    del length
    patients = split_patients()[1]
    pick = rng.integers(0, len(patients["age"]), rows)
    threshold = rng.normal(150, 30, 1).astype(np.float32)
    return {
        **inputs_of({name: array[pick] for name, array in patients.items()}),
        "threshold": threshold,
    }


def quality(forward: Forward) -> Quality:
    patients = split_patients()[1]
    answer = answers(forward, inputs_of(patients))
    error = answer["progression"].astype(np.float32) - patients["progression"]
    return {
        "explained variance": float(1 - error.var() / patients["progression"].var()),
        "accuracy of quartiles": float((answer["quartile"] == patients["quartile"]).mean()),
    }


@functools.cache
def float_quality() -> Quality:
    model = float_model(QuantMode.TRAIN)
    return quality(forward_of(model.apply, train(model)))


MODELS = (
    Model(
        name="patients_int8",
        summary="prognosis of patients: branches, several inputs and outputs, bfloat16",
        factory="examples.patients.model:int8_model",
        variables=variables,
        inputs=inputs,
        quality=quality,
        float_quality=float_quality,
        signature=Signature(per_request=("threshold",)),
    ),
)
