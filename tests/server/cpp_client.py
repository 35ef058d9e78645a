"""The C++ client, built and run against real servers: `make cpp-test`.

It needs CMake, a C++ compiler and gRPC for C++, which on Debian come by
`apt-get install cmake g++ libgrpc++-dev protobuf-compiler-grpc`, and is no part of `make test`.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from aqt_protos.tensors import DATATYPES, from_raw
from bundles import FEATURES, reference
from client.fake_server import HANG, FakeServer, identity
from documentation import blocks
from server.certificates import Authority
from server.messages import MODEL, x_of
from server.odd_bundles import ARRAY_DATATYPES, TYPED_DATATYPES
from server.test_datatypes import values
from server_process import WAIT_S, serving

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "clients" / "cpp"
TOKEN = "token-of-cpp-123456"
BUILD_S = 1200

pytestmark = pytest.mark.timeout(BUILD_S)


def cmake(*arguments):
    done = subprocess.run(
        ["cmake", *map(str, arguments)], capture_output=True, text=True, timeout=BUILD_S
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def build():
    """The folder in which all is built; kept, so that only what has changed is compiled again."""
    lacking = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    assert not lacking, f"there is no {lacking[0]}: apt-get install cmake g++"
    folder = ROOT / "out" / "cpp"
    cmake("-S", CLIENT, "-B", folder, "-DAQT_CLIENT_BUILD_TESTS=ON")
    cmake("--build", folder, "--parallel", os.cpu_count())
    return folder


@pytest.fixture
def start(build, tmp_path):
    """Starts a scenario of test/scenarios.cc in a folder of its own."""

    def started(scenario, *addresses, **given):
        given = {"addresses": ",".join(addresses), "folder": tmp_path, **given}
        arguments = [f"{name}={value}" for name, value in given.items()]
        command = [build / "scenarios", scenario, *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )

    return started


@pytest.fixture
def run(start):
    """Runs one to its end; returns what it printed, by the first word of each line."""

    def ran(scenario, *addresses, **given):
        process = start(scenario, *addresses, **given)
        out, err = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, out + err
        return dict(line.split(" ", 1) for line in out.splitlines())

    return ran


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "tokens").write_text(f'cpp = "{TOKEN}"\n')
    with serving(repository, f"--auth-tokens={folder / 'tokens'}", log=folder / "log") as running:
        yield running


@pytest.fixture
def asked(repository, tmp_path):
    """One row, as the file `x` of the scenario's folder, and the bits of its answer, `expected`."""
    x = x_of(1)
    expected = reference(repository / MODEL / "1", x).tobytes()
    (tmp_path / "x").write_bytes(x.tobytes())
    (tmp_path / "expected").write_bytes(expected)
    return expected


def test_every_datatype_comes_back_in_the_same_bits(run, server, tmp_path):
    sent = {name: values(name).tobytes() for name in ARRAY_DATATYPES}
    for name, raw in sent.items():
        (tmp_path / name).write_bytes(raw)
    shape = "x".join(map(str, values("FP32").shape))
    found = run("datatypes", server.address, token=TOKEN, shape=shape, only="OUT_BF16")
    assert {n: (tmp_path / f"OUT_{n}.back").read_bytes() for n in sent} == sent
    assert found == {"only": "OUT_BF16"}


@pytest.mark.parametrize("elements", [1, 3, 100])
def test_typed_contents_and_short_ones_are_read_too(run, tmp_path, elements):
    """Of other servers; and contents that are not in memory of their own."""
    sent = {name: values(name).ravel()[:1].repeat(elements) for name in TYPED_DATATYPES}
    for name, array in sent.items():
        (tmp_path / name).write_bytes(array.tobytes())

    def typed(request):
        response = identity(request)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
            datatype = DATATYPES[output.datatype]
            array = from_raw(raw, datatype, output.shape)
            getattr(output.contents, datatype.contents).extend(array.tolist())
        del response.raw_output_contents[:]
        return response

    with FakeServer() as fake:
        for answer in (identity, typed):
            fake.answer = answer
            run("datatypes", fake.address, shape=elements)
            for name, array in sent.items():
                back = tmp_path / f"{name}.back"
                assert back.read_bytes() == array.tobytes(), (name, answer)
                back.unlink()


def test_bytes_come_back_and_a_wrong_question_is_named(run):
    with FakeServer() as fake:
        found = run("bytes", fake.address)
    assert found["same"] == "1"
    assert found["as_float"] == "output 'b' is of BYTES, and was asked for as FP32"
    assert found["absent"] == "no output 'c' in the answer, which has b"


