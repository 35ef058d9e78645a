"""A model's inputs from a file, and its outputs to one.

Inputs come from `.npz` (arrays by name), `.npy` (the only input) or `.json` (an object of nested
lists by name); from a picture, as one row of the only input; or from `.txt`, a row for each line.
Arrays are converted to the model's datatypes only where no value changes; JSON numbers are decimal
and take the nearest value of a float datatype. NumPy's files do not know bfloat16: two-byte values
without a type are read as what they are for a BF16 input, and BF16 outputs are written as float32,
which holds each of them.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from aqt_client._media import PICTURES, read_picture, read_text
from aqt_client._results import InferResult, ModelMetadata, TensorMetadata
from aqt_protos import tensors

Array = np.ndarray[Any, Any]


def read_inputs(path: str | os.PathLike[str], model: ModelMetadata) -> dict[str, Array]:
    """The inputs of `model` that the file holds, by name, in the model's datatypes.

    Raises:
      ValueError: the file is of no known kind or damaged, its names are not those of the model's
        inputs, or a value does not fit the input's datatype; it is a picture or a text, and the
        model takes none, or one of another size.
      OSError: the file cannot be read.
    """
    file = Path(path)
    if file.suffix.lower() in PICTURES:
        return read_picture(file, model)
    if file.suffix == ".txt":
        return read_text(file, model)
    if file.suffix == ".json":
        values, convert = _read_json(file), _from_json
    elif file.suffix in (".npz", ".npy"):
        values, convert = _read_numpy(file, model), _without_loss
    else:
        raise ValueError(
            f"{file} is neither .npz, .npy, .json, .txt nor a picture ({', '.join(PICTURES)}): "
            f"save the inputs as one of them"
        )
    known = {spec.name: spec for spec in model.inputs}
    if values.keys() != known.keys():
        raise ValueError(
            f"{file} has inputs {sorted(values)}, and model {model.name!r} takes {sorted(known)}: "
            f"give each of them under its name"
        )
    inputs: dict[str, Array] = {}
    for name, value in values.items():
        try:
            inputs[name] = convert(value, known[name])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"input {name!r} of {file}: {error}") from error
    return inputs


def write_outputs(path: str | os.PathLike[str], outputs: Mapping[str, Array]) -> None:
    """Writes the outputs as an `.npz` file.

    Raises:
      ValueError: a BYTES output has an element that ends in a zero byte, which NumPy would drop.
      OSError: the file cannot be written.
    """
    arrays = {name: _storable(name, array) for name, array in outputs.items()}
    # Not by np.savez, whose own arguments are names that an output could have.
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def as_document(result: InferResult) -> dict[str, Any]:
    """The result as JSON knows it.

    BYTES elements are text. JSON has no NaN and no infinities: they are "NaN", "Infinity" and
    "-Infinity", as in protobuf's JSON.

    Raises:
      ValueError: a BYTES element is not UTF-8.
    """
    return {
        "model": result.model_name,
        "version": result.model_version,
        "id": result.id,
        "exact": result.exact,
        "outputs": {
            name: {
                "datatype": tensors.datatype_of(array.dtype).name,
                "shape": list(array.shape),
                "data": _json_elements(name, array),
            }
            for name, array in result.outputs.items()
        },
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} is not a JSON object of nested lists by input name")
    return cast(dict[str, Any], document)


def _read_numpy(file: Path, model: ModelMetadata) -> dict[str, Array]:
    # Opened here, for np.load leaves a damaged file open.
    with file.open("rb") as stream:
        try:
            loaded = np.load(stream, allow_pickle=False)
            arrays = loaded if isinstance(loaded, np.ndarray) else dict(loaded)
        except Exception as error:  # of zipfile, zlib, tokenize: whatever damage leads to
            raise ValueError(f"{file} cannot be used: {error}") from error
    if not isinstance(arrays, np.ndarray):
        return arrays
    if len(model.inputs) != 1:
        raise ValueError(
            f"{file} cannot be used: it holds one array without a name, and model {model.name!r} "
            f"takes {len(model.inputs)}: save them by name with numpy.savez"
        )
    return {model.inputs[0].name: arrays}


def _without_loss(array: Array, spec: TensorMetadata) -> Array:
    """The same values in the datatype of `spec`."""
    wanted = tensors.datatype(spec.datatype)
    if wanted.name == "BF16" and array.dtype == np.dtype("V2"):
        return array.view(wanted.dtype)
    given = tensors.datatype_of(array.dtype)
    if given == wanted:
        return array
    if _is_integer(given) and _is_integer(wanted):
        bounds = np.iinfo(wanted.dtype)
        changed = (array < bounds.min) | (array > bounds.max)
        converted = array.astype(wanted.dtype)
    elif _is_float(given) and _is_float(wanted):
        with np.errstate(all="ignore"):
            converted = array.astype(wanted.dtype)
            back = converted.astype(array.dtype)
            changed = (back != array) & ~(np.isnan(back) & np.isnan(array))
    else:
        raise ValueError(f"it is {given.name} in the file, and the model takes {wanted.name}")
    if np.any(changed):
        raise ValueError(
            f"it is {given.name} in the file, and {np.count_nonzero(changed)} of {array.size} "
            f"values are not the same in {wanted.name}, which the model takes: round them first"
        )
    return converted


def _from_json(value: object, spec: TensorMetadata) -> Array:
    """Nested lists as an array in the datatype of `spec`."""
    wanted = tensors.datatype(spec.datatype)
    if wanted.name == "BYTES":
        return np.array(value, object)
    found = np.array(value)
    kinds = "iuf" if _is_float(wanted) else "iu" if _is_integer(wanted) else "b"
    if found.size and found.dtype.kind not in kinds:
        raise ValueError(f"its elements do not fit {wanted.name}, which the model takes")
    if not _is_float(wanted):
        return np.array(value, wanted.dtype)
    with np.errstate(over="ignore"):
        converted = found.astype(wanted.dtype)
    if np.any(np.isfinite(found) & ~np.isfinite(converted)):
        raise ValueError(f"an element is too large for {wanted.name}, which the model takes")
    return converted


def _is_float(datatype: tensors.Datatype) -> bool:
    return datatype.name in ("FP16", "FP32", "FP64", "BF16")


def _is_integer(datatype: tensors.Datatype) -> bool:
    return "INT" in datatype.name


def _storable(name: str, array: Array) -> Array:
    if array.dtype == tensors.DATATYPES["BF16"].dtype:
        return array.astype(np.float32)
    if array.dtype != object:
        return array
    stored = array.astype(bytes)
    if array.size and stored.tolist() != array.tolist():
        raise ValueError(
            f"output {name!r} has an element that ends in a zero byte, which an .npz file does not "
            f"keep: print it as JSON"
        )
    return stored


def _json_elements(name: str, array: Array) -> Any:
    if array.dtype == object:
        try:
            texts = [element.decode() for element in array.ravel().tolist()]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"output {name!r} has an element that is not text: write it to a file"
            ) from error
        return np.array(texts, object).reshape(array.shape).tolist()
    if not _is_float(tensors.datatype_of(array.dtype)):
        return array.tolist()
    with np.errstate(invalid="ignore"):  # a signaling NaN is no error here
        numbers = array.astype(np.float64)
    elements = numbers.astype(object)
    elements[np.isnan(numbers)] = "NaN"
    elements[np.isposinf(numbers)] = "Infinity"
    elements[np.isneginf(numbers)] = "-Infinity"
    return elements.tolist()
