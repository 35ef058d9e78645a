"""What a client of an older .proto relies on is still there, and means the same.

`baseline.txt` has each method, field and value of an enum that was released, a line each. A line
may be added to it, and never changed or taken away: that would break who has the older .proto.
"""

from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

from aqt_protos import open_inference_pb2 as pb

BASELINE = Path(__file__).with_name("baseline.txt")
TYPES = FieldDescriptorProto.Type
LABELS = FieldDescriptorProto.Label


def described(file):
    """What goes over the wire by its full name: what it is, in words."""
    found = {}
    for service in file.service:
        for method in service.method:
            sides = (
                ("stream " if method.client_streaming else "") + method.input_type,
                ("stream " if method.server_streaming else "") + method.output_type,
            )
            found[f"{file.package}.{service.name}/{method.name}"] = " -> ".join(sides)
    for enum in file.enum_type:
        describe_enum(file.package, enum, found)
    for message in file.message_type:
        describe_message(file.package, message, found)
    return found


def describe_message(within, message, found):
    name = f"{within}.{message.name}"
    found[name] = "message, a map" if message.options.map_entry else "message"
    for field in message.field:
        words = [
            str(field.number),
            LABELS.Name(field.label).removeprefix("LABEL_").lower(),
            field.type_name or TYPES.Name(field.type).removeprefix("TYPE_").lower(),
        ]
        if field.proto3_optional:
            words.append("with presence")
        elif field.HasField("oneof_index"):
            words.append(f"one of {message.oneof_decl[field.oneof_index].name}")
        found[f"{name}.{field.name}"] = " ".join(words)
    for enum in message.enum_type:
        describe_enum(name, enum, found)
    for nested in message.nested_type:
        describe_message(name, nested, found)


def describe_enum(within, enum, found):
    for value in enum.value:
        found[f"{within}.{enum.name}.{value.name}"] = str(value.number)


def broken(before, now):
    """A sentence for each that is gone or is something else."""
    return [
        f"{name} was {what!r}, and is {now[name]!r}" if name in now else f"{name} is gone"
        for name, what in before.items()
        if now.get(name) != what
    ]


def current():
    file = FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    return file


def baseline():
    return dict(line.split(": ", 1) for line in BASELINE.read_text().splitlines())


def test_nothing_that_was_released_is_gone_or_changed():
    assert broken(baseline(), described(current())) == []


def test_what_is_new_is_kept_from_now_on():
    before = baseline()
    new = [f"{n}: {what}" for n, what in described(current()).items() if n not in before]
    assert new == [], f"add these lines to {BASELINE.name}"


def message_of(file, name):
    return next(m for m in file.message_type if m.name == name)


def field_of(file, message, name):
    return next(f for f in message_of(file, message).field if f.name == name)


def remove_message(file):
    file.message_type.remove(message_of(file, "ServerLiveResponse"))


def remove_field(file):
    message = message_of(file, "ModelInferRequest")
    message.field.remove(field_of(file, "ModelInferRequest", "id"))


def renumber(file):
    field_of(file, "ModelInferRequest", "id").number = 99


def rename(file):
    field_of(file, "ModelInferRequest", "id").name = "request_id"


def retype(file):
    field_of(file, "ModelInferRequest", "id").type = TYPES.TYPE_BYTES


def make_single(file):
    field_of(file, "ModelInferRequest", "inputs").label = LABELS.LABEL_OPTIONAL


def take_out_of_the_oneof(file):
    field_of(file, "InferParameter", "bool_param").ClearField("oneof_index")


def remove_method(file):
    methods = file.service[0].method
    methods.remove(next(m for m in methods if m.name == "ModelInfer"))


def stream_no_more(file):
    next(m for m in file.service[0].method if m.name == "ModelStreamInfer").server_streaming = False


def rename_service(file):
    file.service[0].name = "Inference"


REQUEST = "inference.ModelInferRequest"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (remove_message, "inference.ServerLiveResponse"),
        (remove_field, f"{REQUEST}.id"),
        (renumber, f"{REQUEST}.id"),
        (rename, f"{REQUEST}.id"),
        (retype, f"{REQUEST}.id"),
        (make_single, f"{REQUEST}.inputs"),
        (take_out_of_the_oneof, "inference.InferParameter.bool_param"),
        (remove_method, "inference.GRPCInferenceService/ModelInfer"),
        (stream_no_more, "inference.GRPCInferenceService/ModelStreamInfer"),
        (rename_service, "inference.GRPCInferenceService/ModelInfer"),
    ],
)
def test_what_breaks_a_client_is_named(change, name):
    file = current()
    change(file)
    assert name in {line.split()[0] for line in broken(baseline(), described(file))}


def test_an_addition_breaks_nothing():
    file = current()
    message_of(file, "ModelInferRequest").field.add(name="new", number=99, type=TYPES.TYPE_STRING)
    file.service[0].method.add(name="New", input_type=f".{REQUEST}", output_type=f".{REQUEST}")
    assert broken(baseline(), described(file)) == []
