"""`aqt bench` against a fake server that counts what it was asked."""

import asyncio
import itertools
import json

import grpc
import numpy as np
import pytest
import typer
import typer.testing

from aqt_cli import load
from aqt_cli.bench import bench, summary
from aqt_client import ClientError, InferResult, ModelMetadata, TensorMetadata
from client.fake_server import FakeServer, identity

QUICK = ("--seconds", "0.2", "--warmup", "0")
X = {"x": np.ones((2, 3), np.float32)}


@pytest.fixture
def server():
    with FakeServer() as server:
        server.model.inputs.add(name="x", datatype="FP32", shape=[-1, 3])
        yield server


@pytest.fixture
def aqt(server):
    app = typer.Typer()
    app.command()(bench)
    runner = typer.testing.CliRunner(env={"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"})
    given = ("--server", server.address, *QUICK)
    return lambda *args: runner.invoke(app, ["identity", *given, *map(str, args)])


def asked(server):
    return [call.request for call in server.calls if call.rpc == "ModelInfer"]


def test_a_closed_loop_is_counted(server, aqt):
    done = aqt("--concurrency", 2, "--rows", 5, "--check", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["answered"] == len(asked(server)) > 0
    assert found["rows_per_s"] == pytest.approx(5 * found["requests_per_s"])
    assert (found["errors"], found["different"], found["sent_late_p99_ms"]) == ({}, 0, 0)
    latency = found["latency_ms"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
    assert {tuple(request.inputs[0].shape) for request in asked(server)} == {(5, 3)}


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_an_open_loop_asks_as_often_as_it_should(server, aqt, arrivals):
    done = aqt("--rate", 100, "--arrivals", arrivals, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["answered"] == len(asked(server)) == 20


def test_failures_are_counted_by_status_and_not_repeated(server, aqt):
    # The metadata is asked for first.
    server.script.extend([None, *[(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")] * 3])
    server.script.extend([(grpc.StatusCode.UNAVAILABLE, "stopping")])
    found = json.loads(aqt("--concurrency", 1, "--json").stdout)
    assert found["errors"] == {"RESOURCE_EXHAUSTED": 3, "UNAVAILABLE": 1}
    assert found["sentences"] == {"RESOURCE_EXHAUSTED": "full", "UNAVAILABLE": "stopping"}
    assert found["answered"] + 4 == len(asked(server))


def test_what_the_first_failure_was_told_is_shown(server, aqt):
    server.script.extend([None, (grpc.StatusCode.INVALID_ARGUMENT, "17 is too long")])
    assert "INVALID_ARGUMENT: 17 is too long" in aqt("--concurrency", 1).stdout


@pytest.mark.parametrize(
    ("name", "sentence"), [("plot.odd", "name it .png or .svg"), ("none/plot.svg", "make it first")]
)
def test_a_plot_that_cannot_be_drawn_is_refused_before_the_load(
    server, aqt, tmp_path, name, sentence
):
    done = aqt("--plot", tmp_path / name)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert server.calls == []


def test_answers_with_other_bits_are_found(server, aqt):
    count = itertools.count()

    def changing(request):
        response = identity(request)
        # Another sign of zero than before, from the 18th request on: all inputs have come once.
        zeros = np.zeros(3, np.float32) * (-1 if next(count) > 17 else 1)
        response.raw_output_contents[0] = zeros.tobytes()
        return response

    server.answer = changing
    done = aqt("--rate", 100, "--check", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["different"] == 2


@pytest.mark.slow
def test_inputs_come_from_a_file_and_a_plot_is_drawn(server, aqt, tmp_path):
    np.savez(tmp_path / "x.npz", **X)
    done = aqt("--inputs", tmp_path / "x.npz", "--plot", tmp_path / "plot.svg", "--check")
    assert done.exit_code == 0, done.output
    assert {request.raw_input_contents[0] for request in asked(server)} == {X["x"].tobytes()}
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    for row in ("requests a second", "latency p99.9, ms", "answers with other bits"):
        assert row in done.stdout


def test_no_server_is_one_sentence(server, aqt):
    server.__exit__()
    done = aqt("--timeout", 0.5)
    assert done.exit_code == 1
    assert "failed to connect" in done.stderr
    assert "Traceback" not in done.output


class Stalling:
    """A server that stands still once, for a second, by the clock of the test."""

    def __init__(self, loop):
        self.loop, self.still_until = loop, 0.0
        self.calls = 0

    async def infer(self, model, inputs, *, version):
        self.calls += 1
        if self.calls == 11:
            self.still_until = self.loop.time() + 1.0
        if self.calls == 16:
            raise ClientError("cut off", code=grpc.StatusCode.UNAVAILABLE)
        await asyncio.sleep(max(0.0, self.still_until - self.loop.time()))
        return InferResult(outputs=inputs, model_name="", model_version="", id="", parameters={})


class Clock(asyncio.SelectorEventLoop):
    """An event loop in which nothing takes time: it goes on to when something is due."""

    now = 1000.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()


def test_a_server_that_stands_still_is_charged_for_all_that_was_due(monkeypatch):
    shape = load.Shape(concurrency=1, rate_per_s=10, arrivals="constant", seconds=4.0, warmup_s=0.0)
    with asyncio.Runner(loop_factory=Clock) as runner:
        loop = runner.get_loop()
        monkeypatch.setattr("time.perf_counter", loop.time)
        asking = load.put(Stalling(loop), "m", "", [X], shape, check=True, seed=0)
        measured = runner.run(asking)
    # Ten requests were due in the second, a tenth apart, and one of them was cut off.
    waited = sorted(s for s in measured.latencies_s if s > 1e-6)
    assert waited == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert len(measured.latencies_s) == 39
    assert measured.errors == {"UNAVAILABLE": 1}
    found = summary(measured)
    assert found["latency_ms"]["max"] == pytest.approx(1000)
    assert found["latency_ms"]["p50"] == pytest.approx(0, abs=1e-3)


def test_random_inputs_fit_the_model():
    specs = [
        *(("a", "FP32", (-1, -1, 2)), ("b", "INT32", (-1,))),
        *(("c", "BOOL", (1,)), ("d", "BF16", ())),
    ]
    model = ModelMetadata(
        name="m",
        versions=(),
        platform="",
        inputs=tuple(TensorMetadata(name=n, datatype=d, shape=s) for n, d, s in specs),
        outputs=(),
    )
    found = load.random_inputs(model, rows=3, length=7, seed=0)
    assert {name: (str(array.dtype), array.shape) for name, array in found.items()} == {
        "a": ("float32", (3, 7, 2)),
        "b": ("int32", (3,)),
        "c": ("bool", (1,)),
        "d": ("bfloat16", ()),
    }
