"""The prognosis of the zoo: many dtypes, branches, and one scalar per request, in every bit."""

import pytest

from aqt_engine import bundle
from examples.serving_the_zoo import assert_no_float_copy, assert_served_exactly
from examples.zoo import MODELS

pytestmark = pytest.mark.slow


def test_served_exactly_with_its_dtypes_and_its_scalar(tmp_path):
    assert_served_exactly([MODELS["patients_int8"]], tmp_path)
    path = tmp_path / "repository" / "patients_int8" / "1"
    assert_no_float_copy(path, quantized=5, floats=["decades/embedding"])
    manifest = bundle.read_manifest(path)
    assert manifest.per_request == ("threshold",)
    assert {spec.name: spec.dtype for spec in manifest.inputs} == {
        "age": "int32",
        "measured": "bfloat16",
        "sex": "bool",
        "threshold": "float32",
    }
    assert {spec.name: spec.dtype for spec in manifest.outputs} == {
        "above": "bool",
        "chances": "float32",
        "progression": "bfloat16",
        "quartile": "int32",
    }
