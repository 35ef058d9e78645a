"""The search as the zoo lists it: handwritten digits by the most similar ones."""

import functools

import numpy as np

from aqt_engine.convert import Function
from examples.digits.train import split_digits
from examples.entry import Arrays, Forward, Model, Quality, answers, forward_of
from examples.search.model import float_search, search


@functools.cache
def variables(fast: bool) -> Arrays:
    del fast  # nothing is trained
    images = split_digits()[0].images.reshape(-1, 64)
    return {"database": images / np.linalg.norm(images, axis=1, keepdims=True)}


def inputs(rng: np.random.Generator, rows: int, length: int) -> Arrays:
    del length
    images = split_digits()[1].images.reshape(-1, 64)
    return {"query": images[rng.integers(0, len(images), rows)]}


def quality(forward: Forward) -> Quality:
    known, held_out = split_digits()
    queries = {"query": held_out.images.reshape(-1, 64)}
    places = answers(forward, queries)["places"]
    exact = answers(_float_forward(), queries)["places"]
    pairs = zip(places, exact, strict=True)
    return {
        "accuracy of the nearest's digit": float(
            (known.labels[places[:, 0]] == held_out.labels).mean()
        ),
        "agreement at 5": float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs])),
    }


@functools.cache
def _float_forward() -> Forward:
    return forward_of(float_search, variables(False))


MODELS = (
    Model(
        name="search_int8",
        summary="search for the most similar digits, by a function; int8 database",
        factory="examples.search.model:search",
        made=lambda: Function(search),
        variables=variables,
        inputs=inputs,
        quality=quality,
        float_quality=lambda: quality(_float_forward()),
    ),
)
