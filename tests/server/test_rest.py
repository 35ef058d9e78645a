"""The HTTP door of a real server: stock clients, blocking and asyncio, and requests by hand."""

import asyncio
import gzip
import json
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.http as stock
import tritonclient.http.aio as stock_aio
import tritonclient.utils.shared_memory as shm

from aqt_protos.tensors import DATATYPES
from bundles import FEATURES, reference, write_linear
from engine.contractions import assert_same_bits
from server.messages import MODEL, x_of
from server.odd_bundles import ARRAY_DATATYPES, TILE, WIDTH, write_identity, write_stalling
from server_process import WAIT_S, eventually, serving

pytestmark = pytest.mark.slow

FLAGS = ("--http-port", "0", "--model-control", "explicit", "--load-model", "*")
LIMITS = ("--max-json-bytes", "20000", "--max-message-bytes", "100000", "--queue-rows", "2000")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    write_linear(root / MODEL / "1")
    write_linear(root / MODEL / "2", seed=2)
    write_identity(root / "identity" / "1")
    write_stalling(root / "stalling" / "1")
    return root


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(repository, *FLAGS, *LIMITS, "--drain-s", "0.5", log=log) as running:
        yield running
        assert "Traceback" not in running.log()


@pytest.fixture(scope="module")
def client(server):
    with stock.InferenceServerClient(server.http_url.removeprefix("http://")) as connected:
        yield connected


def stock_input(x, *, binary=True):
    tensor = stock.InferInput("x", x.shape, "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    return tensor


def ask(server, path, document=None, *, body=None, method=None, timeout=WAIT_S, **headers):
    """Status, document and headers; `document` or `body` make it a POST."""
    data = json.dumps(document).encode() if document is not None else body
    headers = {k.replace("_", "-"): v for k, v in headers.items()}
    request = urllib.request.Request(
        server.http_url + path, data=data, headers=headers, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            content, status, found = response.read(), response.status, response.headers
    except urllib.error.HTTPError as error:
        content, status, found = error.read(), error.code, error.headers
    return status, json.loads(content) if content else None, found


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 5, 33])
def test_a_stock_client_gets_the_bits_of_training(client, repository, rows, binary):
    x = x_of(rows)
    outputs = [stock.InferRequestedOutput("y", binary_data=binary)]
    for given in (outputs, None):
        result = client.infer(
            MODEL, [stock_input(x, binary=binary)], model_version="1", outputs=given, request_id="7"
        )
        response = result.get_response()
        assert (response["model_name"], response["model_version"]) == (MODEL, "1")
        assert response["id"] == "7"
        assert response["parameters"]["aqt_exact"] is True
        expected = reference(repository / MODEL / "1", x) if rows else np.zeros((0, 4), "f4")
        assert_same_bits(result.as_numpy("y").reshape(rows, 4), expected)


def test_the_asyncio_client_too_and_packed_bodies(server, repository):
    async def main():
        address = server.http_url.removeprefix("http://")
        async with stock_aio.InferenceServerClient(address) as client:
            assert await client.is_server_live()
            assert await client.is_model_ready(MODEL)
            x = x_of(9)
            for algorithm in (None, "gzip", "deflate"):
                result = await client.infer(
                    MODEL, [stock_input(x)], model_version="2",
                    request_compression_algorithm=algorithm,
                )  # fmt: skip
                assert_same_bits(result.as_numpy("y"), reference(repository / MODEL / "2", x))

    asyncio.run(asyncio.wait_for(main(), WAIT_S))


