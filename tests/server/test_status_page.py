"""The status page of a real server: what it says, to whom, and what a browser may do with it."""

import http.client
import json
import re

import numpy as np
import pytest

from bundles import CLASSES, FEATURES, TILE, reference, write_linear
from engine.contractions import assert_same_bits
from server.messages import MODEL, x_of
from server_process import WAIT_S, serving

pytestmark = pytest.mark.slow

TEAM = "token-of-the-team-1234"
MARKUP = "<img src=x onerror=alert(1)>"
FILES = ("/status", "/status/page.css", "/status/page.js", "/status/charts.js", "/status/icon.svg")
POLICY = f"""
[[allow]]
principals = ["team"]
actions = ["infer", "control"]
models = ["{MODEL}", "wrong", "<*"]
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    for name in (MODEL, "secret", MARKUP):
        write_linear(root / name / "1")
    write_linear(root / "wrong" / "1", wrong_witness=True)
    return root


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "tokens").write_text(f'team = "{TEAM}"\nothers = "token-of-others-123456"\n')
    (folder / "policy").write_text(POLICY)
    access = (f"--auth-tokens={folder / 'tokens'}", f"--auth-policy={folder / 'policy'}")
    flags = ("--http-port", "0", "--status-page", *access)
    with serving(repository, *flags, log=folder / "log") as running:
        yield running
        assert "Traceback" not in running.log()


def ask(server, path, *, body=None, token=TEAM, **headers):
    """Status, body and headers; what is in `headers` is sent as it is, Host too."""
    connection = http.client.HTTPConnection(server.http_url.removeprefix("http://"), timeout=WAIT_S)
    sent = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        connection.request("POST" if body else "GET", path, body, sent | headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def infer(x):
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}
    return json.dumps({"inputs": [tensor]})


def test_files_are_whole_and_take_nothing_from_elsewhere(server):
    assert server.page_url == f"{server.http_url}/status"
    texts = []
    for path in FILES:
        status, body, headers = ask(server, path, token=None)
        assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy.pop("require-trusted-types-for") == "'script'"
        assert policy.pop("default-src") == "'none'"
        assert set(policy.values()) == {"'self'", "'none'"}
        texts.append(body.decode())
    page, _, script, *_ = texts
    linked = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert {f"/{link}" for link in linked} < set(FILES)
    # The policy forbids them, so the page would not work with them.
    assert not re.search(r"<style|style=|\son\w+=|<script(?! src)", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)


def test_data_is_what_the_server_knows_for_who_may_see_it(server, repository):
    x = x_of(5)
    status, body, _ = ask(server, f"/v2/models/{MODEL}/infer", body=infer(x))
    assert status == 200
    status, body, headers = ask(server, "/status/data")
    assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert headers["Cache-Control"] == "no-store"
    found = {v["name"]: v for v in json.loads(body)["versions"]}
    assert set(found) == {MODEL, MARKUP, "wrong"}
    serving = found[MODEL]["serving"]
    assert (found[MODEL]["state"], serving["exact"], serving["tile"]) == ("READY", True, TILE)
    assert serving["verdict"].startswith("exact: no bit differs")
    assert serving["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": ["batch", FEATURES], "first": [1, FEATURES]}
    ]
    done = serving["done"]
    assert (done["requests"], done["rows"], sum(done["latencies"])) == (1, 5, 1)
    assert found["wrong"]["serving"] is None
    assert "1 of 16 values" in found["wrong"]["reason"]


def test_weights_have_their_quantization_and_histograms(server):
    status, body, _ = ask(server, f"/status/weights/{MODEL}/1")
    assert status == 200
    kernel, bias = json.loads(body)
    assert (kernel["name"], kernel["dtype"], kernel["bits"]) == ("kernel", "int8", 8)
    assert (kernel["scale_shape"], kernel["bytes"]) == ([1, CLASSES], FEATURES * CLASSES + 16)
    assert (kernel["values"]["low"], kernel["values"]["high"]) == (-128, 128)
    assert sum(kernel["values"]["counts"]) == FEATURES * CLASSES
    assert 0.01 <= kernel["scales"]["low"] < kernel["scales"]["high"] <= 0.02
    assert (bias["quantized"], sum(bias["values"]["counts"])) == (False, CLASSES)
    for path in (f"/status/weights/{MODEL}/7", "/status/weights/nope/1"):
        assert ask(server, path)[0] in (403, 404)


@pytest.mark.parametrize(
    ("path", "token", "status"),
    [
        ("/status/data", None, 401),
        ("/status/data", "token-of-others-123456", 403),
        ("/status/weights/secret/1", TEAM, 403),
        (f"/status/weights/{MODEL}/1", None, 401),
    ],
)
def test_data_is_not_for_everyone(server, path, token, status):
    found, body, _ = ask(server, path, token=token)
    assert found == status
    assert "error" in json.loads(body)


def test_only_the_page_itself_may_ask_and_for_answers_alone(server, repository):
    host = server.http_url.removeprefix("http://")
    port = host.rpartition(":")[2]
    x = x_of(3)

    def post(path, **headers):
        return ask(server, path, body=infer(x), **headers)

    path = f"/v2/models/{MODEL}/infer"
    for own in (host, f"localhost:{port}", f"[::1]:{port}"):
        status, body, _ = post(path, Host=own, Origin=f"http://{own}")
        assert status == 200
        (output,) = json.loads(body)["outputs"]
        found = np.array(output["data"], np.float32).reshape(3, CLASSES)
        assert_same_bits(found, reference(repository / MODEL / "1", x))
        assert ask(server, "/status/page.js", Host=own, Origin=f"http://{own}")[0] == 200
    # Of another port of this machine, of elsewhere, of a file, and of a name that leads here.
    evil = f"evil.example:{port}"
    assert post(path, Origin="http://localhost:1")[0] == 403
    assert post(path, Origin="https://evil.example")[0] == 403
    assert post(path, Origin="null")[0] == 403
    assert post(path, Host=evil, Origin=f"http://{evil}")[0] == 403
    assert post(f"/v2/repository/models/{MODEL}/unload", Origin=f"http://{host}")[0] == 403
    for asked in (*FILES, "/status/data", f"/status/weights/{MODEL}/1"):
        status, body, _ = ask(server, asked, Host=evil)
        assert (status, "forward the port" in json.loads(body)["error"]) == (403, True)
