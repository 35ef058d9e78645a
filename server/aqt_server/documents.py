"""Messages of the protocol as JSON: the same names, and numbers of 64 bits as numbers too."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message


def document_of(message: Message) -> dict[str, Any]:
    """`message` as JSON has it: every field but messages that are not set, enumerations by name."""
    return {
        field.name: _field(field, getattr(message, field.name))
        for field in cast(Sequence[FieldDescriptor], message.DESCRIPTOR.fields)
        if not field.has_presence or message.HasField(field.name)
    }


def _field(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type and field.message_type.GetOptions().map_entry:
        of = field.message_type.fields_by_name["value"]
        entries = cast(Mapping[Any, Any], value)
        return {str(key): _single(of, entry) for key, entry in entries.items()}
    if field.is_repeated:
        return [_single(field, element) for element in value]
    return _single(field, value)


def _single(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type:
        return document_of(value)
    if field.enum_type:
        return field.enum_type.values_by_number[value].name
    return value.decode(errors="replace") if isinstance(value, bytes) else value
