"""Classification against Python's own sorting."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aqt_protos import open_inference_pb2 as pb
from aqt_server.outputs import Wanted, encode

DTYPES = st.sampled_from(["float16", "float32", "float64", "int8", "uint32", "int64", "bool"])


@given(
    DTYPES.flatmap(
        lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=1, max_dims=3, max_side=4))
    ),
    st.integers(1, 20),
)
def test_classification_is_a_sort_by_value_and_then_index(array, classes):
    want = Wanted(name="y", classes=classes, window=None)
    request = pb.ModelInferRequest()
    request.inputs.add().contents.SetInParent()
    (tensor,) = encode(request, [want], {"y": array}).outputs
    rows = array.reshape(len(array), -1)
    count = min(classes, rows.shape[1])
    assert list(tensor.shape) == [len(rows), count]
    expected = []
    for row in rows:
        values = [-math.inf if np.isnan(v) else v.item() for v in row]
        expected += sorted(range(len(row)), key=lambda i: (-values[i], i))[:count]
    found = [value.split(b":") for value in tensor.contents.bytes_contents]
    assert [int(index) for _, index in found] == expected
    for place, (digits, index) in enumerate(found):
        value = rows[place // count, int(index)]
        # As an integer where it is one, since a float has not the digits of every int64.
        number = float(digits) if array.dtype.kind == "f" else int(digits)
        np.testing.assert_array_equal(np.array(number).astype(array.dtype), value)
