"""Pictures and texts as inputs."""

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from aqt_client import ModelMetadata, TensorMetadata, files

GRAY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 11
COLOR = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def model(datatype, *shape, more=()):
    inputs = [TensorMetadata(name="x", datatype=datatype, shape=(-1, *shape))]
    inputs += [TensorMetadata(name=name, datatype="FP32", shape=(-1,)) for name in more]
    return ModelMetadata(name="m", versions=("1",), platform="", inputs=tuple(inputs), outputs=())


@pytest.fixture
def gray(tmp_path):
    Image.fromarray(GRAY).save(tmp_path / "gray.PNG")
    return tmp_path / "gray.PNG"


@pytest.fixture
def color(tmp_path):
    Image.fromarray(COLOR).save(tmp_path / "color.png")
    return tmp_path / "color.png"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 6), GRAY),
        ((-1, -1), GRAY),
        ((4, 6, 1), GRAY[..., None]),
        ((1, 4, 6), GRAY[None]),
        ((4, 6, 3), np.stack([GRAY] * 3, -1)),
    ],
)
def test_pixels_are_as_the_shape_of_the_input_says(gray, shape, expected):
    (found,) = files.read_inputs(gray, model("UINT8", *shape)).values()
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected[None])


def test_colors_come_last_or_first(color):
    (last,) = files.read_inputs(color, model("UINT8", 4, 6, 3)).values()
    (first,) = files.read_inputs(color, model("UINT8", 3, 4, 6)).values()
    np.testing.assert_array_equal(last, COLOR[None])
    np.testing.assert_array_equal(first, COLOR.transpose(2, 0, 1)[None])


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [("FP32", np.float32), ("FP16", np.float16), ("BF16", ml_dtypes.bfloat16)],
)
def test_floats_are_of_0_to_1_and_the_nearest(gray, datatype, dtype):
    (found,) = files.read_inputs(gray, model(datatype, 4, 6)).values()
    assert found.dtype == dtype
    assert (found == (GRAY[None] / 255.0).astype(dtype)).all()
    assert (found.min(), float(found.max()) <= 1) == (0, True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (model("UINT8", 8, 8), "is 6 wide and 4 high, and model 'm' takes 8 by 8: resize"),
        (model("UINT8", 4, 5), "takes 5 by 4"),
        (model("UINT8", 24), r"is UINT8\[-1, 24\], not rows of pixels"),
        (model("INT32", 4, 6), "not rows of pixels"),
        (model("UINT8", 2, 4, 6), "not rows of pixels"),
        (model("UINT8", 4, 6, more=("y",)), "takes 2: save them by name"),
    ],
)
def test_a_picture_that_the_model_does_not_take_is_told_of(gray, given, said):
    with pytest.raises(ValueError, match=said):
        files.read_inputs(gray, given)


def test_pixels_of_16_bits_are_not_cut_to_8(tmp_path):
    Image.fromarray(np.full((4, 6), 60_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="has pixels of mode I;16"):
        files.read_inputs(tmp_path / "deep.png", model("FP32", 4, 6))


@pytest.mark.parametrize("damage", [b"none", 40, 60, b"IDAT"])
def test_what_is_no_picture_or_damaged_is_told_of(gray, damage):
    whole = gray.read_bytes()
    if isinstance(damage, int):
        gray.write_bytes(whole[:damage])
    else:
        gray.write_bytes(damage if damage == b"none" else whole.replace(damage, b"B/\x15\xc0"))
    with pytest.raises(ValueError, match=r"gray\.PNG cannot be read as a picture: "):
        files.read_inputs(gray, model("UINT8", 4, 6))


def test_a_picture_that_would_fill_the_memory_is_not_unpacked(gray, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"gray\.PNG cannot be read as a picture: .*bomb"):
        files.read_inputs(gray, model("UINT8", 4, 6))


def test_a_picture_that_is_not_there_is_told_of(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.png"):
        files.read_inputs(tmp_path / "x.png", model("UINT8", 4, 6))


@pytest.mark.parametrize("shape", [(), (1,), (-1,)])
def test_lines_are_elements_of_bytes(tmp_path, shape):
    (tmp_path / "x.txt").write_text("über\n\nab\n", encoding="utf-8")
    (found,) = files.read_inputs(tmp_path / "x.txt", model("BYTES", *shape)).values()
    assert found.shape == (3, *[1] * len(shape))
    assert found.ravel().tolist() == ["über".encode(), b"", b"ab"]


def test_lines_are_rows_of_their_bytes(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"abc\r\nxyz")
    for length in (-1, 3):
        (found,) = files.read_inputs(tmp_path / "x.txt", model("UINT8", length)).values()
        assert found.dtype == np.uint8
        assert found.tolist() == [[97, 98, 99], [120, 121, 122]]


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("a\nbc", model("UINT8", -1), "have 1, 2 bytes, and model 'm' takes rows of one length:"),
        ("ab", model("UINT8", 3), "takes rows of one length, 3"),
        ("", model("UINT8", -1), "have no bytes"),
        ("ab", model("INT32", -1), "not lines or their bytes: tokenize it"),
        ("ab", model("BYTES", 2), "not lines or their bytes"),
    ],
)
def test_a_text_that_the_model_does_not_take_is_told_of(tmp_path, text, given, said):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        files.read_inputs(tmp_path / "x.txt", given)
