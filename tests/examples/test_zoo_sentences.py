"""MiniLM of the zoo: it is the published encoder, and its int8 form is served in every bit."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import erf, softmax

from aqt_engine import QuantMode
from examples import first_layers
from examples.entry import forward_of
from examples.sentences import model, weights
from examples.sentences.text import sentences, tokenize
from examples.serving_the_zoo import assert_no_float_copy, assert_served_exactly
from examples.zoo import MODELS

pytestmark = pytest.mark.slow


def reference(input_ids, attention_mask):
    """The encoder in NumPy and float64, by the names of the published tensors."""
    tensors = load_file(weights.model_file("model.safetensors"))
    t = {name: array.astype(np.float64) for name, array in tensors.items() if array.ndim}

    def linear(name, x):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name, x):
        centered = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-12)
        return centered / deviation * t[f"{name}.weight"] + t[f"{name}.bias"]

    def split(x):
        return x.reshape(*x.shape[:2], 12, 32).swapaxes(1, 2)

    words = t["embeddings.word_embeddings.weight"][input_ids]
    positions = t["embeddings.position_embeddings.weight"][: input_ids.shape[1]]
    x = words + positions + t["embeddings.token_type_embeddings.weight"][0]
    x = norm("embeddings.LayerNorm", x)
    hidden = np.where(attention_mask[:, None, None, :] > 0, 0, -np.inf)
    for i in range(6):
        at = f"encoder.layer.{i}"
        q, k, v = (split(linear(f"{at}.attention.self.{n}", x)) for n in ("query", "key", "value"))
        mixed = softmax(q @ k.swapaxes(2, 3) / np.sqrt(32) + hidden, axis=-1) @ v
        mixed = mixed.swapaxes(1, 2).reshape(x.shape)
        x = norm(
            f"{at}.attention.output.LayerNorm", x + linear(f"{at}.attention.output.dense", mixed)
        )
        y = linear(f"{at}.intermediate.dense", x)
        y = y * (1 + erf(y / np.sqrt(2))) / 2
        x = norm(f"{at}.output.LayerNorm", x + linear(f"{at}.output.dense", y))
    present = attention_mask[..., None]
    mean = (x * present).sum(1) / present.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_the_float_model_is_the_published_one():
    tokens = tokenize(list(sentences())[:16], 48)
    forward = forward_of(model.float_model(QuantMode.TRAIN).apply, weights.load_variables(), 16)
    np.testing.assert_allclose(forward(tokens)["embedding"], reference(**tokens), atol=2e-6)


WHOLE = MODELS["minilm_static_int8"]
FIRST = dataclasses.replace(
    WHOLE, factory="examples.first_layers:static_int8_model", variables=first_layers.variables
)


@pytest.mark.parametrize(
    ("encoder", "layers"),
    [
        pytest.param(FIRST.with_lengths(16, 24), first_layers.LAYERS, id="first layer"),
        pytest.param(WHOLE, model.LAYERS, id="whole", marks=pytest.mark.long),
    ],
)
def test_served_exactly_at_any_length_without_a_float_copy(encoder, layers, tmp_path):
    assert_served_exactly([encoder], tmp_path)
    assert_no_float_copy(
        tmp_path / "repository" / encoder.name / "1",
        quantized=6 * layers,
        floats=[f"{name}/embedding" for name in ("positions", "segments", "words")],
    )
