"""What a server says of its exactness: in mode exact, in mode fast, and when it is neither."""

import secrets
import urllib.request

import pytest
import tritonclient.grpc as stock

import sequences
from bundles import write_linear
from server.messages import MODEL, raises_status, stock_input, x_of
from server_process import serving

pytestmark = pytest.mark.slow


def told(server, model):
    """What the response, the configuration and the metrics say: mode, exact, verdict."""
    with stock.InferenceServerClient(server.address) as client:
        parameters = client.get_model_config(model).config.parameters
        with urllib.request.urlopen(server.metrics_url, timeout=60) as page:
            lines = page.read().decode().splitlines()
    labels = f'model="{model}",version="1"'
    (exact,) = [line for line in lines if line.startswith(f"aqt_model_exact{{{labels}}}")]
    modes = [line for line in lines if line.startswith("aqt_model_mode{mode=")]
    (mode,) = [line for line in modes if labels in line and line.endswith(" 1.0")]
    assert exact.endswith("1.0") == (parameters["aqt_exact"].string_value == "true")
    assert f'mode="{parameters["aqt_mode"].string_value}"' in mode
    return {k: parameters[f"aqt_{k}"].string_value for k in ("mode", "exact", "verdict")}


def answered(server, model=MODEL):
    with stock.InferenceServerClient(server.address) as client:
        parameters = client.infer(model, [stock_input(x_of(3))]).get_response().parameters
    return parameters["aqt_mode"].string_param, parameters["aqt_exact"].bool_param


def test_exact_is_the_default_and_more_is_tried_in_the_time_that_there_is(tmp_path):
    # One that no other test has had proved, nor an earlier run.
    write_linear(tmp_path / "r" / MODEL / "1", seed=secrets.randbits(48))
    verdicts = []
    for seconds in ("0", "60", "60"):
        with serving(tmp_path / "r", "--proof-s", seconds, log=tmp_path / "log") as server:
            assert answered(server) == ("exact", True)
            found = told(server, MODEL)
            assert (found["mode"], found["exact"]) == ("exact", "true")
            verdicts.append(found["verdict"])
    assert verdicts[0] == "exact: no bit differs in 7 trials, and then time was up"
    # The witness in 20 manners; random inputs in those, shuffled, and beside 5 kinds of padding.
    assert verdicts[1] == "exact: no bit differs in 46 trials"
    assert verdicts[2] == "exact: no bit differs in 46 trials, at an earlier start"


def test_mode_fast_says_so_everywhere(tmp_path):
    sequences.write(tmp_path / "r" / "tagger" / "1")
    write_linear(tmp_path / "r" / MODEL / "1")
    flags = ("--fast-model", "tagger", "--max-batch-rows", "8")
    with serving(tmp_path / "r", *flags, log=tmp_path / "log") as server:
        assert told(server, MODEL)["mode"] == "exact"
        found = told(server, "tagger")
        assert (found["mode"], found["exact"]) == ("fast", "false")
        assert found["verdict"].startswith("fast: bits may differ with the batch")
        inputs = sequences.inputs_of(2, 5)
        with stock.InferenceServerClient(server.address) as client:
            tensors = [
                stock_input(inputs["ids"], "ids", "INT32"),
                stock_input(inputs["bias"], "bias"),
                stock_input(inputs["temperature"][:1], "temperature"),
            ]
            response = client.infer("tagger", tensors).get_response()
        assert response.parameters["aqt_mode"].string_param == "fast"
        assert not response.parameters["aqt_exact"].bool_param


def test_a_bundle_without_a_graph_for_any_rows_is_refused_in_mode_fast(tmp_path):
    write_linear(tmp_path / "r" / MODEL / "1")
    with (
        serving(tmp_path / "r", "--fast-model", "*", log=tmp_path / "log") as server,
        raises_status("FAILED_PRECONDITION", "no graph for any number of rows"),
    ):
        answered(server)


def test_what_does_not_reproduce_says_what_differs(tmp_path):
    write_linear(tmp_path / "r" / MODEL / "1", wrong_witness=True)
    with serving(tmp_path / "r", "--allow-inexact", log=tmp_path / "log") as server:
        assert answered(server) == ("exact", False)
        found = told(server, MODEL)
        assert found["verdict"].startswith("not exact: with the first 4 rows, it is not exact")
        assert "by up to 1 ulp" in found["verdict"]
