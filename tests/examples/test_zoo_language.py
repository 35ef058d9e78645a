"""The scorer of text of the zoo: what it scores, and that it is served in every bit."""

import numpy as np
import pytest

from aqt_engine import QuantMode
from examples.entry import forward_of
from examples.language.model import float_model
from examples.language.train import initial, split_text, windows
from examples.serving_the_zoo import assert_no_float_copy, assert_served_exactly
from examples.zoo import MODELS

pytestmark = pytest.mark.slow


def test_a_score_is_of_the_bytes_before_the_padding():
    model = float_model(QuantMode.TRAIN)
    forward = forward_of(model.apply, initial(model), 4)
    text = windows(split_text()[1], np.arange(4), 64).copy()
    text[1:, 40:] = 0
    text[2, 39] ^= 1
    answer = forward({"text": text})
    np.testing.assert_array_equal(answer["bytes"], [64, 40, 40, 40])
    longer = np.pad(text, ((0, 0), (0, 64)))
    again = forward({"text": longer})["log_likelihood"]
    np.testing.assert_allclose(again, answer["log_likelihood"], rtol=1e-5)
    # An untrained model takes all bytes to be about as likely.
    per_byte = -answer["log_likelihood"] / answer["bytes"] / np.log(2)
    assert (abs(per_byte - 8) < 1).all()
    assert answer["log_likelihood"][1] != answer["log_likelihood"][2]


@pytest.mark.long
def test_served_exactly_at_any_length_without_a_float_copy(tmp_path):
    assert_served_exactly([MODELS["language_int8"]], tmp_path)
    assert_no_float_copy(
        tmp_path / "repository" / "language_int8" / "1",
        quantized=3 * 4 + 1,
        floats=["bytes/embedding", "positions/embedding"],
    )
