"""A picture, or a text, as the only input of a model that takes pixels, or bytes.

Nothing is guessed: a picture has the model's size already, and no mean is taken from it.
"""

from pathlib import Path
from typing import Any

import numpy as np

from aqt_client._results import ModelMetadata, TensorMetadata
from aqt_protos import tensors

Array = np.ndarray[Any, Any]
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


def read_picture(file: Path, model: ModelMetadata) -> dict[str, Array]:
    """One row of pixels: gray or RGB, channels last or first, as the input's shape has it.

    They are 0 to 255 for UINT8, and 0 to 1 for floats.

    Raises:
      ValueError: the model does not take a picture, or one of another size; the file is none, or
        damaged; or Pillow is missing.
      OSError: the file cannot be read.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("pictures need Pillow: pip install 'aqt-client[pictures]'") from error
    spec = _only_input(file, model)
    row = spec.shape[1:]
    channels = 1
    last = len(row) == 2 or (len(row) == 3 and row[2] in (1, 3))
    if len(row) == 3:
        channels = row[2] if last else row[0]
    datatype = tensors.datatype(spec.datatype)
    floats = datatype.name in ("FP16", "FP32", "FP64", "BF16")
    if len(row) not in (2, 3) or channels not in (1, 3) or not (floats or datatype.name == "UINT8"):
        raise ValueError(
            f"{file} is a picture, and input {spec.name!r} of model {model.name!r} is "
            f"{spec.datatype}{list(spec.shape)}, not rows of pixels: save what it takes as .npy"
        )
    with file.open("rb") as stream:
        try:
            picture = Image.open(stream)
            picture.load()
        except Exception as error:  # of decoders: whatever damage leads to, or its size
            raise ValueError(f"{file} cannot be read as a picture: {error}") from error
    if picture.mode not in _OF_8_BITS:
        raise ValueError(
            f"{file} has pixels of mode {picture.mode}, and only those of 8 bits are read: "
            f"save it so, or what the model takes as .npy"
        )
    pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    size = row[:2] if last else row[1:]
    if any(wanted not in (-1, found) for wanted, found in zip(size, pixels.shape[:2], strict=True)):
        height, width = ("any" if n == -1 else n for n in size)
        raise ValueError(
            f"{file} is {pixels.shape[1]} wide and {pixels.shape[0]} high, and model "
            f"{model.name!r} takes {width} by {height}: resize it as for training"
        )
    if len(row) == 3 and channels == 1:
        pixels = pixels[..., None]
    if not last:
        pixels = pixels.transpose(2, 0, 1)
    values = pixels[None]
    return {
        spec.name: (values / np.float64(255)).astype(datatype.dtype) if floats else values.copy()
    }


def read_text(file: Path, model: ModelMetadata) -> dict[str, Array]:
    """A row for each line: the line itself for BYTES, and its bytes for UINT8.

    Raises:
      ValueError: the model takes neither, or lines that are to be bytes are of several lengths.
      OSError: the file cannot be read.
    """
    spec = _only_input(file, model)
    lines = file.read_bytes().splitlines()
    rank = len(spec.shape)
    if spec.datatype == "BYTES" and all(n in (-1, 1) for n in spec.shape[1:]):
        return {spec.name: np.array(lines, object).reshape(-1, *[1] * (rank - 1))}
    if spec.datatype != "UINT8" or rank != 2:
        raise ValueError(
            f"{file} is text, and input {spec.name!r} of model {model.name!r} is "
            f"{spec.datatype}{list(spec.shape)}, not lines or their bytes: tokenize it as for "
            f"training, and save that as .npy"
        )
    lengths = {len(line) for line in lines}
    if len(lengths) != 1 or spec.shape[1] not in (-1, *lengths):
        raise ValueError(
            f"the lines of {file} have {', '.join(map(str, sorted(lengths))) or 'no'} bytes, and "
            f"model {model.name!r} takes rows of one length"
            f"{'' if spec.shape[1] == -1 else f', {spec.shape[1]}'}: send one line at a time, or "
            f"pad them as for training"
        )
    return {spec.name: np.array([list(line) for line in lines], np.uint8)}


def _only_input(file: Path, model: ModelMetadata) -> TensorMetadata:
    if len(model.inputs) != 1:
        raise ValueError(
            f"{file} is one input without a name, and model {model.name!r} takes "
            f"{len(model.inputs)}: save them by name with numpy.savez"
        )
    return model.inputs[0]
