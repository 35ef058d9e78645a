"""`aqt predict` against a fake server."""

import json
import subprocess
import sys

import grpc
import numpy as np
import pytest
import typer
import typer.testing

from aqt_cli.predict import predict
from aqt_protos import open_inference_pb2 as pb
from client.fake_server import BOUND_S, FakeServer

X = np.array([[0.5, -1.25, 3.0]], np.float32)


@pytest.fixture
def server():
    with FakeServer() as server:
        server.model.inputs.add(name="x", datatype="FP32", shape=[-1, 3])
        yield server


@pytest.fixture
def inputs(tmp_path):
    np.savez(tmp_path / "x.npz", x=X)
    return tmp_path / "x.npz"


@pytest.fixture
def aqt(server):
    app = typer.Typer()
    app.command()(predict)
    runner = typer.testing.CliRunner(env={"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"})
    return lambda *args: runner.invoke(app, [str(a) for a in ("--server", server.address, *args)])


def test_it_shows_the_outputs_and_whether_they_are_exact(aqt, inputs):
    done = aqt("identity", "--inputs", inputs)
    assert done.exit_code == 0, done.output
    assert "identity version 3" in done.stdout
    for cell in ("x", "float32", "[1, 3]", "0.5, -1.25, 3"):
        assert cell in done.stdout
    assert "exact: the bits that training computes" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("exact", "sentence"),
    [
        (False, "not exact: the witness does not reproduce on this server"),
        (None, "the server does not say"),
    ],
)
def test_it_shows_when_an_answer_is_not_exact(server, aqt, inputs, exact, sentence):
    response = pb.ModelInferResponse()
    if exact is not None:
        response.parameters["aqt_exact"].bool_param = exact
    server.answer = lambda request: response
    assert sentence in aqt("identity", "--inputs", inputs).stdout


def test_brackets_in_names_are_no_markup(server, aqt, inputs):
    response = pb.ModelInferResponse(model_name="[bold]m")
    response.outputs.add(name="[red]y", datatype="BYTES", shape=[8])
    response.outputs[0].contents.bytes_contents.extend([b"[/]"] * 8)
    server.answer = lambda request: response
    done = aqt("identity", "--inputs", inputs)
    for text in ("[bold]m", "[red]y", "b'[/]', b'[/]'", "..."):
        assert text in done.stdout


def test_bfloat16_is_shown_in_numbers(server, aqt, inputs):
    response = pb.ModelInferResponse(raw_output_contents=[b"\xc0\x3f"])
    response.outputs.add(name="y", datatype="BF16", shape=[1])
    server.answer = lambda request: response
    done = aqt("identity", "--inputs", inputs)
    assert "bfloat16" in done.stdout
    assert "1.5" in done.stdout


def test_json_is_all_that_is_on_stdout(aqt, inputs):
    done = aqt("identity", "--inputs", inputs, "--version", 1, "--json")
    assert json.loads(done.stdout) == {
        "model": "identity",
        "version": "1",
        "id": "",
        "exact": True,
        "outputs": {"x": {"datatype": "FP32", "shape": [1, 3], "data": X.tolist()}},
    }


def test_output_is_written(aqt, inputs, tmp_path):
    done = aqt("identity", "--inputs", inputs, "--output", tmp_path / "y.npz")
    assert done.exit_code == 0, done.output
    with np.load(tmp_path / "y.npz") as found:
        assert found["x"].tobytes() == X.tobytes()


def test_version_and_timeout_reach_the_server(server, aqt, inputs):
    assert aqt("identity", "--inputs", inputs, "--version", 7, "--timeout", 9).exit_code == 0
    metadata, infer = server.calls
    assert metadata.request == pb.ModelMetadataRequest(name="identity", version="7")
    assert infer.request.model_version == "7"
    assert infer.remaining_s <= 9.5


def test_who_calls_reaches_the_server(server, aqt, inputs, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    done = aqt("identity", "--inputs", inputs, "--token-file", tmp_path / "token")
    assert done.exit_code == 0, done.output
    assert {call.metadata["authorization"] for call in server.calls} == {"Bearer secret"}
    fails(aqt("identity", "--inputs", inputs, "--certificate", "c.pem"), "needs --key and --ca")


def fails(done, sentence):
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert "Traceback" not in done.output


def test_a_server_s_error_is_one_sentence(server, aqt, inputs):
    server.script.append((grpc.StatusCode.NOT_FOUND, "there is no model 'other'"))
    fails(aqt("other", "--inputs", inputs), "aqt: there is no model 'other'")


def test_a_wrong_file_is_one_sentence(server, aqt, tmp_path):
    np.savez(tmp_path / "x.npz", x=X.astype(np.complex64))
    fails(aqt("identity", "--inputs", tmp_path / "x.npz"), "dtype complex64 has no datatype")
    fails(aqt("identity", "--inputs", tmp_path / "none.npz"), "No such file")
    assert [c.rpc for c in server.calls] == ["ModelMetadata"] * 2


def test_an_output_that_cannot_be_written_is_one_sentence(aqt, inputs, tmp_path):
    fails(aqt("identity", "--inputs", inputs, "--output", tmp_path / "no" / "y.npz"), "No such")


def test_no_server_is_one_sentence(server, aqt, inputs):
    server.__exit__()
    fails(aqt("identity", "--inputs", inputs, "--timeout", 0.5), "failed to connect")


def test_it_does_not_import_jax(server, inputs):
    code = (
        "import sys, typer, aqt_cli.predict\n"
        "app = typer.Typer()\n"
        "app.command()(aqt_cli.predict.predict)\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('jax', 'jaxlib', 'aqt_engine')])\n"
    )
    command = [sys.executable, "-c", code, "identity", "--inputs", inputs, "--server"]
    done = subprocess.run(
        [*command, server.address], capture_output=True, text=True, timeout=BOUND_S, check=True
    )
    assert "exact" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
