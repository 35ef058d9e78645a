"""Start, stop and load of a real server process."""

import concurrent.futures
import threading

import numpy as np
import pytest

import forked
from aqt_client import Client, ClientError, RetryPolicy
from bundles import FEATURES, reference, write_linear
from server_process import WAIT_S, serving

pytestmark = pytest.mark.slow

X = np.random.default_rng(0).normal(size=(40, FEATURES)).astype(np.float32)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    write_linear(root / "m" / "1")
    return root


def test_concurrent_clients_with_random_batches_get_the_bits_of_training(repository, tmp_path):
    expected = reference(repository / "m" / "1", X)

    def one_client(seed):
        rng = np.random.default_rng(seed)
        wrong = 0
        with Client(server.address) as client:
            for _ in range(60):
                pick = rng.integers(0, len(X), rng.integers(1, 90))
                found = client.infer("m", {"x": X[pick]})["y"]
                wrong += int((found.view(np.uint32) != expected[pick].view(np.uint32)).sum())
        return wrong

    with (
        serving(repository, log=tmp_path / "log") as server,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        assert list(pool.map(one_client, range(8))) == [0] * 8


def test_sigterm_under_load_answers_what_was_accepted(repository, tmp_path):
    expected = reference(repository / "m" / "1", X)
    under_way = threading.Barrier(5)
    failures = []

    def one_client():
        with Client(server.address, retry=RetryPolicy(max_attempts=1)) as client:
            client.infer("m", {"x": X})
            under_way.wait(WAIT_S)
            while True:
                try:
                    found = client.infer("m", {"x": X})["y"]
                except ClientError as error:
                    failures.append(error)
                    return
                assert (found.view(np.uint32) == expected.view(np.uint32)).all()

    with (
        serving(repository, log=tmp_path / "log", forked=False) as server,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        clients = [pool.submit(one_client) for _ in range(4)]
        under_way.wait(WAIT_S)
        assert server.terminate() == 0
        for client in clients:
            client.result(WAIT_S)
    # Refused at the door: gRPC answers CANCELLED to what arrives at the very moment it stops.
    assert len(failures) == 4
    assert {error.code.name for error in failures} <= {"UNAVAILABLE", "CANCELLED"}
    assert "Traceback" not in server.log()
    assert "cut off" not in server.log()


def test_a_restart_compiles_nothing_again(repository, tmp_path):
    cache = tmp_path / "cache"
    entries = []
    for attempt in range(2):
        log = tmp_path / f"log{attempt}"
        with serving(repository, "--compilation-cache", str(cache), log=log) as server:
            server.terminate()
        entries.append({f.name for f in cache.iterdir() if f.suffix == ".compiled"})
    assert entries[0]
    assert entries[1] == entries[0]


def test_metrics_can_be_turned_off(repository, tmp_path):
    with serving(repository, "--metrics-port", "-1", log=tmp_path / "log") as server:
        assert server.terminate() == 0
        assert server.metrics_url is None


def test_a_taken_port_is_an_error(repository, tmp_path):
    with serving(repository, log=tmp_path / "log", ready=False) as server:
        port = server.address.split(":")[1]
        second = _fail("--model-repository", str(repository), "--port", port)
        assert f"cannot listen on 127.0.0.1:{port}" in second
        port = server.metrics_url.split(":")[2].split("/")[0]
        third = _fail("--model-repository", str(repository), "--port", "0", "--metrics-port", port)
        assert f"cannot listen on 127.0.0.1:{port} for metrics" in third


def test_wrong_settings_name_themselves(tmp_path):
    missing = str(tmp_path / "nowhere")
    assert f"--model-repository {missing} is no directory" in _fail("--model-repository", missing)
    assert "--port is wrong (got 'many')" in _fail("--port", "many")
    assert "--queue-rows is wrong (got '0')" in _fail("--queue-rows", "0")
    assert "unrecognized arguments: --colour" in _fail("--model-repository", ".", "--colour", "1")
    assert "--poll-s is wrong (got '0')" in _fail("--model-repository", ".", "--poll-s", "0")
    assert "--model-control is wrong (got 'often')" in _fail("--model-control", "often")
    load = ("--model-repository", str(tmp_path), "--load-model", "m")
    assert "--load-model needs --model-control explicit, and it is poll" in _fail(*load)
    assert "--load-model m is not in" in _fail(*load, "--model-control", "explicit")
    assert "AQT_PORT is wrong (got '70000')" in _fail(AQT_PORT="70000")


def test_the_command_shows_its_settings():
    def shown(*flags):
        done = forked.aqt("serve", *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "--max-batch-rows ROWS" in shown("--help")
    assert "port = 7  # --port" in shown("--model-repository", "x", "--port", "7", "--print-config")


def _fail(*flags, **variables):
    result = forked.aqt("serve", *flags, **variables)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr
