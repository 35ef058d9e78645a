"""Tensors on the wire: the table of datatypes, raw contents and typed contents."""

import struct

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from tritonclient import utils as stock

from aqt_protos import open_inference_pb2 as pb
from aqt_protos import tensors

FIXED = sorted(set(tensors.DATATYPES) - {"BYTES"})
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def test_the_table_is_complete():
    described = {"BOOL", "FP16", "FP32", "FP64", "BF16", "BYTES"} | {
        f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)
    }
    assert tensors.DATATYPES.keys() == described
    fields = {d.contents for d in tensors.DATATYPES.values()} - {None}
    assert fields == set(pb.InferTensorContents.DESCRIPTOR.fields_by_name)
    assert [d.name for d in tensors.DATATYPES.values() if d.contents is None] == ["FP16", "BF16"]


@pytest.mark.parametrize("name", FIXED)
def test_the_stock_client_has_the_same_datatypes(name):
    dtype = tensors.datatype(name).dtype
    assert stock.np_to_triton_dtype(dtype) == name
    assert tensors.datatype_of(dtype).name == name


@st.composite
def fixed_width(draw):
    datatype = tensors.datatype(draw(st.sampled_from(FIXED)))
    shape = draw(SHAPES)
    nbytes = int(np.prod(shape, dtype=int)) * datatype.dtype.itemsize
    raw = draw(st.binary(min_size=nbytes, max_size=nbytes))
    if datatype.name == "BOOL":
        raw = bytes(b & 1 for b in raw)
    return raw, datatype, shape


@hypothesis.given(fixed_width())
def test_raw_contents_come_back_in_every_bit(case):
    raw, datatype, shape = case
    array = tensors.from_raw(raw, datatype, shape)
    assert (array.dtype, array.shape) == (datatype.dtype, shape)
    assert tensors.datatype_of(array.dtype) == datatype
    assert tensors.to_raw(array) == raw


@hypothesis.given(fixed_width(), st.integers(-3, 3).filter(bool))
def test_a_wrong_number_of_bytes_is_refused(case, change):
    raw, datatype, shape = case
    wrong = raw[:change] if change < 0 else raw + b"\0" * change
    hypothesis.assume(len(wrong) != len(raw))
    with pytest.raises(ValueError, match=rf"takes {len(raw)} raw bytes, got {len(wrong)}"):
        tensors.from_raw(wrong, datatype, shape)


def test_raw_contents_are_little_endian_and_in_c_order():
    array = np.array([[1, 2], [3, 4]], ">u2").T
    assert tensors.to_raw(array) == struct.pack("<4H", 1, 3, 2, 4)
    found = tensors.from_raw(struct.pack("<2f", 1.5, -0.0), tensors.datatype("FP32"), [2])
    assert found.tolist() == [1.5, -0.0]


def test_raw_booleans_are_0_or_1():
    with pytest.raises(ValueError, match="raw BOOL contents hold a byte other than 0 and 1"):
        tensors.from_raw(b"\1\2", tensors.datatype("BOOL"), [2])


@pytest.mark.parametrize("name", ["FP32", "BYTES"])
def test_a_negative_dimension_is_refused(name):
    with pytest.raises(ValueError, match=r"shape \[-1, -1\] has a negative dimension"):
        tensors.from_raw(b"\0" * 4, tensors.datatype(name), [-1, -1])


def test_a_shape_that_overflows_is_only_a_wrong_size():
    with pytest.raises(ValueError, match=f"takes {2**66} raw bytes, got 0"):
        tensors.from_raw(b"", tensors.datatype("FP32"), [2**32, 2**32])


@pytest.mark.parametrize("name", ["FP8", "", "fp32", "STRING"])
def test_an_unknown_datatype_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is not a datatype .* BOOL, .*BYTES"):
        tensors.datatype(name)


@pytest.mark.parametrize(
    "dtype", [np.complex64, "M8[s]", ml_dtypes.float8_e4m3fn, ml_dtypes.int4, "V2", "f4,i4"]
)
def test_an_unknown_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=r"has no datatype in the protocol: .*float32.*bytes"):
        tensors.to_raw(np.zeros(1, dtype))


ELEMENTS = hnp.arrays(object, SHAPES, elements=st.binary(max_size=9))


@hypothesis.given(ELEMENTS)
def test_bytes_come_back(array):
    raw = tensors.to_raw(array)
    assert raw == b"".join(struct.pack("<I", len(e)) + e for e in array.ravel().tolist())
    found = tensors.from_raw(raw, tensors.datatype("BYTES"), array.shape)
    assert (found.dtype, found.shape) == (object, array.shape)
    assert found.tolist() == array.tolist()


