"""MiniLM as the zoo lists it: one encoder, quantized after training in four ways."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from aqt_engine import QuantMode
from aqt_engine.convert import Signature
from examples.entry import Arrays, Forward, Model, Quality, answers, forward_of
from examples.sentences import model, weights
from examples.sentences.text import sentences, tokenize

LENGTHS = (32, 64)
CALIBRATED = 128
COMPARED = 384


@functools.cache
def _split() -> tuple[list[str], list[str], list[str]]:
    """Sentences to calibrate with, those that quality is measured on, and the topics of these."""
    topics = sentences()
    order = np.random.default_rng(0).permutation(len(topics))
    picked = [list(topics)[i] for i in order[: CALIBRATED + COMPARED]]
    compared = picked[CALIBRATED:]
    return picked[:CALIBRATED], compared, [topics[sentence] for sentence in compared]


@functools.cache
def variables(fast: bool) -> Mapping[str, Any]:
    del fast  # they are taken, not trained
    return weights.load_variables()


def inputs(rng: np.random.Generator, rows: int, length: int) -> Arrays:
    """Sentences cut or padded to the length, in tokens."""
    texts = _split()[1]
    return tokenize([texts[i] for i in rng.integers(0, len(texts), rows)], length)


def calibration() -> Arrays:
    return tokenize(_split()[0], LENGTHS[0])


def quality(forward: Forward) -> Quality:
    """Of the cosines between all pairs of sentences, and of the neighbors that they give."""
    _, texts, topics = _split()
    float_cosines = _cosines(_float_embeddings())
    cosines = _cosines(answers(forward, tokenize(texts, LENGTHS[-1]))["embedding"])
    pairs = np.triu_indices(len(texts), 1)
    nearest, float_nearest = np.argsort(-cosines, axis=1), np.argsort(-float_cosines, axis=1)
    tens = zip(nearest[:, :10], float_nearest[:, :10], strict=True)
    topic = np.array(topics)
    return {
        "nearest is of the same topic": float((topic[nearest[:, 0]] == topic).mean()),
        "rank correlation": float(spearmanr(cosines[pairs], float_cosines[pairs]).statistic),
        "agreement at 1": float((nearest[:, 0] == float_nearest[:, 0]).mean()),
        "agreement at 10": float(np.mean([len(set(a) & set(b)) / 10 for a, b in tens])),
    }


def _float_quality() -> Quality:
    return quality(_float_forward())


def _float_forward() -> Forward:
    return forward_of(model.float_model(QuantMode.TRAIN).apply, variables(False))


@functools.cache
def _float_embeddings() -> np.ndarray:
    return answers(_float_forward(), tokenize(_split()[1], LENGTHS[-1]))["embedding"]


def _cosines(embeddings: np.ndarray) -> np.ndarray:
    """Of all pairs; of each with itself as low as none can be."""
    cosines = embeddings @ embeddings.T
    np.fill_diagonal(cosines, -2)
    return cosines


def _model(name: str, summary: str, *, static: bool = False) -> Model:
    return Model(
        name=f"minilm_{name}",
        summary=f"MiniLM sentence encoder, {summary}",
        factory=f"examples.sentences.model:{name}_model",
        variables=variables,
        inputs=inputs,
        quality=quality,
        float_quality=_float_quality,
        cost=500,
        signature=Signature(
            shapes={name: ("batch", "length") for name in ("input_ids", "attention_mask")},
            lengths={"length": LENGTHS},
        ),
        calibration=calibration if static else None,
    )


MODELS = (
    _model("dynamic_int8", "int8 after training, a scale for each token"),
    _model("static_int8", "int8 after training, scales from calibration", static=True),
    _model("weight_only_int8", "weights in int8, contracted in float"),
    _model("weight_only_int4", "weights in int4, contracted in float"),
)
