"""Requests that no client means: bytes and messages, mutated from those that are well made."""

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from aqt_protos import open_inference_pb2 as pb
from aqt_protos.tensors import DATATYPES

_EDGES = (0, 1, 2, 3, 127, 128, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1)
_NAMES = ("", "x", "y", "linear", "identity", "FP32", "INT8", "BYTES", "\0", "é" * 40, "../..", "9")
_PARAMETERS = (
    *("priority", "timeout", "classification", "sequence_id", "binary_data_output"),
    *("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"),
)


def seeds(models: Sequence[tuple[str, Sequence[tuple[str, str, np.ndarray]]]]) -> list[bytes]:
    """Well-made requests, raw and typed, to `models`: each a name, and its inputs."""
    made: list[bytes] = []
    for model, inputs in models:
        raw = pb.ModelInferRequest(model_name=model, id="seed")
        typed = pb.ModelInferRequest(model_name=model)
        for name, datatype, array in inputs:
            raw.inputs.add(name=name, datatype=datatype, shape=array.shape)
            raw.raw_input_contents.append(array.tobytes())
            tensor = typed.inputs.add(name=name, datatype=datatype, shape=array.shape)
            if field := DATATYPES[datatype].contents:
                getattr(tensor.contents, field).extend(array.ravel().tolist())
        raw.parameters["priority"].int64_param = 3
        raw.outputs.add(name="y").parameters["classification"].int64_param = 2
        typed.parameters["timeout"].int64_param = 10**7
        made += [raw.SerializeToString(), typed.SerializeToString()]
        raw.ClearField("outputs")
        made.append(raw.SerializeToString())
    return made


def mutated(originals: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """Without end: noise, damaged bytes, and messages whose fields were changed."""
    rng = random.Random(seed)
    parsed = [pb.ModelInferRequest.FromString(sent) for sent in originals]
    while True:
        kind = rng.random()
        if kind < 0.05:
            yield rng.randbytes(rng.randrange(64))
        elif kind < 0.5:
            yield _damaged(rng, bytearray(rng.choice(originals)), originals)
        else:
            message = pb.ModelInferRequest()
            message.CopyFrom(rng.choice(parsed))
            for _ in range(rng.choice((1, 1, 2, 4))):
                rng.choice(_CHANGES)(rng, message)
            yield message.SerializeToString()


def damaged(originals: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """Without end: `originals` with bytes that were changed, added and removed."""
    rng = random.Random(seed)
    while True:
        yield _damaged(rng, bytearray(rng.choice(originals)), originals)


def _damaged(rng: random.Random, sent: bytearray, originals: Sequence[bytes]) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(sent) + 1)
        match rng.randrange(6):
            case 0 if at < len(sent):
                sent[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(sent):
                sent[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del sent[at : at + rng.randrange(1, 9)]
            case 3:
                sent[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                other = rng.choice(originals)
                start = rng.randrange(len(other))
                sent[at:at] = other[start : start + rng.randrange(1, 40)]
            case _:
                del sent[at:]
    return bytes(sent)


def _tensor(rng: random.Random, message: pb.ModelInferRequest):
    if not message.inputs or rng.random() < 0.05:
        return message.inputs.add(name="x", datatype="FP32")
    return rng.choice(message.inputs)


def _name(rng: random.Random, message: pb.ModelInferRequest) -> None:
    owner = rng.choice((message, _tensor(rng, message)))
    field = rng.choice(("model_name", "model_version", "id") if owner is message else ("name",))
    setattr(owner, field, rng.choice(_NAMES))


def _datatype(rng: random.Random, message: pb.ModelInferRequest) -> None:
    _tensor(rng, message).datatype = rng.choice((*DATATYPES, *_NAMES))


def _shape(rng: random.Random, message: pb.ModelInferRequest) -> None:
    shape = _tensor(rng, message).shape
    if shape and rng.random() < 0.7:
        shape[rng.randrange(len(shape))] = rng.choice((*_EDGES, -1, -(2**63)))
    elif shape and rng.random() < 0.5:
        del shape[rng.randrange(len(shape))]
    else:
        shape.append(rng.choice(_EDGES))


def _raw(rng: random.Random, message: pb.ModelInferRequest) -> None:
    raw = message.raw_input_contents
    if raw and rng.random() < 0.7:
        at = rng.randrange(len(raw))
        raw[at] = raw[at][: rng.randrange(len(raw[at]) + 1)] + rng.randbytes(rng.randrange(9))
    elif raw and rng.random() < 0.5:
        del raw[rng.randrange(len(raw))]
    else:
        raw.append(rng.randbytes(rng.randrange(40)))


def _contents(rng: random.Random, message: pb.ModelInferRequest) -> None:
    contents = _tensor(rng, message).contents
    match rng.randrange(5):
        case 0:
            contents.int_contents.append(rng.choice((0, -1, 2**31 - 1, -(2**31))))
        case 1:
            contents.uint64_contents.append(rng.choice((0, 2**64 - 1)))
        case 2:
            contents.fp32_contents.append(rng.choice((0.0, float("nan"), float("inf"), 1e38)))
        case 3:
            contents.bytes_contents.append(rng.randbytes(rng.randrange(9)))
        case _:
            contents.bool_contents.append(True)


def _parameter(rng: random.Random, message: pb.ModelInferRequest) -> None:
    owner = rng.choice((message, _tensor(rng, message), *message.outputs))
    value = owner.parameters[rng.choice(_PARAMETERS)]
    match rng.randrange(6):
        case 0:
            value.bool_param = rng.random() < 0.5
        case 1:
            value.string_param = rng.choice(_NAMES)
        case 2:
            value.double_param = rng.choice((0.0, float("nan"), -1.5))
        case 3:
            value.uint64_param = rng.choice(_EDGES)
        case 4:
            value.Clear()
        case _:
            value.int64_param = rng.choice((*_EDGES, -1))


def _output(rng: random.Random, message: pb.ModelInferRequest) -> None:
    message.outputs.add(name=rng.choice(_NAMES))


_CHANGES: tuple[Callable[[random.Random, pb.ModelInferRequest], None], ...] = (
    *(_name, _datatype, _shape, _raw, _contents, _parameter, _output),
)
