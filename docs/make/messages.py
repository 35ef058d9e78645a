"""Writes the reference of the .proto, with its comments: `python docs/make/messages.py FILE`."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

PROTO = Path(__file__).parents[2] / "protos/aqt_protos/open_inference.proto"
# The numbers of fields in descriptors, of which paths of comments are made.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE = 4, 5, 6
MESSAGE_FIELD, MESSAGE_NESTED, MESSAGE_ENUM = 2, 3, 4
MEMBER = 2  # the methods of a service, and the values of an enum

Place = tuple[int, ...]


def described(proto: Path) -> FileDescriptorProto:
    """The descriptor of a file, with the places of its comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "descriptors")
        arguments = [f"--proto_path={proto.parent}", f"--descriptor_set_out={out}"]
        if protoc.main(["protoc", *arguments, "--include_source_info", proto.name]) != 0:
            raise SystemExit(f"protoc refused {proto}; its message stands above.")
        return FileDescriptorSet.FromString(out.read_bytes()).file[0]


class Page:
    """The Markdown of a file's services, messages and enums."""

    def __init__(self, file: FileDescriptorProto):
        self.file = file
        self.comments = {
            tuple(at.path): " ".join((at.leading_comments or at.trailing_comments).split())
            for at in file.source_code_info.location
        }

    def lines(self) -> Iterator[str]:
        """The page, line by line."""
        yield "# Messages"
        yield f"\nWhat is in `{PROTO.name}`, package `{self.file.package}`.\n"
        for i, service in enumerate(self.file.service):
            yield from self.service(service, (FILE_SERVICE, i))
        for i, message in enumerate(self.file.message_type):
            yield from self.message(message, (FILE_MESSAGE, i), "")
        for i, enum in enumerate(self.file.enum_type):
            yield from self.enum(enum, (FILE_ENUM, i), "")

    def service(self, service: ServiceDescriptorProto, at: Place) -> Iterator[str]:
        """A table of its calls."""
        yield f"\n## {service.name}\n\n{self.comment(at)}\n"
        yield "| call | takes | gives | |\n| --- | --- | --- | --- |"
        for i, method in enumerate(service.method):
            takes = ("stream of " if method.client_streaming else "") + linked(method.input_type)
            gives = ("stream of " if method.server_streaming else "") + linked(method.output_type)
            yield f"| `{method.name}` | {takes} | {gives} | {self.comment((*at, MEMBER, i))} |"

    def message(self, message: DescriptorProto, at: Place, within: str) -> Iterator[str]:
        """A table of its fields, and what is declared in it."""
        name = within + message.name
        entries = {n.name: n for n in message.nested_type if n.options.map_entry}
        yield f"\n## {name}\n\n{self.comment(at)}\n"
        if message.field:
            yield "| field | number | type | |\n| --- | --: | --- | --- |"
        for i, field in enumerate(message.field):
            entry = entries.get(field.type_name.rpartition(".")[2])
            kind = type_of(field, entry)
            comment = self.comment((*at, MESSAGE_FIELD, i))
            yield f"| `{field.name}` | {field.number} | {kind} | {comment} |"
        for i, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                yield from self.message(nested, (*at, MESSAGE_NESTED, i), f"{name}.")
        for i, enum in enumerate(message.enum_type):
            yield from self.enum(enum, (*at, MESSAGE_ENUM, i), f"{name}.")

    def enum(self, enum: EnumDescriptorProto, at: Place, within: str) -> Iterator[str]:
        """A table of its values."""
        yield f"\n## {within}{enum.name}\n\n{self.comment(at)}\n"
        yield "| value | number | |\n| --- | --: | --- |"
        for i, value in enumerate(enum.value):
            yield f"| `{value.name}` | {value.number} | {self.comment((*at, MEMBER, i))} |"

    def comment(self, at: Place) -> str:
        """What stands in the source at that place."""
        return self.comments.get(at, "").replace("|", r"\|")


def type_of(field: FieldDescriptorProto, entry: DescriptorProto | None) -> str:
    """A field's type as the .proto has it, with links."""
    if entry is not None:
        return f"map of {type_of(entry.field[0], None)} to {type_of(entry.field[1], None)}"
    if field.type_name:
        name = linked(field.type_name)
    else:
        name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return ("repeated " if field.label == FieldDescriptorProto.LABEL_REPEATED else "") + name


def linked(full_name: str) -> str:
    """A link to the section of a message or enum, `.package.Outer.Inner`."""
    name = ".".join(full_name.split(".")[2:])
    return f"[{name}](#{name.lower().replace('.', '')})"


if __name__ == "__main__":
    (target,) = map(Path, sys.argv[1:])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(Page(described(PROTO)).lines()) + "\n")
