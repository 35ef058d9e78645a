"""An execution or a load that never ends holds up nothing behind it, nor the server's end."""

import contextlib
import os
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from bundles import write_linear
from server.messages import MODEL, raises_status, request_of, x_of
from server.odd_bundles import STALL, write_stalling
from server_process import WAIT_S, eventually, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    write_linear(root / MODEL / "1")
    write_stalling(root / "stalling" / "1")
    return root


class Stalled:
    """A server whose stalling model is computing for ever."""

    def __init__(self, server, channel):
        self.server = server
        self.stub = pb_grpc.GRPCInferenceServiceStub(channel)
        self.first = self.stub.ModelInfer.future(self.request(STALL))
        eventually(self._holds_up_others)
        # One, however the call that was held up came to its end.
        eventually(lambda: self.failures() == 1)

    def _holds_up_others(self):
        try:
            self.stub.ModelInfer(self.request(0.0, timeout=100_000), timeout=5)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return False

    def failures(self):
        """Failed requests of whatever reason."""
        reasons = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
        return sum(self.sample("request_failure_total", reason=reason) for reason in reasons)

    def request(self, value, **parameters):
        x = np.full((1, 1), value, np.float32)
        request = request_of(x, model_name="stalling")
        for name, number in parameters.items():
            request.parameters[name].int64_param = number
        return request

    def sample(self, name, **labels):
        return sample(self.server, f"aqt_inference_{name}", model="stalling", **labels)


def sample(server, name, **labels):
    with urllib.request.urlopen(server.metrics_url, timeout=WAIT_S) as response:
        families = text_string_to_metric_families(response.read().decode())
    (value,) = (
        s.value
        for family in families
        for s in family.samples
        if s.name == name and s.labels.items() >= labels.items()
    )
    return value


