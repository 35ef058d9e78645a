"""Configurations as JSON, and their fingerprints.

`to_json` writes a configuration as one canonical line: names sorted, fields at their default left
out, dtypes and choices by name. A default never changes within a format version, so a field that
is added later changes no file and no fingerprint. Where a field may hold one of several classes,
`type` says which; the classes are those listed here, and nothing is imported by a name.

    {"config":{"fwd":{"rhs":{"numerics":{"type":"IntNumerics","bits":8, ...}}}},"version":1}

Reading is strict: an unknown name, a missing or ill-typed value, and a configuration that
contradicts itself are errors that name the path to it.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar, Union

import numpy as np
import pydantic
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter

from aqt_engine import calibration, numerics, statistics
from aqt_engine.config.contraction import DotGeneral

VERSION = 1

_T = TypeVar("_T")

FAMILIES: Mapping[type, tuple[type, ...]] = {
    numerics.Numerics: (
        numerics.IntNumerics,
        numerics.FloatNumerics,
        numerics.Fp8Numerics,
    ),
    numerics.Noise: (numerics.Uniform, numerics.Centered),
    calibration.Calibration: (
        calibration.AbsMaxCalibration,
        calibration.AbsMeanCalibration,
        calibration.ConstantCalibration,
        calibration.PercentileCalibration,
        calibration.SnrCalibration,
        calibration.MseCalibration,
        calibration.MinMaxCalibration,
        statistics.MeanOfAbsMaxCalibration,
        statistics.WeightedStatsCalibration,
        statistics.DelayedScalingCalibration,
    ),
}
"""The classes that may stand where a field is declared as one of their base."""

_TAGGED = {numerics.NoNumerics, *(c for family in FAMILIES.values() for c in family)}
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class SerializationError(ValueError):
    """A value cannot be written as JSON, or JSON cannot be read; the message names the path."""


@dataclasses.dataclass(frozen=True, slots=True)
class Document(Generic[_T]):
    """The JSON of values declared as `hint`: an object with `version`, and the value as `key`."""

    key: str
    hint: Any

    def to_dict(self, value: _T) -> dict[str, Any]:
        """`value` in dicts, lists, strings and numbers.

        Raises:
          SerializationError: a part of it is of a class that is not listed, or is ill-typed.
        """
        written = {"version": VERSION, self.key: _written(value, self.key)}
        # Read back, so that what is written can be read, and 1 and 1.0 are written alike.
        return {"version": VERSION, self.key: _written(self.from_dict(written), self.key)}

    def to_json(self, value: _T) -> str:
        """`to_dict` as canonical JSON: one line, names sorted."""
        return json.dumps(
            self.to_dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False
        )

    def from_dict(self, document: Mapping[str, Any]) -> _T:
        """What `to_dict` was given.

        Raises:
          SerializationError: the document is of another version, or holds no such value.
        """
        try:
            text = json.dumps(document, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SerializationError(f"the document is no JSON: {error}") from error
        return self.from_json(text)

    def from_json(self, text: str | bytes) -> _T:
        """What `to_json` was given; raises as `from_dict`."""
        try:
            head = json.loads(text)
        except ValueError as error:
            raise SerializationError(f"the document is no JSON: {error}") from error
        if not isinstance(head, dict) or "version" not in head:
            raise SerializationError("the document has no `version`: give what `to_json` wrote")
        version = typing.cast(dict[str, Any], head)["version"]
        if version != VERSION or type(version) is not int:
            raise SerializationError(
                f"the document has format version {version!r}, and this release reads {VERSION}"
            )
        try:
            return getattr(_document(self.key, self.hint).validate_json(text), self.key)
        except pydantic.ValidationError as error:
            raise SerializationError(_explained(error)) from error


_CONFIG: Document[DotGeneral] = Document("config", DotGeneral)
to_dict = _CONFIG.to_dict
to_json = _CONFIG.to_json
from_dict = _CONFIG.from_dict
from_json = _CONFIG.from_json


def fingerprint(config: DotGeneral) -> str:
    """sha256 (hex) of the canonical JSON: equal for configurations of equal description."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def _written(value: Any, path: str) -> Any:
    """`value` as JSON has it; fields at their default are left out."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple | list):
        items = typing.cast(Sequence[Any], value)
        return [_written(item, f"{path}.{i}") for i, item in enumerate(items)]
    if not dataclasses.is_dataclass(value):
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise SerializationError(
            f"`{path}` is a {type(value).__name__}, which JSON does not hold: give plain values"
        )
    cls = type(value)
    bases = [base for base in FAMILIES if isinstance(value, base)]
    if bases and cls not in _TAGGED:
        names = ", ".join(c.__name__ for c in FAMILIES[bases[0]])
        raise SerializationError(
            f"`{path}` is a {cls.__name__}, which has no name in JSON: use one of {names}"
        )
    written: dict[str, Any] = {"type": cls.__name__} if cls in _TAGGED else {}
    for field in dataclasses.fields(value):
        where = f"{path}.{field.name}"
        item = _written_field(cls, field.name, getattr(value, field.name), where)
        if not _has_default(field) or item != _written_field(cls, field.name, field.default, where):
            written[field.name] = item
    return written


def _written_field(cls: type, name: str, value: Any, path: str) -> Any:
    if value is not None and _is_dtype(_hints(cls)[name]):
        return np.dtype(value).name
    return _written(value, path)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING


@functools.cache
def _document(key: str, hint: Any) -> TypeAdapter[Any]:
    fields: dict[str, Any] = {"version": (int, ...), key: (_form(hint), ...)}
    return TypeAdapter(pydantic.create_model("Document", __config__=_STRICT, **fields))


@functools.cache
def _class_form(cls: type) -> Any:
    """What pydantic checks an object against, and makes a `cls` of."""
    hints = _hints(cls)
    fields: dict[str, Any] = {"type": (Literal[cls.__name__], ...)} if cls in _TAGGED else {}
    for field in dataclasses.fields(cls):
        fields[field.name] = (
            _form(hints[field.name]),
            field.default if _has_default(field) else ...,
        )
    model = pydantic.create_model(cls.__name__, __config__=_STRICT, **fields)

    def built(read: pydantic.BaseModel) -> Any:
        given = {name: getattr(read, name) for name in read.model_fields_set if name != "type"}
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(str(error)) from error

    return Annotated[model, AfterValidator(built)]


def _form(hint: Any) -> Any:
    """The type that pydantic checks, for a field that is declared as `hint`."""
    members = _members(hint)
    if _is_dtype(hint):
        return _Dtype | None if types.NoneType in members else _Dtype
    classes = [c for member in members for c in FAMILIES.get(member, (member,)) if c in _TAGGED]
    forms = [_plain_form(m) for m in members if m not in FAMILIES and m not in _TAGGED]
    if classes:
        choices = functools.reduce(operator.or_, map(_class_form, classes))
        forms.append(Annotated[choices, Field(discriminator="type")] if classes[1:] else choices)
    return functools.reduce(operator.or_, forms)


def _plain_form(hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _class_form(typing.cast(type, hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return Annotated[Literal[tuple(hint.__members__)], AfterValidator(hint.__getitem__)]
    if typing.get_origin(hint) in (Sequence, tuple):
        return tuple[_form(typing.get_args(hint)[0]), ...]
    return hint


def _dtype(name: str) -> Any:
    try:
        known = np.dtype(name).name == name
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"{name!r} is the name of no dtype, such as 'int8' or 'bfloat16'")
    return np.dtype(name)


_Dtype: Any = Annotated[str, AfterValidator(_dtype)]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _is_dtype(hint: Any) -> bool:
    return np.dtype in _members(hint)


def _explained(error: pydantic.ValidationError) -> str:
    """What is wrong at each path, without the names of classes that pydantic puts into paths."""
    found: dict[str, str] = {}
    # Of the alternatives of a field, pydantic names each that failed: "int", "tuple[int, ...]".
    types_named = {"int", *(cls.__name__ for cls in _TAGGED)}
    for detail in error.errors():
        parts = [str(part) for part in detail["loc"] if part not in types_named]
        path = ".".join(part for part in parts if part.isidentifier() or part.isdecimal())
        cause = detail.get("ctx", {}).get("error")
        found.setdefault(path, detail["msg"] if cause is None else str(cause))
    return "; ".join(f"`{path}`: {message}" for path, message in found.items())
