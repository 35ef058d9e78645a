"""Inputs from files by a model's signature, and outputs to files."""

import io
import json

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from aqt_client import InferResult, ModelMetadata, TensorMetadata, files

BF16 = ml_dtypes.bfloat16


def model(**datatypes):
    inputs = tuple(
        TensorMetadata(name=name, datatype=datatype, shape=(-1,))
        for name, datatype in datatypes.items()
    )
    return ModelMetadata(name="m", versions=("1",), platform="", inputs=inputs, outputs=())


def result(**outputs):
    return InferResult(outputs=outputs, model_name="m", model_version="1", id="", parameters={})


@pytest.fixture
def save(tmp_path):
    def save(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        return tmp_path / "x.npz"

    return save


@pytest.fixture
def write(tmp_path):
    def write(document):
        (tmp_path / "x.json").write_text(document)
        return tmp_path / "x.json"

    return write


@pytest.mark.parametrize(
    ("datatype", "given", "dtype"),
    [
        ("FP32", np.array([0.5, -0.0, np.nan, np.inf], np.float64), np.float32),
        ("FP64", np.array([1.5], np.float16), np.float64),
        ("BF16", np.array([1.5, -0.0, np.nan, -np.inf, 2.0**100], np.float32), BF16),
        ("BF16", np.array([0.5], np.float16), BF16),
        ("INT32", np.array([-(2**31), 2**31 - 1], np.int64), np.int32),
        ("UINT64", np.array([0, 7], np.int8), np.uint64),
        ("INT8", np.array([127], np.uint64), np.int8),
        ("INT8", np.array([], np.int64), np.int8),
        ("BOOL", np.array([True]), np.bool_),
        ("FP32", np.array([0.1], np.float32), np.float32),
    ],
)
def test_arrays_are_converted_where_no_value_changes(save, datatype, given, dtype):
    found = files.read_inputs(save(x=given), model(x=datatype))["x"]
    assert found.dtype == dtype
    back = found.astype(given.dtype)
    np.testing.assert_array_equal(back, given)
    np.testing.assert_array_equal(np.signbit(back), np.signbit(given))


@pytest.mark.parametrize(
    ("datatype", "given", "message"),
    [
        ("FP32", np.array([0.1, 0.5]), "1 of 2 values are not the same in FP32"),
        ("FP32", np.array([1e300]), "1 of 1 values are not the same"),
        ("BF16", np.array([1.001, 257, 1], np.float32), "FP32 in the file, and 2 of 3 values"),
        ("INT8", np.array([128, -128, -129]), "2 of 3 values are not the same in INT8"),
        ("UINT64", np.array([-1, 1]), "1 of 2 values"),
        ("INT64", np.array([2**63], np.uint64), "1 of 1 values"),
        ("FP32", np.array([1]), "it is INT64 in the file, and the model takes FP32"),
        ("INT64", np.array([1.0]), "it is FP64 in the file, and the model takes INT64"),
        ("BOOL", np.array([1]), "it is INT64 in the file, and the model takes BOOL"),
        ("BYTES", np.array([1]), "it is INT64 in the file, and the model takes BYTES"),
        ("FP32", np.array(["1"]), "it is BYTES in the file, and the model takes FP32"),
        ("FP32", np.array([1j]), "dtype complex128 has no datatype"),
        ("FP8", np.array([1.0]), "'FP8' is not a datatype of the protocol"),
    ],
)
def test_arrays_that_would_change_are_refused(save, datatype, given, message):
    with pytest.raises(ValueError, match=message) as caught:
        files.read_inputs(save(x=given), model(x=datatype))
    assert str(caught.value).startswith("input 'x' of ")


@hypothesis.given(hnp.arrays(np.uint16, 5))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_bfloat16_goes_through_numpy_files_in_every_bit(tmp_path, bits):
    array = bits.view(BF16)
    np.savez(tmp_path / "raw.npz", x=array)
    found = files.read_inputs(tmp_path / "raw.npz", model(x="BF16"))["x"]
    assert (found.dtype, found.tobytes()) == (BF16, array.tobytes())
    files.write_outputs(tmp_path / "out.npz", {"x": array})
    with np.load(tmp_path / "out.npz") as stored:
        assert stored["x"].dtype == np.float32
    again = files.read_inputs(tmp_path / "out.npz", model(x="BF16"))["x"]
    found = again.view(np.uint16)
    # A conversion makes a signaling NaN a quiet one.
    both_nan = ((found & 0x7FFF) > 0x7F80) & ((bits & 0x7FFF) > 0x7F80)
    assert np.all((found == bits) | both_nan)


def test_npy_is_the_only_input(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(3))
    (found,) = files.read_inputs(tmp_path / "x.npy", model(ids="INT64")).items()
    assert (found[0], found[1].tolist()) == ("ids", [0, 1, 2])
    with pytest.raises(ValueError, match="one array without a name, and model 'm' takes 2"):
        files.read_inputs(tmp_path / "x.npy", model(a="INT64", b="INT64"))


@pytest.mark.parametrize(
    ("datatype", "text", "expected"),
    [
        ("FP32", "[[0.1, 2], [1e-9, 3]]", np.array([[0.1, 2], [1e-9, 3]], np.float32)),
        ("BF16", "[0.1, 3]", np.array([0.1, 3], BF16)),
        ("FP64", "[NaN, -Infinity]", np.array([np.nan, -np.inf])),
        ("INT8", "[-128, 127]", np.array([-128, 127], np.int8)),
        ("UINT64", "[18446744073709551615]", np.array([2**64 - 1], np.uint64)),
        ("BOOL", "[true, false]", np.array([True, False])),
        ("BYTES", '["é", ""]', np.array(["é", ""], object)),
        ("INT32", "[]", np.array([], np.int32)),
        ("FP16", "2.5", np.array(2.5, np.float16)),
    ],
)
def test_json_takes_the_model_s_datatype(write, datatype, text, expected):
    found = files.read_inputs(write(f'{{"x": {text}}}'), model(x=datatype))["x"]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tolist() == expected.tolist() or found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("datatype", "text", "message"),
    [
        ("INT32", "[1.5]", "its elements do not fit INT32"),
        ("INT8", "[300]", "300 out of bounds for int8"),
        ("UINT8", "[-1]", "out of bounds"),
        ("FP16", "[70000.0]", "an element is too large for FP16"),
        ("FP32", '["1"]', "its elements do not fit FP32"),
        ("FP32", "[true]", "its elements do not fit FP32"),
        ("FP32", "[null]", "its elements do not fit FP32"),
        ("FP32", "[[1], [1, 2]]", "inhomogeneous"),
        ("FP32", '{"a": 1}', "its elements do not fit FP32"),
        ("BOOL", "[1]", "its elements do not fit BOOL"),
    ],
)
def test_json_that_does_not_fit_is_refused(write, datatype, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        files.read_inputs(write(f'{{"x": {text}}}'), model(x=datatype))
    assert str(caught.value).startswith("input 'x' of ")


def _damaged_within():
    """An archive whose directory is whole, and whose compressed array is not."""
    archive = io.BytesIO()
    np.savez_compressed(archive, x=np.zeros(4))
    content = bytearray(archive.getvalue())
    data = content.index(b"x.npy") + 5
    data += int.from_bytes(content[28:30], "little")  # what follows the name
    content[data : data + 8] = b"\xff" * 8
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", b"", "is neither .npz, .npy, .json, .txt nor a picture"),
        ("x.json", b"{", "is not JSON"),
        ("x.json", b"\xff", "is not JSON"),
        ("x.json", b"[1]", "is not a JSON object"),
        ("x.npz", b"", "cannot be used"),
        ("x.npz", b"PK\x03\x04damaged", "cannot be used"),
        ("x.npy", b"\x93NUMPY", "cannot be used"),
        ("x.npy", b"\x80\x04K\x01.", "cannot be used"),
        ("x.npy", b"\x93NUMPY\x01\x00\x02\x00{\n", "cannot be used"),
        ("x.npz", _damaged_within(), "cannot be used"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        files.read_inputs(tmp_path / name, model(x="FP32"))
    assert str(tmp_path / name) in str(caught.value)


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([b"a"], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        files.read_inputs(tmp_path / "x.npy", model(x="BYTES"))


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "c"]])
def test_names_are_those_of_the_model(save, names):
    with pytest.raises(ValueError, match=r"model 'm' takes \['a', 'b'\]: give each of them"):
        files.read_inputs(save(**{n: np.zeros(1) for n in names}), model(a="FP64", b="FP64"))