@pytest.fixture
def stalled(repository, tmp_path):
    with (
        serving(repository, "--drain-s", "0.5", log=tmp_path / "log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield Stalled(server, channel)


def test_a_timeout_ends_the_wait_and_other_models_answer(stalled):
    before = stalled.sample("request_failure_total", reason="REJECTED")
    with raises_status("DEADLINE_EXCEEDED", "could not be computed in its time"):
        stalled.stub.ModelInfer(stalled.request(1.0, timeout=1000))
    assert stalled.sample("request_failure_total", reason="REJECTED") == before + 1
    assert stalled.sample("pending_request_count") == 0
    assert stalled.stub.ModelInfer(request_of(x_of(3)), timeout=WAIT_S).outputs
    # The same in a stream, whose other requests are not touched.
    requests = [stalled.request(1.0, timeout=1000), request_of(x_of(3), id="after")]
    late, after = stalled.stub.ModelStreamInfer(iter(requests), timeout=WAIT_S)
    assert late.infer_response.parameters["aqt_status"].string_param == "DEADLINE_EXCEEDED"
    assert after.infer_response.id == "after"


def test_what_nobody_waits_for_leaves_the_queue(stalled):
    answered = stalled.sample("request_success_total")
    # The call's own deadline.
    with raises_status("DEADLINE_EXCEEDED", ".*"):
        stalled.stub.ModelInfer(stalled.request(1.0), timeout=0.2)
    eventually(lambda: stalled.sample("pending_request_count") == 0)
    # A stream that its client gives up.
    call = stalled.stub.ModelStreamInfer(iter([stalled.request(1.0)] * 5), timeout=WAIT_S)
    eventually(lambda: stalled.sample("pending_request_count") == 5)
    call.cancel()
    eventually(lambda: stalled.sample("pending_request_count") == 0)
    # What the deadline ended, and the five, and none of them twice.
    eventually(lambda: stalled.failures() == 7)
    assert stalled.sample("request_success_total") == answered
    assert "Traceback" not in stalled.server.log()


def test_a_stalled_execution_does_not_hold_up_the_end(stalled):
    queued = stalled.stub.ModelInfer.future(stalled.request(1.0))
    eventually(lambda: stalled.sample("pending_request_count") == 1)
    assert stalled.server.terminate() == 1
    for call in (stalled.first, queued):
        with raises_status("UNAVAILABLE", r"not computed within the 0\.5 s"):
            call.result()
    assert "cut off" in stalled.server.log()
    assert "Traceback" not in stalled.server.log()


def test_unloading_waits_for_requests_but_not_for_ever(repository, tmp_path):
    flags = ("--drain-s", "0.5", "--model-control", "explicit", "--load-model", "*")
    with (
        serving(repository, *flags, log=tmp_path / "log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stalled = Stalled(server, channel)
        unload = pb.RepositoryModelUnloadRequest(model_name="stalling")
        call = stalled.stub.RepositoryModelUnload.future(unload)

        def states():
            models = stalled.stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
            return {m.name: m.state for m in models}

        with raises_status("DEADLINE_EXCEEDED", r"is unloaded, .* cut off after 0\.5 s"):
            call.result(WAIT_S)
        with raises_status("UNAVAILABLE", r"not computed within the 0\.5 s"):
            stalled.first.result(WAIT_S)
        assert states() == {MODEL: "READY", "stalling": "UNAVAILABLE"}
        # The model comes back beside its own stalled thread.
        stalled.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="stalling"))
        assert stalled.stub.ModelInfer(stalled.request(1.0), timeout=WAIT_S).outputs


def test_unloading_drains_what_was_accepted(repository, tmp_path):
    """With a drain without end, the version is UNLOADING as long as it computes."""
    flags = ("--drain-s", "1000", "--model-control", "explicit", "--load-model", "*")
    with (
        serving(repository, *flags, log=tmp_path / "log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stalled = Stalled(server, channel)
        unload = pb.RepositoryModelUnloadRequest(model_name="stalling")
        call = stalled.stub.RepositoryModelUnload.future(unload)

        def states():
            models = stalled.stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
            return {m.name: m.state for m in models}

        eventually(lambda: states() == {MODEL: "READY", "stalling": "UNLOADING"})
        with raises_status("NOT_FOUND", "no model 'stalling'"):
            stalled.stub.ModelInfer(stalled.request(1.0))
        assert not call.done()
        assert not stalled.first.done()


def test_a_signal_while_a_version_loads_ends_the_server(tmp_path):
    write_linear(tmp_path / "repository" / MODEL / "1")
    for attempt in range(3):
        log = tmp_path / f"log{attempt}"
        with serving(tmp_path / "repository", log=log, ready=False) as server:
            assert server.terminate() == 0
            assert "Traceback" not in server.log()


def test_a_model_that_hangs_is_seen_and_others_go_on(repository, tmp_path):
    flags = ("--hung-s", "0.5", "--drain-s", "0.5", "--http-port", "0")
    with (
        serving(repository, *flags, log=tmp_path / "log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)

        def ready(name):
            return stub.ModelReady(pb.ModelReadyRequest(name=name), timeout=WAIT_S).ready

        assert ready("stalling")
        stall = request_of(np.full((1, 1), STALL, np.float32), model_name="stalling")
        first = stub.ModelInfer.future(stall)
        eventually(lambda: not ready("stalling"))
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{server.http_url}/v2/models/stalling/ready", timeout=WAIT_S)
        with raises_status("UNAVAILABLE", r"computing one batch for \d+ s"):
            stub.ModelInfer(request_of(np.ones((1, 1), np.float32), model_name="stalling"))
        assert sample(server, "aqt_inference_computing_seconds", model="stalling") > 0.5
        assert "a batch of stalling version 1 has been computed for 0.5 s" in server.log()
        # Other models, and the server, are ready.
        assert ready(MODEL)
        assert stub.ModelInfer(request_of(x_of(3)), timeout=WAIT_S).outputs
        assert sample(server, "aqt_inference_computing_seconds", model=MODEL) == 0
        assert stub.ServerReady(pb.ServerReadyRequest(), timeout=WAIT_S).ready
        assert not first.done()


def test_a_load_that_hangs_holds_up_no_other(tmp_path):
    """A manifest that is a pipe is read until somebody writes to it."""
    root = tmp_path / "repository"
    write_linear(root / MODEL / "1")
    (root / "before" / "1").mkdir(parents=True)
    os.mkfifo(root / "before" / "1" / "manifest.json")
    flags = ("--load-s", "0.5", "--model-control", "explicit", "--load-model", "*")
    with (
        serving(root, *flags, log=tmp_path / "log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)

        def state(name="before"):
            models = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
            return next((m.state, m.reason) for m in models if m.name == name)

        def load(name):
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name))

        # The server has become ready; the other, which may take as long here, ends to load.
        eventually(lambda: state(MODEL) == ("READY", ""))
        assert stub.ModelInfer(request_of(x_of(3)), timeout=WAIT_S).outputs
        told = "it has been loading for 0.5 s, and goes on beside other loads"
        assert state() == ("LOADING", told)
        assert f"before version 1: {told}" in server.log()
        with raises_status("UNAVAILABLE", "still loading"):
            stub.ModelInfer(request_of(x_of(3), model_name="before"))
        stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=MODEL))
        with raises_status("UNAVAILABLE", f"'before' is still loading: version 1: {told}"):
            load("before")
        with contextlib.suppress(grpc.RpcError):
            load(MODEL)
        eventually(lambda: state(MODEL) == ("READY", ""))
        assert stub.ModelInfer(request_of(x_of(3)), timeout=WAIT_S).outputs
        # What comes of it in the end is seen; and the server ends beside one that hangs again.
        (root / "before" / "1" / "manifest.json").write_text("{}")
        eventually(lambda: state()[0] == "UNAVAILABLE")
        assert "no JSON manifest" in state()[1]
        with raises_status("UNAVAILABLE", "still loading"):
            load("before")
        assert server.terminate() == 0
        assert "Traceback" not in server.log()
