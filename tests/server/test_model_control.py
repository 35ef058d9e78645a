"""Who loads models: the directory, a client, or nobody; and what the index says of each version."""

import os
import shutil

import grpc
import pytest
import tritonclient.grpc as stock

from aqt_client import Client
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from bundles import reference, write_linear
from engine.contractions import assert_same_bits
from server.messages import MODEL, raises_status, stock_input, x_of
from server_process import eventually, serving

pytestmark = pytest.mark.slow

X = x_of(9)


def damage(path):
    graph = bytearray((path / "graph.stablehlo").read_bytes())
    graph[len(graph) // 2] ^= 1
    (path / "graph.stablehlo").write_bytes(graph)


def index(client, **arguments):
    models = client.get_model_repository_index(**arguments).models
    return {(m.name, m.version): (m.state, m.reason) for m in models}


def answer(client, name=MODEL, version=""):
    return client.infer(name, [stock_input(X)], model_version=version).as_numpy("y")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "repository"
    write_linear(root / MODEL / "1", seed=1)
    write_linear(root / "other" / "1", seed=2)
    return root


def explicit(root, tmp_path, *flags):
    return serving(root, "--model-control", "explicit", *flags, log=tmp_path / "log")


def test_explicit_loads_and_unloads_what_a_client_asks_for(root, tmp_path):
    with (
        explicit(root, tmp_path) as server,
        stock.InferenceServerClient(server.address) as client,
    ):
        assert client.is_server_ready()
        unloaded = ("UNAVAILABLE", "not loaded")
        assert index(client) == {(MODEL, "1"): unloaded, ("other", "1"): unloaded}
        assert not client.is_model_ready(MODEL)
        with raises_status("NOT_FOUND", "no model 'linear': the server has none yet"):
            answer(client)

        client.load_model(MODEL)
        assert index(client) == {(MODEL, "1"): ("READY", ""), ("other", "1"): unloaded}
        assert_same_bits(answer(client), reference(root / MODEL / "1", X))
        # New on disk: not looked at before it is asked for, and then beside the first.
        write_linear(root / MODEL / "2", seed=3)
        assert index(client)[MODEL, "2"] == unloaded
        client.load_model(MODEL)
        assert client.get_model_metadata(MODEL).versions == ["1", "2"]
        assert_same_bits(answer(client), reference(root / MODEL / "2", X))

        client.unload_model(MODEL)
        assert not client.is_model_ready(MODEL)
        assert index(client)[MODEL, "2"] == unloaded
        with raises_status("NOT_FOUND", "no model 'linear'"):
            answer(client)
        client.load_model(MODEL)
        assert_same_bits(answer(client, version="1"), reference(root / MODEL / "1", X))


def test_what_is_refused_says_why_and_the_old_version_serves_on(root, tmp_path):
    with (
        explicit(root, tmp_path, "--load-model", MODEL) as server,
        stock.InferenceServerClient(server.address) as client,
    ):
        expected = answer(client)
        write_linear(root / MODEL / "2", seed=3, wrong_witness=True)
        with raises_status("FAILED_PRECONDITION", r"'linear' was refused: version 2:.* 1 ulp"):
            client.load_model(MODEL)
        state, reason = index(client)[MODEL, "2"]
        assert state == "UNAVAILABLE"
        assert "1 ulp" in reason
        assert_same_bits(answer(client), expected)
        # Its own files replaced by damaged ones: what is in memory serves on.
        shutil.rmtree(root / MODEL / "2")
        damage(root / MODEL / "1")
        with raises_status("FAILED_PRECONDITION", "version 1:.*has other content"):
            client.load_model(MODEL)
        state, reason = index(client)[MODEL, "1"]
        assert state == "READY"
        assert "has other content" in reason
        assert (MODEL, "2") not in index(client)
        assert_same_bits(answer(client), expected)
        # Repaired, though no file looks changed: what was refused is tried again all the same.
        graph = root / MODEL / "1" / "graph.stablehlo"
        moment = graph.stat().st_mtime_ns
        damage(root / MODEL / "1")
        os.utime(graph, ns=(moment, moment))
        client.load_model(MODEL)
        assert index(client)[MODEL, "1"] == ("READY", "")
        assert_same_bits(answer(client), expected)
        # Replaced by another.
        shutil.rmtree(root / MODEL / "1")
        write_linear(root / MODEL / "1", seed=7)
        client.load_model(MODEL)
        assert index(client)[MODEL, "1"] == ("READY", "")
        assert_same_bits(answer(client), reference(root / MODEL / "1", X))


def test_the_models_to_begin_with(root, tmp_path):
    with explicit(root, tmp_path, "--load-model", MODEL) as server, Client(server.address) as c:
        assert (c.is_model_ready(MODEL), c.is_model_ready("other")) == (True, False)
    flags = ("--load-model", MODEL, "--load-model", "other")
    with explicit(root, tmp_path, *flags) as server, Client(server.address) as c:
        assert (c.is_model_ready(MODEL), c.is_model_ready("other")) == (True, True)
    with explicit(root, tmp_path, "--load-model", "*") as server, Client(server.address) as c:
        assert (c.is_model_ready(MODEL), c.is_model_ready("other")) == (True, True)


def test_what_cannot_be_loaded_or_unloaded(root, tmp_path):
    with (
        explicit(root, tmp_path) as server,
        stock.InferenceServerClient(server.address) as client,
    ):
        for name in ("nope", "", "..", "../repository/linear", f"{MODEL}/1"):
            with raises_status("NOT_FOUND", "no versions of a model"):
                client.load_model(name)
        with raises_status("NOT_FOUND", "no model 'linear' is loaded"):
            client.unload_model(MODEL)
        with raises_status("UNIMPLEMENTED", "'config' would change it"):
            client.load_model(MODEL, config="{}")
        assert not client.is_model_ready(MODEL)


def test_a_client_that_goes_away_does_not_stop_a_load(root, tmp_path):
    with (
        explicit(root, tmp_path) as server,
        stock.InferenceServerClient(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        call = stub.RepositoryModelLoad.future(pb.RepositoryModelLoadRequest(model_name=MODEL))
        eventually(lambda: index(client)[MODEL, "1"][0] != "UNAVAILABLE")
        call.cancel()
        eventually(lambda: index(client)[MODEL, "1"] == ("READY", ""))
        assert_same_bits(answer(client), reference(root / MODEL / "1", X))


def test_none_loads_what_is_there_at_the_start_and_no_more(root, tmp_path):
    flags = ("--model-control", "none", "--poll-s", "0.01")
    with (
        serving(root, *flags, log=tmp_path / "log") as server,
        stock.InferenceServerClient(server.address) as client,
    ):
        write_linear(root / MODEL / "2")
        for call in (client.load_model, client.unload_model):
            with raises_status("FAILED_PRECONDITION", "only under --model-control explicit.* none"):
                call(MODEL)
        assert index(client)[MODEL, "2"] == ("UNAVAILABLE", "not loaded")
        assert index(client)[MODEL, "1"] == ("READY", "")
        shutil.rmtree(root / MODEL)
        assert client.is_model_ready(MODEL)


def test_poll_follows_the_directory_and_takes_no_orders(root, tmp_path):
    with (
        serving(root, "--poll-s", "0.1", log=tmp_path / "log") as server,
        stock.InferenceServerClient(server.address) as client,
    ):
        with raises_status("FAILED_PRECONDITION", "this server has poll"):
            client.unload_model(MODEL)
        write_linear(root / MODEL / "2", wrong_witness=True)
        eventually(lambda: "1 ulp" in index(client).get((MODEL, "2"), ("", ""))[1])
        assert index(client)[MODEL, "2"][0] == "UNAVAILABLE"
        assert index(client)[MODEL, "1"] == ("READY", "")


def test_the_index_can_be_of_the_ready_ones_only(root, tmp_path):
    write_linear(root / MODEL / "10", wrong_witness=True)
    with (
        serving(root, log=tmp_path / "log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        everything = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
        ready = stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models
        names = [(m.name, m.version) for m in everything]
        assert names == [(MODEL, "1"), (MODEL, "10"), ("other", "1")]
        assert [(m.name, m.version) for m in ready] == [(MODEL, "1"), ("other", "1")]
        with raises_status("INVALID_ARGUMENT", "leave its name empty"):
            stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="models"))
