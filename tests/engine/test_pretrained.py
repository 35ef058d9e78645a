"""Weights are read from safetensors files, and each tensor is accounted for."""

import json
import re
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from aqt_engine.pretrained import PretrainedError, TensorRule, is_safetensors, load, tensors
from engine.contractions import assert_same_bits

RNG = np.random.default_rng(0)
TENSORS = {
    "layers.0.fc.weight": RNG.normal(size=(3, 5)).astype(np.float32),
    "layers.0.fc.bias": RNG.normal(size=3).astype(np.float16),
    "conv.weight": RNG.normal(size=(4, 2, 3, 3)).astype(np.float32),
    "position_ids": np.arange(5, dtype=np.int64),
}
RULES = (
    TensorRule(r"layers\.(\d+)\.fc\.weight", r"params/layer_\1/kernel", axes=(1, 0)),
    TensorRule(r"layers\.(\d+)\.fc\.bias", r"params/layer_\1/bias"),
    TensorRule(r"conv\.weight", "params/conv/kernel", axes=(2, 3, 1, 0)),
    TensorRule(r".*position_ids", None),
)
F32 = np.float32


def shapes(**changed):
    params = {
        "layer_0": {"kernel": ((5, 3), F32), "bias": ((3,), F32)},
        "conv": {"kernel": ((3, 3, 2, 4), F32)},
    }
    params.update(changed)
    is_spec = lambda x: isinstance(x, tuple)  # noqa: E731
    return {"params": jax.tree.map(lambda s: jax.ShapeDtypeStruct(*s), params, is_leaf=is_spec)}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_tensors_are_placed_turned_and_widened(file):
    variables = load(file, RULES, shapes())["params"]
    assert_same_bits(variables["layer_0"]["kernel"], TENSORS["layers.0.fc.weight"].T)
    assert_same_bits(variables["layer_0"]["bias"], TENSORS["layers.0.fc.bias"].astype(F32))
    kernel = TENSORS["conv.weight"].transpose(2, 3, 1, 0)
    assert_same_bits(variables["conv"]["kernel"], kernel)
    # What is not widened is read from the file, and not before it is looked at.
    assert isinstance(variables["conv"]["kernel"], np.memmap)


def test_without_a_table_names_are_places(file):
    variables = load(file)
    assert_same_bits(variables["layers"]["0"]["fc"]["bias"], TENSORS["layers.0.fc.bias"])


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint16", "bool"],
)
def test_any_dtype(tmp_path, dtype):
    array = np.asarray(RNG.normal(size=(2, 3)) * 9).astype(np.dtype(dtype))
    codes = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bfloat16": "BF16"}
    code = codes.get(dtype, {"b": "BOOL"}.get(array.dtype.kind))
    code = code or f"{array.dtype.kind.upper()}{8 * array.dtype.itemsize}"
    write(tmp_path, {"x": [code, array.shape, array.tobytes()]})
    found = tensors(tmp_path)["x"]
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()
    if dtype == "bfloat16":
        expected = {"x": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
        assert_same_bits(load(tmp_path, None, expected)["x"], array.astype(F32))


def write(folder, described, name="model.safetensors", pad=0):
    header, data = {}, b""
    for tensor, (code, shape, content) in described.items():
        offsets = [len(data), len(data) + len(content)]
        header[tensor] = {"dtype": code, "shape": list(shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode() + b" " * pad
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder / name


def test_several_files_with_an_index(tmp_path):
    names = list(TENSORS)
    for i, part in enumerate((names[:2], names[2:])):
        save_file({n: TENSORS[n] for n in part}, tmp_path / f"part-{i}.safetensors")
    index = {n: f"part-{int(i > 1)}.safetensors" for i, n in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert is_safetensors(tmp_path)
    assert load(tmp_path, RULES, shapes()).keys() == {"params"}
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(PretrainedError, match=r"part-1.safetensors is not there: give all files"):
        load(tmp_path, RULES)


@pytest.mark.parametrize(
    ("rules", "expected", "messages"),
    [
        (RULES[:2], None, ["conv.weight has no rule", "position_ids has no rule"]),
        (
            (*RULES, TensorRule(r"head\.weight", "params/head/kernel")),
            None,
            [r"no tensor is named head\.weight"],
        ),
        (
            (TensorRule(r"layers\.0\.fc\..*", "params/x"), *RULES[2:]),
            None,
            ["layers.0.fc.bias and layers.0.fc.weight are both for params/x"],
        ),
        (
            (TensorRule(r".*bias", "params/x", (1, 0)), *RULES),
            None,
            ["layers.0.fc.bias has 1 axes, and its rule orders (1, 0)"],
        ),
        (
            RULES,
            shapes(head={"kernel": ((3, 2), F32)}, conv={}),
            ["nothing is for params/head/kernel", "the model has no params/conv/kernel"],
        ),
        (
            RULES,
            shapes(
                conv={"kernel": ((3, 3, 4, 2), F32)},
                layer_0={"kernel": ((5, 3), ml_dtypes.bfloat16), "bias": ((3,), F32)},
            ),
            [
                "params/conv/kernel is [3, 3, 4, 2], and its tensor [3, 3, 2, 4]",
                "params/layer_0/kernel is bfloat16, and its tensor float32",
            ],
        ),
    ],
)
def test_each_tensor_and_each_variable_is_accounted_for(file, rules, expected, messages):
    with pytest.raises(PretrainedError) as caught:
        load(file, rules, expected)
    assert all(message in str(caught.value) for message in messages), str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no whole safetensors file"),
        (b"\xff" * 20, "a header of 18446744073709551615 bytes"),
        (struct.pack("<Q", 2) + b"[]", "no whole safetensors file"),
        (struct.pack("<Q", 2) + b'{"', "no whole safetensors file"),
    ],
)
def test_what_is_no_such_file_is_one_sentence(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(PretrainedError, match=message):
        tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (["F4", (2,), b"\0"], "a tensor of F4, which is not known"),
        (["F32", (3,), b"\0" * 8], "a tensor float32[3] in bytes 0 to 8"),
        (["F32", (-1, -2), b"\0" * 8], "negative"),
    ],
)
def test_a_tensor_that_does_not_fit_its_bytes_is_refused(tmp_path, described, message):
    with pytest.raises(PretrainedError, match=re.escape(message)):
        tensors(write(tmp_path, {"x": described}))


def test_a_file_that_is_cut_short_is_refused(file):
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(PretrainedError, match="no whole safetensors file"):
        tensors(file)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    assert not is_safetensors(tmp_path)
    with pytest.raises(PretrainedError, match="give one, its index, or the directory of either"):
        tensors(tmp_path)