def wrong_answers():
    def answers(**fields):
        def answer(request):
            response = identity(request)
            response.outputs[0].MergeFrom(type(response.outputs[0])(**fields))
            return response

        return answer

    def no_bool(request):
        response = identity(request)
        response.outputs[0].datatype = "BOOL"
        response.raw_output_contents[0] = b"\x02" * FEATURES
        return response

    def cut(request):
        response = identity(request)
        response.outputs[0].datatype = "BYTES"
        response.raw_output_contents[0] = b"\xff\xff\xff\xff"
        return response

    def out_of_range(request):
        response = identity(request)
        response.outputs[0].datatype = "INT8"
        response.outputs[0].contents.int_contents.extend([128] * FEATURES)
        del response.raw_output_contents[:]
        return response

    return {
        "is not a datatype": answers(datatype="FP8"),
        "takes 48 bytes, got 24": answers(datatype="FP64"),
        "has a negative size": answers(shape=[-1]),
        "more elements than memory": answers(shape=[2**40, 2**40]),
        "neither 0 nor 1": no_bool,
        "ends in element 0": cut,
        "out of the range": out_of_range,
    }


@pytest.mark.parametrize("sentence", wrong_answers())
def test_an_answer_that_breaks_the_protocol_is_named(run, asked, sentence):
    with FakeServer() as fake:
        fake.answer = wrong_answers()[sentence]
        found = run("once", fake.address)["once"]
    assert found.startswith("INTERNAL 0 the server's answer breaks the protocol: output 'x': ")
    assert sentence in found


def test_an_answer_has_the_bits_of_training_and_says_so(run, server, asked, tmp_path):
    found = run("told", server.address, token=TOKEN)
    assert (tmp_path / "y").read_bytes() == asked
    assert (found["answer"], found["exact"]) == (f"{MODEL} 1 an id", "yes")


def test_parameters_are_sent_as_what_they_are(run, asked):
    with FakeServer() as fake:
        found = run("told", fake.address, token=TOKEN)
        (call,) = fake.calls
    sent = {
        k: getattr(v, v.WhichOneof("parameter_choice")) for k, v in call.request.parameters.items()
    }
    assert sent == {
        "priority": 1, "timeout": 20_000_000, "text": "t", "half": 0.5, "less": -1, "yes": True,
    }  # fmt: skip
    assert call.metadata["authorization"] == f"Bearer {TOKEN}"
    assert 0 < call.remaining_s <= 30
    assert found["parameters"] == "2"


def test_it_asks_what_there_is(run, server):
    assert run("asked", server.address, token=TOKEN) == {
        "live": "1",
        "ready": "1",
        "model_ready": "11",
        "server": "aqt_server",
        "versions": "1",
        "input": f"x FP32 -1 {FEATURES}",
        "state": "READY",
    }


def test_errors_have_their_status_or_are_found_before_anything_is_sent(run, server, asked):
    found = run("errors", server.address, token=TOKEN, attempts=1)
    assert found["unknown"].startswith("NOT_FOUND 0 there is no model 'nope'")
    assert found["bytes"].startswith("INVALID_ARGUMENT 0 ")
    assert "'BYTES'" in found["bytes"]
    assert found["priority"].startswith("INVALID_ARGUMENT 0 parameter 'priority'")
    assert found["deadline"].startswith("DEADLINE_EXCEEDED 0 no answer within 0.000001 s: ")
    assert found["shape"] == f"input 'x' of shape [2, 2] takes 4 elements, got {FEATURES}"
    assert found["negative"] == "shape [-1, 6] has a negative size: give each"
    assert found["timeout"] == "`timeout` has to be positive"
    assert found["addresses"] == "`addresses` is empty: give one or more of the form 'host:port'"
    assert "'127.0.0.1', which is no 'host:port'" in found["address"]
    assert "both IPv4 and IPv6" in found["families"]
    assert "send fewer rows" in found["large"]
    assert run("once", server.address)["once"].startswith("UNAUTHENTICATED 0 ")


def test_a_deadline_ends_a_call_at_the_server_too(run, asked):
    with FakeServer() as fake:
        fake.script.append(HANG)
        found = run("once", fake.address, timeout=200)["once"]
        assert found.startswith("DEADLINE_EXCEEDED 0 no answer within 0.2 s: ")
        assert fake.abandoned.wait(WAIT_S)
        # What an earlier attempt failed with says more.
        fake.script.extend([(grpc.StatusCode.UNAVAILABLE, "it loads"), HANG])
        assert run("once", fake.address, timeout=1000)["once"] == "UNAVAILABLE 0 it loads"


