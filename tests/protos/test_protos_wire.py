"""Our messages beside those of tritonclient: the same fields, and the same bytes both ways."""

import sys

import hypothesis
import hypothesis.strategies as st
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto
from tritonclient.grpc import model_config_pb2 as their_config
from tritonclient.grpc import service_pb2 as theirs

from aqt_protos import SERVICE_NAME
from aqt_protos import open_inference_pb2 as ours

# What only these left-out fields use.
LEFT_OUT_MESSAGES = {"InferResponseStatistics", "ModelStatistics.ResponseStatsEntry"}


def their_message(name):
    return getattr(theirs, name, None) or getattr(their_config, name)


def with_nested(descriptor):
    yield descriptor
    for nested in descriptor.nested_types:
        yield from with_nested(nested)


NAMES = sorted(ours.DESCRIPTOR.message_types_by_name)


def form(field):
    """All of a field that is on the wire or in its presence."""
    oneof = field.containing_oneof
    return (
        field.name,
        field.type,
        field.label,
        field.message_type.full_name if field.message_type else None,
        field.enum_type.full_name if field.enum_type else None,
        oneof.name if oneof else None,
        field.has_presence,
    )


def reserved(descriptor):
    """Numbers of the fields that our .proto leaves out on purpose."""
    proto = DescriptorProto()
    descriptor.CopyToProto(proto)
    return {n for r in proto.reserved_range for n in range(r.start, r.end)}


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_the_protocol_s(name):
    found = {d.full_name: d for d in with_nested(ours.DESCRIPTOR.message_types_by_name[name])}
    expected = {d.full_name: d for d in with_nested(their_message(name).DESCRIPTOR)}
    left_out = {f"inference.{message}" for message in LEFT_OUT_MESSAGES}
    assert found.keys() == expected.keys() - left_out
    for full_name, descriptor in found.items():
        our_fields = {f.number: form(f) for f in descriptor.fields}
        their_fields = {f.number: form(f) for f in expected[full_name].fields}
        assert our_fields.items() <= their_fields.items()
        assert their_fields.keys() - our_fields.keys() <= reserved(descriptor)
        our_enums, their_enums = (
            {e.name: [(v.name, v.number) for v in e.values] for e in d.enum_types}
            for d in (descriptor, expected[full_name])
        )
        assert our_enums == their_enums


def test_no_message_of_theirs_is_missing():
    missing = set(theirs.DESCRIPTOR.message_types_by_name) - set(NAMES)
    assert missing <= LEFT_OUT_MESSAGES


def test_data_types_are_the_protocol_s():
    assert ours.DataType.items() == their_config.DataType.items()


def test_the_service_is_the_protocol_s():
    def methods(file):
        (service,) = file.services_by_name.values()
        assert service.full_name == SERVICE_NAME
        return {
            (
                m.name,
                m.input_type.full_name,
                m.output_type.full_name,
                m.client_streaming,
                m.server_streaming,
            )
            for m in service.methods
        }

    assert methods(ours.DESCRIPTOR) == methods(theirs.DESCRIPTOR)


SCALARS = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_STRING: st.text(max_size=8),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=8),
}


def fill(draw, message):
    """Puts values into some of the fields, a few levels down at most by the schema's own depth."""
    for field in message.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            entries = getattr(message, field.name)
            for k in draw(st.lists(SCALARS[key.type], max_size=3, unique=True)):
                if value.message_type:
                    fill(draw, entries[k])
                else:
                    entries[k] = draw(SCALARS[value.type])
        elif field.label == FieldDescriptor.LABEL_REPEATED:
            elements = getattr(message, field.name)
            for _ in range(draw(st.integers(0, 3))):
                if field.message_type:
                    fill(draw, elements.add())
                else:
                    elements.append(draw(scalars(field)))
        elif field.message_type:
            getattr(message, field.name).SetInParent()
            fill(draw, getattr(message, field.name))
        else:
            setattr(message, field.name, draw(scalars(field)))
    return message


def scalars(field):
    if field.enum_type:
        return st.sampled_from([v.number for v in field.enum_type.values])
    return SCALARS[field.type]


@st.composite
def messages(draw, kind):
    return fill(draw, kind())


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_same_both_ways(name):
    our_kind, their_kind = getattr(ours, name), their_message(name)

    @hypothesis.given(messages(our_kind))
    def check(message):
        sent = message.SerializeToString(deterministic=True)
        understood = their_kind.FromString(sent)
        assert understood.SerializeToString(deterministic=True) == sent
        # Bytes alone would agree on fields that the other side does not know.
        assert as_document(understood) == as_document(message)
        assert our_kind.FromString(sent).SerializeToString(deterministic=True) == sent

    check()


def as_document(message):
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def test_parts_that_we_left_out_are_kept_when_passed_on():
    config = their_config.ModelConfig(name="m", backend="b")
    config.optimization.graph.level = 3
    config.instance_group.add(name="g").rate_limiter.priority = 2
    passed_on = ours.ModelConfig.FromString(config.SerializeToString())
    assert passed_on.name == "m"
    assert their_config.ModelConfig.FromString(passed_on.SerializeToString()) == config


def test_this_ran_in_one_process_with_theirs():
    assert {"aqt_protos", "tritonclient.grpc.service_pb2"} <= set(sys.modules)
    assert ours.DESCRIPTOR.pool is not theirs.DESCRIPTOR.pool
