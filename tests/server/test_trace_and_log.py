"""Trace and log settings, changed by a stock client and seen in the server's log."""

import json

import grpc
import pytest
import tritonclient.grpc as stock

from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from bundles import write_linear
from server.messages import MODEL, raises_status, stock_input, x_of
from server_process import serving

pytestmark = pytest.mark.slow

DEFAULT_TRACE = {"trace_level": ["OFF"], "trace_rate": ["1000"], "trace_count": ["-1"]}
DEFAULT_LOG = {
    **{"log_file": "", "log_format": "default", "log_verbose_level": 0},
    **{"log_info": True, "log_warning": True, "log_error": True},
}


@pytest.fixture
def server(tmp_path):
    for name in (MODEL, "other"):
        write_linear(tmp_path / "repository" / name / "1")
    with serving(tmp_path / "repository", log=tmp_path / "log") as running:
        yield running


@pytest.fixture
def client(server):
    with stock.InferenceServerClient(server.address) as connected:
        yield connected


def rules(response):
    return {name: list(value.value) for name, value in response.settings.items()}


def switches(response):
    return {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in response.settings.items()
    }


def infer(client, count, name=MODEL):
    for number in range(count):
        client.infer(name, [stock_input(x_of(2))], request_id=f"{name} {number}\n")


def traces(server):
    lines = [line.split("aqt_server.tracing: ") for line in server.log().splitlines()]
    return [json.loads(line[1]) for line in lines if len(line) == 2]


def test_traces_have_their_moments_in_order(server, client):
    assert rules(client.get_trace_settings()) == DEFAULT_TRACE
    infer(client, 2)
    assert not traces(server)
    changed = {"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "trace_count": "2"}
    expected = {"trace_level": ["TIMESTAMPS"], "trace_rate": ["1"], "trace_count": ["2"]}
    assert rules(client.update_trace_settings(settings=changed)) == expected
    infer(client, 3)
    found = traces(server)
    assert [trace["id"] for trace in found] == ["linear 0\n", "linear 1\n"]
    assert [(trace["model_name"], trace["model_version"]) for trace in found] == [(MODEL, 1)] * 2
    for trace in found:
        moments = [
            trace[moment]
            for moment in (
                *("REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END"),
                *("COMPUTE_OUTPUT_START", "COMPUTE_END", "REQUEST_END"),
            )
        ]
        assert moments == sorted(moments)


def test_one_of_so_many_is_traced_and_models_have_their_own_rules(server, client):
    client.update_trace_settings(settings={"trace_level": "TIMESTAMPS", "trace_rate": "3"})
    client.update_trace_settings("other", settings={"trace_rate": "2"})
    assert rules(client.get_trace_settings("other"))["trace_rate"] == ["2"]
    assert rules(client.get_trace_settings("other"))["trace_level"] == ["TIMESTAMPS"]
    assert rules(client.get_trace_settings(MODEL))["trace_rate"] == ["3"]
    infer(client, 4)
    infer(client, 4, "other")
    ids = [trace["id"].strip() for trace in traces(server)]
    assert ids == ["linear 0", "linear 3", "other 0", "other 2"]
    # None takes a rule back to what it was.
    client.update_trace_settings("other", settings={"trace_rate": None})
    assert rules(client.get_trace_settings("other"))["trace_rate"] == ["3"]
    cleared = {"trace_rate": None, "trace_level": None}
    assert rules(client.update_trace_settings(settings=cleared)) == DEFAULT_TRACE


WRONG_RULES = [
    ({"trace_level": "TENSORS"}, "'trace_level' is 'TENSORS': send OFF or TIMESTAMPS"),
    ({"trace_level": ["OFF", "TIMESTAMPS"]}, "'OFF, TIMESTAMPS'"),
    ({"trace_rate": "0"}, "a number from 1"),
    ({"trace_rate": "many"}, "a number from 1"),
    ({"trace_count": "-2"}, "-1 for no end"),
    ({"trace_file": "/etc/passwd"}, "'trace_file' is not one that a client can change"),
    ({"log_frequency": None}, "'log_frequency'"),
]


def test_wrong_trace_settings_change_nothing(client):
    for settings, match in WRONG_RULES:
        with raises_status("INVALID_ARGUMENT", match):
            client.update_trace_settings(settings={"trace_rate": "5", **settings})
    with raises_status("NOT_FOUND", "no model 'nope'"):
        client.get_trace_settings("nope")
    assert rules(client.get_trace_settings()) == DEFAULT_TRACE


def test_levels_of_the_log_are_turned_off_and_on(server, client):
    assert switches(client.get_log_settings()) == DEFAULT_LOG
    traced = {"trace_level": "TIMESTAMPS", "trace_rate": "1"}
    client.update_trace_settings(settings=traced)
    changed = {"log_info": False, "log_verbose_level": 1}
    expected = {**DEFAULT_LOG, "log_info": False, "log_verbose_level": 1}
    assert switches(client.update_log_settings(changed)) == expected
    infer(client, 1)
    assert not traces(server)
    assert server.log().count("linear version 1 answered 2 rows") == 1
    client.update_log_settings({"log_info": True, "log_verbose_level": 0, "log_file": None})
    infer(client, 1)
    assert len(traces(server)) == 1
    assert server.log().count("linear version 1 answered 2 rows") == 1


def test_wrong_log_settings_change_nothing(server, client):
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        value = pb.LogSettingsRequest.SettingValue
        for name, wrong, match in (
            ("log_info", value(string_param="yes"), "send it in `bool_param`"),
            ("log_verbose_level", value(bool_param=True), "send it in `uint32_param`"),
            ("log_file", value(string_param="/tmp/x"), "cannot be changed by a client"),
            ("log_format", value(string_param="ISO8601"), "cannot be changed by a client"),
            ("log_color", value(bool_param=True), "no log setting 'log_color'"),
        ):
            settings = {"log_error": value(bool_param=False), name: wrong}
            with raises_status("INVALID_ARGUMENT", match):
                stub.LogSettings(pb.LogSettingsRequest(settings=settings))
        assert switches(client.get_log_settings()) == DEFAULT_LOG
        # What is fixed may be sent as it is.
        same = {"log_file": value(string_param=""), "log_format": value(string_param="default")}
        stub.LogSettings(pb.LogSettingsRequest(settings=same))