def test_outputs_of_any_name_are_written(tmp_path):
    outputs = {
        "file": np.arange(4, dtype=np.int8).reshape(2, 2),
        "allow_pickle": np.array([b"ab", b""], object),
        "layer/0": np.array(2.5, np.float16),
    }
    files.write_outputs(tmp_path / "out.dat", outputs)
    with np.load(tmp_path / "out.dat") as found:
        assert {name: found[name].tolist() for name in found} == {
            name: array.tolist() for name, array in outputs.items()
        }
        assert found["layer/0"].dtype == np.float16


def test_a_zero_byte_at_an_end_is_not_dropped_in_silence(tmp_path):
    with pytest.raises(ValueError, match="output 'y' has an element that ends in a zero byte"):
        files.write_outputs(tmp_path / "y.npz", {"y": np.array([b"a\0"], object)})
    assert not (tmp_path / "y.npz").exists()


def test_a_document_is_plain_json():
    found = files.as_document(
        result(
            y=np.array([[0.1, np.nan], [np.inf, -np.inf]], np.float32),
            b=np.array([1.5], BF16),
            i=np.array(2**63, np.uint64),
            t=np.array([["é".encode()]], object),
        )
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "model": "m",
        "version": "1",
        "id": "",
        "exact": None,
        "outputs": {
            "y": {
                "datatype": "FP32",
                "shape": [2, 2],
                "data": [[float(np.float32(0.1)), "NaN"], ["Infinity", "-Infinity"]],
            },
            "b": {"datatype": "BF16", "shape": [1], "data": [1.5]},
            "i": {"datatype": "UINT64", "shape": [], "data": 2**63},
            "t": {"datatype": "BYTES", "shape": [1, 1], "data": [["é"]]},
        },
    }


def test_a_document_holds_text_only():
    with pytest.raises(ValueError, match="output 't' has an element that is not text"):
        files.as_document(result(t=np.array([b"\xff"], object)))


@hypothesis.given(st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_finite_outputs_go_through_json_in_every_bit(write, data):
    datatype, dtype = data.draw(
        st.sampled_from(
            [("FP32", np.float32), ("FP64", np.float64), ("FP16", np.float16), ("INT64", np.int64)]
        )
    )
    elements = None
    if datatype.startswith("FP"):
        elements = hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False)
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(), elements=elements))
    document = files.as_document(result(x=array))["outputs"]["x"]["data"]
    found = files.read_inputs(write(json.dumps({"x": document})), model(x=datatype))["x"]
    assert (found.dtype, found.shape, found.tobytes()) == (dtype, array.shape, array.tobytes())
