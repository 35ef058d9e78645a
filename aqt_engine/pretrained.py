"""Pretrained weights from safetensors files, by a table from their tensors to a model's variables.

A file is a header in JSON, and the bytes of its tensors behind it. It is mapped: a tensor is read
when its bytes are, and no earlier. A large model is several files, with an index of them. No tensor
is passed over in silence: one that no rule of the table names, and a variable of the model that no
tensor is for, is an error.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

Array = np.ndarray[Any, Any]

_SUFFIX = ".safetensors"
_INDEX = "model.safetensors.index.json"
_MOST_HEADER_BYTES = 100_000_000
_SHOWN = 10
_DTYPES: Mapping[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


class PretrainedError(ValueError):
    """A file is no safetensors file, or does not hold the weights of a model; the message lists."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRule:
    r"""Where the tensors whose whole name `tensor`, a regular expression, matches belong.

    `place` is the path in the variables, in which `\1` stands for the first group; None leaves such
    tensors out. `axes` is the order of the tensor's axes there: `(1, 0)` for a matrix of PyTorch's
    `Linear`, `(2, 3, 1, 0)` for the kernel of a `Conv2d`.

        TensorRule(r"layers\.(\d+)\.fc\.weight", r"params/layer_\1/fc/kernel", axes=(1, 0))
    """

    tensor: str
    place: str | None
    axes: tuple[int, ...] | None = None


def is_safetensors(path: Path) -> bool:
    """Whether `path` is such a file, the index of several, or a directory with one of the two."""
    return _files(path) is not None


def load(
    path: Path, rules: Sequence[TensorRule] | None = None, expected: Any = None
) -> dict[str, Any]:
    """The variables in the file, index or directory `path`: nested dicts of arrays.

    Args:
      path: `model.safetensors`, `model.safetensors.index.json`, or a directory with one of them.
      rules: the first that matches a tensor says where it belongs. Without, a tensor is named as
        its place is, with dots: "Dense_0.kernel".
      expected: the model's variables, as arrays or `jax.ShapeDtypeStruct`, in the same nested
        dicts. Then every variable has to be there, in its shape; a narrower dtype is widened
        where that loses nothing, as float16 and bfloat16 to float32.

    Raises:
      PretrainedError: a file cannot be read as one; a tensor has no rule, or a rule no tensor; two
        tensors have one place; or they are not those of `expected`. All of them are listed.
    """
    problems: list[str] = []
    placed: dict[str, tuple[str, Array]] = {}
    unused = set() if rules is None else {r for r in rules if r.place is not None}
    for name, tensor in tensors(path).items():
        rule = _rule(name, rules)
        if rule is None:
            problems.append(f"{name} has no rule")
            continue
        unused.discard(rule)
        if rule.place is None:
            continue
        place = re.sub(rule.tensor, rule.place, name, count=1)
        if place in placed:
            problems.append(f"{name} and {placed[place][0]} are both for {place}")
        if rule.axes is not None and sorted(rule.axes) != list(range(tensor.ndim)):
            problems.append(f"{name} has {tensor.ndim} axes, and its rule orders {rule.axes}")
            continue
        placed[place] = name, tensor if rule.axes is None else tensor.transpose(rule.axes)
    problems += [f"no tensor is named {rule.tensor}" for rule in rules or () if rule in unused]
    found = {place: tensor for place, (_, tensor) in placed.items()}
    if expected is not None and not problems:
        found = _fitted(found, expected, problems)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise PretrainedError(
            f"{path} does not hold the weights of the model: {'; '.join(problems[:_SHOWN])}{more}. "
            f"Give the weights of this architecture, or correct its table of `TensorRule`s"
        )
    return traverse_util.unflatten_dict(found, sep="/")


def tensors(path: Path) -> dict[str, Array]:
    """The tensors in the file, index or directory `path` by name, mapped.

    Raises:
      PretrainedError: there is none, or a file is not in the form.
    """
    files = _files(path)
    if files is None:
        raise PretrainedError(
            f"{path} is no safetensors file: give one, its index, or the directory of either"
        )
    found: dict[str, Array] = {}
    for file in files:
        for name, tensor in _mapped(file).items():
            if name in found:
                raise PretrainedError(f"{name} is in two files of {path}: give one of them")
            found[name] = tensor
    return found


def _rule(name: str, rules: Sequence[TensorRule] | None) -> TensorRule | None:
    if rules is None:
        return TensorRule(re.escape(name), name.replace(".", "/").replace("\\", r"\\"))
    return next((rule for rule in rules if re.fullmatch(rule.tensor, name)), None)


def _fitted(found: Mapping[str, Array], expected: Any, problems: list[str]) -> dict[str, Array]:
    """The arrays in the shapes and dtypes of `expected`; what prevents it goes to `problems`."""
    wanted = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(expected)[0]
    }
    problems += [f"nothing is for {place}" for place in wanted if place not in found]
    problems += [f"the model has no {place}" for place in found if place not in wanted]
    fitted: dict[str, Array] = {}
    for place in wanted.keys() & found.keys():
        own, tensor = wanted[place], found[place]
        if tuple(own.shape) != tensor.shape:
            problems.append(f"{place} is {list(own.shape)}, and its tensor {list(tensor.shape)}")
        elif not np.can_cast(tensor.dtype, own.dtype):
            problems.append(f"{place} is {own.dtype}, and its tensor {tensor.dtype}")
        else:
            fitted[place] = tensor.astype(own.dtype, copy=False)
    problems.sort()
    return fitted


def _files(path: Path) -> list[Path] | None:
    if path.is_dir():
        inside = (path / f"model{_SUFFIX}", path / _INDEX)
        path = next((file for file in inside if file.exists()), path)
    if path.name.endswith(f"{_SUFFIX}.index.json"):
        try:
            names = set(json.loads(path.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise PretrainedError(f"{path} is no index of safetensors files: {error!r}") from error
        # Beside it, and nowhere else.
        return [path.parent / Path(name).name for name in sorted(names)]
    return [path] if path.suffix == _SUFFIX and not path.is_dir() else None


def _mapped(file: Path) -> dict[str, Array]:
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > _MOST_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(stream.read(size))
        start, end = 8 + size, file.stat().st_size
        data: Array = np.empty(0, np.uint8)
        if end > start:
            data = np.memmap(file, np.uint8, "r", start, (end - start,))
        header.pop("__metadata__", None)
        return {name: _tensor(data, described) for name, described in header.items()}
    except FileNotFoundError as error:
        raise PretrainedError(f"{file} is not there: give all files of the model") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(
            f"{file} is no whole safetensors file ({error}): write or fetch it again"
        ) from error


def _tensor(data: Array, described: Mapping[str, Any]) -> Array:
    if described["dtype"] not in _DTYPES:
        raise ValueError(f"a tensor of {described['dtype']}, which is not known")
    dtype = np.dtype(_DTYPES[described["dtype"]])
    shape = tuple(described["shape"])
    if any(size < 0 for size in shape):
        raise ValueError(f"a tensor with negative sizes {list(shape)}")
    first, last = described["data_offsets"]
    if not 0 <= first <= last <= len(data) or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor {dtype}{list(shape)} in bytes {first} to {last}")
    return data[first:last].view(dtype).reshape(shape)
