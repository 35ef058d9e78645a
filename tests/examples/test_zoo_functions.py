"""Models of the zoo that are not linen: an nnx model by rules, and a search by a function."""

import pytest

from aqt_engine import bundle
from examples import zoo
from examples.serving_the_zoo import assert_no_float_copy, assert_served_exactly

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_served_exactly_without_a_float_copy(tmp_path):
    assert_served_exactly([zoo.MODELS["digits_nnx_int8"], zoo.MODELS["search_int8"]], tmp_path)
    repository = tmp_path / "repository"
    assert_no_float_copy(repository / "digits_nnx_int8" / "1", quantized=3)
    assert_no_float_copy(repository / "search_int8" / "1", quantized=1)
    (database,) = [
        w for w in bundle.read_manifest(repository / "search_int8" / "1").weights if w.bits == 8
    ]
    assert database.shape == (1347, 64)


def test_the_int8_search_finds_what_the_float_search_finds():
    search = zoo.MODELS["search_int8"]
    found = search.quality(search.training_forward(search.variables(False)))
    assert found["agreement at 5"] > 0.9
    assert found["accuracy of the nearest's digit"] > 0.95
    assert search.float_quality()["agreement at 5"] == 1
