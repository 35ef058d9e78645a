"""What a server tells of itself: metrics, logs, spans, profiles, and what reads them."""

import concurrent.futures
import http.server
import json
import re
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from aqt_protos import open_inference_pb2_grpc as pb_grpc
from bundles import write_linear
from server.messages import MODEL, raises_status, request_of, stock_input, x_of
from server_process import AQT, WAIT_S, environment, eventually, serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans as an OpenTelemetry collector does."""

    def __init__(self):
        self.spans = []
        super().__init__(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def _handler(self):
        spans = self.spans

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                export = ExportTraceServiceRequest.FromString(body)
                for resource in export.resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        return Handler


@pytest.fixture(scope="module")
def collector():
    with Collector() as running:
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def server(collector, tmp_path_factory):
    root = tmp_path_factory.mktemp("observability")
    write_linear(root / "repository" / MODEL / "1")
    flags = ("--http-port", "0", "--log-format", "json", "--otlp-endpoint", collector.url)
    flags += ("--profile-directory", str(root / "profiles"), "--profile-max-s", "2")
    with serving(root / "repository", *flags, log=root / "log") as running:
        running.profiles = root / "profiles"
        yield running
        running.terminate()


def samples(server):
    with urllib.request.urlopen(server.metrics_url, timeout=WAIT_S) as response:
        text = response.read().decode()
    return text, {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def spans_of(collector, trace):
    return {s.name: s for s in collector.spans if s.trace_id.hex() == trace}


def test_a_request_is_a_span_under_its_callers_with_its_stages(server, client, collector):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    client.infer(MODEL, [stock_input(x_of(3))], request_id="r-1", headers=headers)
    name = "inference.GRPCInferenceService/ModelInfer"
    eventually(lambda: len(spans_of(collector, TRACE)) == 5)
    spans = spans_of(collector, TRACE)
    root = spans.pop(name)
    assert root.parent_span_id.hex() == PARENT
    attributes = {a.key: a.value.string_value or a.value.int_value for a in root.attributes}
    assert attributes["aqt.model"] == MODEL
    assert attributes["aqt.request_id"] == "r-1"
    assert attributes["aqt.rows"] == 3
    assert set(spans) == {"decode", "queue", "compute", "encode"}
    ends = root.start_time_unix_nano
    for stage in ("decode", "queue", "compute", "encode"):
        span = spans[stage]
        assert span.parent_span_id == root.span_id
        assert ends - 10_000_000 <= span.start_time_unix_nano <= span.end_time_unix_nano
        ends = span.end_time_unix_nano
    # The same over HTTP, for a request that fails.
    other = TRACE[::-1]
    request = urllib.request.Request(
        f"{server.http_url}/v2/models/nope/infer",
        data=b"{}",
        headers={"traceparent": f"00-{other}-{PARENT}-01"},
    )
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=WAIT_S)
    eventually(lambda: spans_of(collector, other))
    failed = spans_of(collector, other)[name]
    assert failed.status.code == 2
    assert "no model 'nope'" in failed.status.message


def test_the_log_is_json_with_ids(server, client):
    client.update_log_settings({"log_verbose_level": 1})
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    client.infer(MODEL, [stock_input(x_of(3))], request_id="r-2", headers=headers)
    with raises_status("NOT_FOUND", "nope"):
        client.infer("nope", [stock_input(x_of(3))], headers={"x-request-id": "from-the-header"})
    client.update_log_settings({"log_verbose_level": 0})
    records = [json.loads(line) for line in server.log().splitlines()]
    (answered,) = (r for r in records if r.get("request_id") == "r-2")
    assert answered["message"].endswith("answered 3 rows")
    assert (answered["model"], answered["rpc"], answered["level"]) == (MODEL, "ModelInfer", "DEBUG")
    assert answered["trace_id"] == TRACE
    assert answered["time"].startswith("20")
    (refused,) = (r for r in records if r.get("request_id") == "from-the-header")
    assert "NOT_FOUND" in refused["message"]
    assert "request_id" not in records[0]


def test_latencies_calls_and_devices_are_counted(server, client):
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        _, before = samples(server)
        for _ in range(3):
            stub.ModelInfer(request_of(x_of(2)), timeout=WAIT_S)
        with raises_status("INVALID_ARGUMENT", "no input"):
            request = request_of(x_of(2))
            request.inputs[0].name = "z"
            stub.ModelInfer(request, timeout=WAIT_S)
    text, after = samples(server)

    def grown(name, **labels):
        key = (name, *sorted(labels.items()))
        return after[key] - before.get(key, 0)

    version = {"model": MODEL, "version": "1"}
    assert grown("aqt_inference_request_seconds_count", **version) == 3
    assert grown("aqt_inference_request_seconds_bucket", le="+Inf", **version) == 3
    assert grown("aqt_inference_request_seconds_sum", **version) > 0
    assert grown("aqt_calls_total", rpc="ModelInfer", status="OK") == 3
    assert grown("aqt_calls_total", rpc="ModelInfer", status="INVALID_ARGUMENT") == 1
    assert "# TYPE aqt_device_memory_used_bytes gauge" in text


def test_every_name_in_the_dashboard_is_a_metric_of_the_server(server, client):
    client.infer(MODEL, [stock_input(x_of(3))])
    text, found = samples(server)
    names = {key[0] for key in found} | set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    labels = {name for key in found for name, _ in key[1:]} | {"job", "instance", "device"}
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "aqt-server.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    queries += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    assert len(queries) > 15
    used = {name for query in queries for name in re.findall(r"\b(?:aqt|process)_\w+", query)}
    assert used <= names
    for query in queries:
        grouped = ",".join(re.findall(r"by \(([^)]*)\)", query)).replace(" ", "").split(",")
        matched = re.findall(r"[{,]\s*(\w+)=", query)
        assert {*filter(None, grouped), *matched} <= labels, query
        assert query.count("(") == query.count(")")
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            shown = re.findall(r"{{(\w+)}}", target["legendFormat"])
            assert set(shown) <= labels
    shown = [{"id": p["id"], **p["gridPos"]} for p in dashboard["panels"]]
    assert len({(p["x"], p["y"]) for p in shown}) == len({p["id"] for p in shown}) == len(shown)


def run_top(*arguments):
    return subprocess.run(
        [AQT, "top", *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        # Wide, for a name is cut where long times leave no room for it.
        env=environment(COLUMNS="200"),
    )


def test_top_shows_what_the_metrics_say(server, client):
    client.infer(MODEL, [stock_input(x_of(3))])
    done = run_top(server.metrics_url, "--once", "--json")
    assert done.returncode == 0, done.stderr
    (version,) = json.loads(done.stdout)["versions"]
    assert (version["model"], version["version"], version["exact"]) == (MODEL, "1", True)
    assert version["requests"] >= 1
    assert version["rows"] >= 3
    assert 0 < version["compute_ms"] < version["latency_ms"]
    table = run_top(server.metrics_url, "--once")
    assert f"{MODEL}/1" in table.stdout
    wrong = run_top(server.metrics_url.replace("/metrics", "/other"), "--once")
    assert (wrong.returncode, "404" in wrong.stderr, "Traceback" in wrong.stderr) == (
        1,
        True,
        False,
    )
    nothing = run_top("http://127.0.0.1:1/metrics", "--once")
    assert (nothing.returncode, "Traceback" in nothing.stderr) == (1, False)


def test_top_goes_on_with_rates(server, client):
    command = [AQT, "top", server.metrics_url, "--json", "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(2):
                document = json.loads(process.stdout.readline())
                assert document["seconds"] >= 0.1
                assert document["versions"][0]["model"] == MODEL
        finally:
            process.kill()


def profile(server, document):
    request = urllib.request.Request(
        f"{server.http_url}/aqt/profile", data=json.dumps(document).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_profile_is_taken_on_demand(server, client):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(profile, server, {"seconds": 2}) for _ in range(2)]
        client.infer(MODEL, [stock_input(x_of(3))])
        answers = sorted((f.result(WAIT_S) for f in asked), key=lambda answer: answer[0])
    assert [status for status, _ in answers] == [200, 429]
    _, document = answers[0]
    target = Path(document["profile"])
    assert target.parent == server.profiles
    assert [f for f in target.rglob("*") if f.is_file() and f.stat().st_size]
    for seconds, sentence in ((3, "up to 2"), (0, "above 0"), ("1", "seconds"), (None, "seconds")):
        status, document = profile(server, {"seconds": seconds})
        assert (status, sentence in document["error"]) == (400, True)


def test_profiles_are_off_and_guarded(tmp_path):
    write_linear(tmp_path / "repository" / MODEL / "1")
    (tmp_path / "tokens").write_text('a = "a-token-of-somebody"\n')
    flags = ("--http-port", "0", "--auth-tokens", str(tmp_path / "tokens"))
    with serving(tmp_path / "repository", *flags, log=tmp_path / "log") as server:
        assert profile(server, {"seconds": 1})[0] == 401
    with serving(tmp_path / "repository", "--http-port", "0", log=tmp_path / "log") as server:
        status, document = profile(server, {"seconds": 1})
        assert (status, "--profile-directory" in document["error"]) == (400, True)