@hypothesis.given(hnp.arrays(object, st.integers(1, 5), elements=st.binary(max_size=9)))
def test_bytes_are_what_the_stock_client_sends(array):
    assert tensors.to_raw(array) == stock.serialize_byte_tensor(array).item()
    found = stock.deserialize_bytes_tensor(tensors.to_raw(array))
    assert found.tolist() == array.tolist()


@hypothesis.given(st.lists(st.binary(max_size=9)), st.data())
def test_every_damage_to_raw_bytes_is_found_or_changes_no_length(elements, data):
    raw = tensors.encode_bytes(elements)
    cut = data.draw(st.integers(0, len(raw)))
    added = data.draw(st.binary(max_size=9))
    damaged = raw[:cut] + added
    try:
        found = tensors.decode_bytes(damaged, len(elements))
    except ValueError:
        assert damaged != raw
    else:  # whatever is accepted is all of the bytes, and nothing else
        assert tensors.encode_bytes(found) == damaged
        assert len(found) == len(elements)


@pytest.mark.parametrize(
    ("raw", "count", "message"),
    [
        (b"\1\0\0\0a\2\0", 2, "end in the length of element 1: it takes 4 bytes, got 2"),
        (b"\5\0\0\0abc", 1, "end in element 0: its length says 5 bytes, got 3"),
        (b"\xff\xff\xff\xff", 1, "end in element 0: its length says 4294967295 bytes, got 0"),
        (b"\1\0\0\0a", 2, "hold 1 elements, the shape says 2"),
        (b"", 1, "hold 0 elements, the shape says 1"),
        (b"\1\0\0\0abc", 1, "go on for 2 bytes after the 1 elements of the shape"),
        (b"\0", 0, "go on for 1 bytes after the 0 elements of the shape"),
    ],
)
def test_raw_bytes_are_checked_to_the_end(raw, count, message):
    with pytest.raises(ValueError, match=message):
        tensors.decode_bytes(raw, count)


def test_text_goes_as_utf_8():
    expected = b"\2\0\0\0\xc3\xa9\1\0\0\0b"
    for array in (np.array(["é", "b"]), np.array(["é", b"b"], object)):
        assert tensors.to_raw(array) == expected


@pytest.mark.parametrize("element", [1, None, 2.5, ["a"]])
def test_other_objects_are_not_bytes(element):
    with pytest.raises(ValueError, match=r"element 1 of a BYTES tensor is a \w+: each must be"):
        tensors.encode_bytes([b"a", element])


@st.composite
def typed(draw):
    datatype = tensors.datatype(
        draw(st.sampled_from(sorted(set(tensors.DATATYPES) - {"FP16", "BF16"})))
    )
    shape = draw(SHAPES)
    if datatype.name == "BYTES":
        return datatype, draw(hnp.arrays(object, shape, elements=st.binary(max_size=5)))
    return datatype, draw(hnp.arrays(datatype.dtype, shape))


@hypothesis.given(typed())
def test_typed_contents_are_read(case):
    datatype, array = case
    contents = pb.InferTensorContents(**{datatype.contents: array.ravel().tolist()})
    found = tensors.from_contents(contents, datatype, array.shape)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    ("contents", "name", "shape", "message"),
    [
        ({}, "FP16", [0], "FP16 has no field in `contents`: send it as raw contents"),
        ({}, "BF16", [0], "BF16 has no field"),
        ({"fp64_contents": [1]}, "FP32", [1], "stand in `fp32_contents`, but `fp64_contents` is"),
        (
            {"fp32_contents": [1], "int_contents": [1]},
            "FP32",
            [1],
            "stand in `fp32_contents`, but `int_contents` is filled",
        ),
        ({"fp32_contents": [1]}, "FP32", [2], r"\[2\] has 2 elements, got 1 in `fp32_contents`"),
        ({"bytes_contents": [b"a"]}, "BYTES", [], None),
        ({"bytes_contents": [b"a"]}, "BYTES", [2], "has 2 elements, got 1"),
        ({"int_contents": [128]}, "INT8", [1], "has an element outside of INT8"),
        ({"int_contents": [-32769]}, "INT16", [1], "has an element outside of INT16"),
        ({"uint_contents": [256]}, "UINT8", [1], "has an element outside of UINT8"),
        ({"uint_contents": [65536]}, "UINT16", [1], "has an element outside of UINT16"),
        ({"int_contents": [1]}, "INT32", [-1], "has a negative dimension"),
    ],
)
def test_typed_contents_are_checked(contents, name, shape, message):
    contents, datatype = pb.InferTensorContents(**contents), tensors.datatype(name)
    if message is None:
        assert tensors.from_contents(contents, datatype, shape).tolist() == b"a"
        return
    with pytest.raises(ValueError, match=message):
        tensors.from_contents(contents, datatype, shape)
