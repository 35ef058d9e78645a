"""What several modules of tests serve, and how they ask; others have fixtures of these names."""

import grpc
import pytest
import tritonclient.grpc as stock

from aqt_protos import open_inference_pb2_grpc as pb_grpc
from bundles import write_linear
from server.messages import MODEL
from server.odd_bundles import write_identity
from server_process import serving


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A linear model and an identity."""
    root = tmp_path_factory.mktemp("repository")
    write_linear(root / MODEL / "1")
    write_identity(root / "identity" / "1")
    return root


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    with serving(repository, log=tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def client(server):
    with stock.InferenceServerClient(server.address) as connected:
        yield connected