def told_to_wait(seconds):
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(round(seconds * 1e3))
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    status.details.add().Pack(info)
    details = ("grpc-status-details-bin", status.SerializeToString())
    return (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", details)


def test_it_comes_again_when_the_server_says(run, asked):
    with FakeServer() as fake:
        fake.script.append(told_to_wait(0.25))
        began = time.monotonic()
        assert run("once", fake.address)["once"] == "succeeded"
        assert time.monotonic() - began >= 0.25
        assert len(fake.calls) == 2
        fake.script.append(told_to_wait(0.25))
        assert run("once", fake.address, attempts=1)["once"] == (
            "RESOURCE_EXHAUSTED 250 the queue is full"
        )
        # Not where the answer would come too late, nor where to come again is vain.
        fake.script.append(told_to_wait(3600))
        assert run("once", fake.address)["once"].startswith("RESOURCE_EXHAUSTED 3600000 ")
        fake.script.append((grpc.StatusCode.RESOURCE_EXHAUSTED, "message larger than max"))
        assert run("once", fake.address)["once"].startswith("RESOURCE_EXHAUSTED 0 message larger")
        assert len(fake.calls) == 5


def test_a_stream_answers_in_order_and_one_that_fails_ends_no_other(run, server, asked):
    found = run("stream", server.address, token=TOKEN)
    assert found["b"].startswith("NOT_FOUND 0 there is no model 'nope'")
    assert (found["same"], found["last"], found["over"]) == ("201", "c199", "1")
    assert found["first"] == "1"
    assert found["late"].startswith("DEADLINE_EXCEEDED ")
    assert found["takes"] == "0"


def test_a_replica_that_is_killed_under_load_fails_no_call(
    start,
    server,
    repository,
    asked,
    tmp_path,
):
    with serving(repository, log=tmp_path / "log") as other:
        addresses = [server.address, other.address]
        with start("load", *addresses, token=TOKEN, each=500) as process:
            assert process.stdout.readline() == "begun\n"
            other.kill()
            out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    assert out.splitlines() == ["answered 2000", "wrong 0"]


def test_calls_go_round(run):
    with FakeServer() as one, FakeServer() as other:
        run("turns", one.address, other.address, calls=200)
        taken = sorted((len(one.calls), len(other.calls)))
    assert sum(taken) == 200
    assert taken[0] >= 50  # at first one of them may not be connected yet


def test_a_server_that_loads_or_stops_gets_no_call(run):
    with FakeServer() as one, FakeServer(serving=False) as other:
        run("turns", one.address, other.address, calls=20)
        assert (len(one.calls), len(other.calls)) == (20, 0)


def test_tls_and_who_calls_by_their_certificate(run, repository, asked, tmp_path):
    authority = Authority()
    for name, signer in (("server", authority), ("client", authority), ("stranger", Authority())):
        key, certificate = signer.sign(name)
        (tmp_path / f"{name}-key").write_bytes(key)
        (tmp_path / f"{name}-certificate").write_bytes(certificate)
    ca = tmp_path / "ca"
    ca.write_bytes(authority.pem)
    flags = (
        f"--tls-certificate={tmp_path / 'server-certificate'}",
        f"--tls-key={tmp_path / 'server-key'}",
        f"--tls-client-ca={ca}",
    )

    def who(name):
        return {
            "ca": ca,
            "key": tmp_path / f"{name}-key",
            "certificate": tmp_path / f"{name}-certificate",
        }

    known = grpc.ssl_channel_credentials(
        ca.read_bytes(), *(file.read_bytes() for file in list(who("client").values())[1:])
    )
    with serving(repository, *flags, log=tmp_path / "log", credentials=known) as server:
        assert run("once", server.address, **who("client"))["once"] == "succeeded"
        assert (tmp_path / "y").read_bytes() == asked
        for refused in (
            {"ca": ca},
            who("stranger"),
            who("client") | {"ca": tmp_path / "stranger-certificate"},
            {},
        ):
            found = run("once", server.address, attempts=1, **refused)["once"]
            assert found.startswith("UNAVAILABLE 0 "), refused


def test_another_project_finds_what_was_installed(build, tmp_path):
    """As the README says, with its example, against a server that knows the digit."""
    cmake("--install", build, "--prefix", tmp_path / "installed")
    project = tmp_path / "project"
    project.mkdir()
    (said,) = (b.text for b in blocks(CLIENT / "README.md") if b.language == "cmake")
    head = "cmake_minimum_required(VERSION 3.22)\nproject(app CXX)\nadd_executable(app digits.cc)\n"
    (project / "CMakeLists.txt").write_text(head + said)
    shutil.copy(CLIENT / "examples" / "digits.cc", project)
    where = (
        "-S",
        project,
        "-B",
        project / "build",
        f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}",
    )
    cmake(*where)
    cmake("--build", project / "build")

    def answer(request):
        response = identity(request)
        (image,) = response.raw_output_contents
        assert np.frombuffer(image, np.float32).reshape(8, 8)[0].tolist() == [
            0,
            0,
            0,
            16,
            16,
            0,
            0,
            0,
        ]
        response.raw_output_contents[0] = np.int32(1).tobytes()
        output = response.outputs[0]
        output.name, output.datatype, output.shape[:] = "digit", "INT32", [1]
        return response

    with FakeServer() as fake:
        fake.answer = answer
        told = subprocess.run(
            [project / "build" / "app", fake.address],
            capture_output=True, text=True, timeout=WAIT_S, check=True,
        )  # fmt: skip
    assert told.stdout == "digit 1, exact\n"