@pytest.mark.parametrize("binary", [True, False])
def test_every_datatype_comes_back_bit_for_bit(client, server, binary):
    rng = np.random.default_rng(0)
    inputs, sent = [], {}
    for name in ARRAY_DATATYPES:
        dtype = DATATYPES[name].dtype
        size = (TILE + 1, WIDTH)
        array = (
            rng.integers(0, 2, size).astype(bool)
            if name == "BOOL"
            else rng.normal(size=size, scale=50).astype(dtype)
            if dtype.kind in "fV"
            else rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, size, dtype, endpoint=True)
        )
        sent[name] = array
        document = {"name": name, "shape": list(size), "datatype": name}
        if binary:
            document["parameters"] = {"binary_data_size": array.nbytes}
        else:
            document["data"] = array.tolist()
        inputs.append(document)
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": binary}}).encode()
    tail = b"".join(a.tobytes() for a in sent.values()) if binary else b""
    request = urllib.request.Request(
        f"{server.http_url}/v2/models/identity/infer",
        data=head + tail,
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        body, length = response.read(), response.headers["Inference-Header-Content-Length"]
    assert (length is not None) == binary
    at = int(length) if binary else len(body)
    document = json.loads(body[:at])
    assert len(document["outputs"]) == len(sent)
    for output in document["outputs"]:
        array = sent[output["name"].removeprefix("OUT_")]
        if binary:
            size = output["parameters"]["binary_data_size"]
            found = np.frombuffer(body[at : at + size], array.dtype).reshape(array.shape)
            at += size
        else:
            found = np.array(output["data"], array.dtype).reshape(output["shape"])
        assert found.tobytes() == array.tobytes(), output["name"]


def test_health_metadata_configuration_and_statistics(client, server):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "2")
    assert not client.is_model_ready(MODEL, "3")
    assert not client.is_model_ready("unknown")
    assert ask(server, "/v2/models/unknown/ready")[0] == 503
    assert client.get_server_metadata()["name"] == "aqt_server"
    metadata = client.get_model_metadata(MODEL)
    assert metadata["versions"] == ["1", "2"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, FEATURES]}]
    config = client.get_model_config(MODEL, "1")
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert config["input"][0]["dims"] == [FEATURES]
    assert config["max_batch_size"] == 64
    client.infer(MODEL, [stock_input(x_of(3))], model_version="2")
    (found,) = client.get_inference_statistics(MODEL, "2")["model_stats"]
    assert found["inference_stats"]["success"]["count"] >= 1
    assert len(client.get_inference_statistics()["model_stats"]) == 4


def test_the_repository_is_listed_and_controlled(client, server):
    index = client.get_model_repository_index()
    assert {"name": MODEL, "version": "1", "state": "READY", "reason": ""} in index
    client.unload_model("identity")
    assert not client.is_model_ready("identity")
    ready = ask(server, "/v2/repository/index", {"ready": True})[1]
    assert {m["name"] for m in ready} == {MODEL, "stalling"}
    client.load_model("identity")
    assert client.is_model_ready("identity")
    status, answer, _ = ask(
        server, f"/v2/repository/models/{MODEL}/load", {"parameters": {"config": "{}"}}
    )
    assert (status, "'config' would change it" in answer["error"]) == (501, True)
    assert ask(server, "/v2/repository/models/nope/load", {})[0] == 404


def test_shared_memory(client, repository, tmp_path):
    x = x_of(4)
    key = f"/aqt-{tmp_path.name}"
    region = shm.create_shared_memory_region("rest", key, 4096)
    try:
        shm.set_shared_memory_region(region, [x])
        client.register_system_shared_memory("rest", key, 4096)
        (listed,) = client.get_system_shared_memory_status()
        assert listed == {"name": "rest", "key": key, "offset": 0, "byte_size": 4096}
        tensor = stock.InferInput("x", x.shape, "FP32")
        tensor.set_shared_memory("rest", x.nbytes)
        output = stock.InferRequestedOutput("y")
        output.set_shared_memory("rest", 64, offset=1024)
        result = client.infer(MODEL, [tensor], outputs=[output], model_version="1")
        assert result.get_output("y")["parameters"]["shared_memory_byte_size"] == 64
        found = shm.get_contents_as_numpy(region, np.float32, [4, 4], offset=1024)
        assert_same_bits(np.array(found), reference(repository / MODEL / "1", x))
        client.unregister_system_shared_memory("rest")
        assert client.get_system_shared_memory_status() == []
    finally:
        shm.destroy_shared_memory_region(region)


