"""The digits classifiers of the zoo: convolution in int8 and int4, served in every bit."""

import pytest

from examples import zoo
from examples.serving_the_zoo import assert_no_float_copy, assert_served_exactly

pytestmark = pytest.mark.slow

MODELS = ["digits_conv_int8", "digits_conv_int4"]


@pytest.mark.long
def test_served_exactly_without_a_float_copy(tmp_path):
    assert_served_exactly([zoo.MODELS[name] for name in MODELS], tmp_path)
    for name in MODELS:
        assert_no_float_copy(tmp_path / "repository" / name / "1", quantized=3)