def test_trace_and_log_settings(client):
    assert client.get_trace_settings()["trace_level"] == ["OFF"]
    found = client.update_trace_settings(settings={"trace_rate": "3", "trace_level": ["OFF"]})
    assert found["trace_rate"] == "3"
    assert client.update_log_settings({"log_verbose_level": 1})["log_verbose_level"] == 1
    assert client.get_log_settings()["log_info"] is True


def test_classification(client):
    x = x_of(2)
    for binary in (True, False):
        output = stock.InferRequestedOutput("y", binary_data=binary, class_count=2)
        found = client.infer(MODEL, [stock_input(x)], outputs=[output]).as_numpy("y")
        assert np.asarray(found).size == 4


INPUT = {"name": "x", "shape": [1, FEATURES], "datatype": "FP32", "data": [0.0] * FEATURES}


def wrong(**changes):
    return {"inputs": [{**INPUT, **changes}]}


WRONG = {
    "no JSON": (b"{", 400, "the body is no JSON"),
    "no object": (b"[1]", 400, "no JSON object"),
    "deep": (b'{"inputs":' + b"[" * 9000, 400, "no JSON"),
    "empty": (b"", 400, "input 'x' is missing"),
    "inputs": ({"inputs": 1}, 400, "`inputs` is 1, and a list is needed"),
    "an input": ({"inputs": [1]}, 400, "list of objects"),
    "no name": ({"inputs": [{}]}, 400, "`name` is missing"),
    "a name": (wrong(name="z"), 400, "no input 'z'"),
    "shape": (wrong(shape=[1.5]), 400, "whole numbers"),
    "huge shape": (wrong(shape=[2**70]), 400, "whole numbers"),
    "rank": (wrong(shape=[6]), 400, r"has shape [6]"),
    "datatype": (wrong(datatype="FP99"), 400, "'FP99' is not a datatype"),
    "other datatype": (wrong(datatype="FP64"), 400, "takes FP32"),
    "too few": (wrong(data=[1.0]), 400, "raw bytes, got 4"),
    "text": (wrong(data=["a"] * 6), 400, "no FP32"),
    "nothing": (wrong(data=[None] * 6), 400, "no FP32"),
    "ragged": (wrong(data=[[1], [2, 3]]), 400, "input 'x'"),
    "too large a number": (wrong(data=[1e300] * 6), 400, "outside of FP32"),
    "no data": ({"inputs": [{k: v for k, v in INPUT.items() if k != "data"}]}, 400, "no `data`"),
    "parameter": ({**wrong(), "parameters": {"priority": [1]}}, 400, "'priority' of the request"),
    "id": ({**wrong(), "id": 7}, 400, "`id` is 7"),
    "output": ({**wrong(), "outputs": [{"name": "q"}]}, 400, "no output 'q'"),
    "binary size": (wrong(parameters={"binary_data_size": 24}), 400, "0 bytes are left"),
    "much JSON": ({**wrong(), "id": "x" * 30_000}, 400, "at most 20000"),
    "large": (b"x" * 200_000, 413, "larger than --max-message-bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_body_gets_its_status_and_a_sentence(server, name):
    content, status, sentence = WRONG[name]
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    found, document, headers = ask(server, f"/v2/models/{MODEL}/infer", body=body)
    assert (found, list(document)) == (status, ["error"])
    assert sentence in document["error"]
    assert headers["Content-Type"].startswith("application/json")


def test_wrong_headers_routes_and_methods(server):
    infer = f"/v2/models/{MODEL}/infer"
    body = json.dumps(wrong()).encode()
    for length in ("-1", "x", "9" * 30, str(len(body) + 1)):
        headers = {"Inference_Header_Content_Length": length}
        status, document, _ = ask(server, infer, body=body, **headers)
        assert (status, "the body has" in document["error"]) == (400, True)
    after = ask(server, infer, body=body + b"1234", Inference_Header_Content_Length=str(len(body)))
    assert (after[0], "4 bytes follow" in after[1]["error"]) == (400, True)
    assert ask(server, "/v2/models/nope/infer", wrong())[0] == 404
    assert ask(server, f"/v2/models/{MODEL}/versions/9/infer", wrong())[0] == 404
    assert ask(server, "/v2/models/..%2F..%2Fetc/infer", wrong())[0] == 404
    assert ask(server, "/v2/models/a%00b/infer", wrong())[0] == 404
    assert ask(server, "/v3")[:2] == (404, {"error": "there is nothing at GET /v3"})
    assert ask(server, "/status")[0] == 404  # as nobody asked for the page
    assert ask(server, infer)[0] == 405
    assert ask(server, "/v2/cudasharedmemory/status")[0] == 501
    status, document, _ = ask(server, infer, wrong(), Origin="https://elsewhere.example")
    assert (status, "web pages" in document["error"]) == (403, True)
    status, document, _ = ask(server, infer, wrong(), Content_Encoding="gzip")
    assert (status, "Content-Encoding" in document["error"]) == (400, True)
    bomb = gzip.compress(bytes(2**27))
    status, document, _ = ask(server, infer, body=bomb, Content_Encoding="gzip")
    assert (status, "larger than" in document["error"]) == (413, True)


def test_a_timeout_has_a_status_and_a_client_that_goes_away_leaves_the_queue(server):
    stall = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [42.0]}]}
    late = {**stall, "parameters": {"timeout": 500_000}}
    late["inputs"] = [{**stall["inputs"][0], "data": [1.0]}]
    path = "/v2/models/stalling/infer"

    async def main():
        address = server.http_url.removeprefix("http://")
        async with stock_aio.InferenceServerClient(address) as one:
            x = np.full((1, 1), 42, np.float32)
            running = asyncio.create_task(one.infer("stalling", [stock_input(x)]))
            # It computes for ever; what comes after it waits.
            await asyncio.to_thread(eventually, is_held_up)
            queued = asyncio.create_task(one.infer("stalling", [stock_input(x)]))
            await asyncio.to_thread(eventually, lambda: pending() == 1)
            queued.cancel()
            await asyncio.to_thread(eventually, lambda: pending() == 0)
            running.cancel()

    def is_held_up():
        try:
            return ask(server, path, late, timeout=5)[0] == 504
        except TimeoutError:  # it went into the same batch
            return False

    def pending():
        with urllib.request.urlopen(server.metrics_url, timeout=WAIT_S) as response:
            for line in response.read().decode().splitlines():
                if line.startswith("aqt_inference_pending_request_count") and "stalling" in line:
                    return float(line.split()[-1])
        return None

    asyncio.run(asyncio.wait_for(main(), WAIT_S))


def test_tokens_and_certificates_are_asked_for_here_too(repository, tmp_path):
    (tmp_path / "tokens").write_text('a = "a-token-of-somebody"\n')
    (tmp_path / "policy").write_text(
        f'[[allow]]\nprincipals = ["a"]\nactions = ["infer"]\nmodels = ["{MODEL}"]\n'
    )
    flags = ("--http-port", "0", "--auth-tokens", str(tmp_path / "tokens"))
    flags += ("--auth-policy", str(tmp_path / "policy"))
    with serving(repository, *flags, log=tmp_path / "log") as server:
        known = {"Authorization": "Bearer a-token-of-somebody"}
        infer = f"/v2/models/{MODEL}/infer"
        status, _, headers = ask(server, infer, wrong())
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert ask(server, infer, wrong(), Authorization="Bearer " + "z" * 20)[0] == 401
        assert ask(server, infer, wrong(), **known)[0] == 200
        assert ask(server, "/v2/models/identity", **known)[0] == 403
        assert ask(server, f"/v2/repository/models/{MODEL}/unload", {}, **known)[0] == 403
        index = ask(server, "/v2/repository/index", {}, **known)[1]
        assert {m["name"] for m in index} == {MODEL}
        assert ask(server, "/v2/health/ready")[0] == 200
