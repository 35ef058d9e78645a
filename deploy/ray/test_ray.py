"""Two replicas behind Ray Serve, asked by many clients while one of them is killed.

Run by `make ray-test`, in an environment of its own.
"""

import collections
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import serving
from ray import serve

from aqt_client import Client, ClientError, NotFound
from bundles import FEATURES, reference, write_linear

CLIENTS = 8
KILLED_AFTER_S = 3
ASKED_S = 20
BOUND_S = 240
RECORD = Path("out/ray/record.json")
X = np.random.default_rng(0).normal(size=(64, FEATURES)).astype(np.float32)

pytestmark = pytest.mark.timeout(600)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    write_linear(root / "linear" / "1")
    return root


@pytest.fixture(scope="module")
def address(repository, tmp_path_factory):
    here = str(Path(__file__).parent)
    environment = {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    # More than there are, as the controller and the proxy ask for some.
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    port = free_port()
    serve.start(
        http_options={"host": "127.0.0.1", "port": free_port()}, grpc_options=serving.grpc(port)
    )
    serve.run(serving.application(str(repository)))
    yield f"127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def replicas():
    """Processes of replicas that this test started, by their ids."""
    found = psutil.process_iter(["pid", "cmdline"])
    lines = {p.info["pid"]: " ".join(p.info["cmdline"] or ()) for p in found}
    return {pid for pid, line in lines.items() if line.startswith("ray::ServeReplica:default")}


def test_an_error_keeps_its_status(address):
    with Client(address) as client:
        assert client.is_model_ready("linear")
        with pytest.raises(NotFound, match="no model 'nothing'"):
            client.infer("nothing", {"x": X[:1]})


def test_no_answer_is_wrong_while_a_replica_is_killed(address, repository):
    expected = reference(repository / "linear" / "1", X)
    counts, lock, ends = collections.Counter(), threading.Lock(), time.monotonic() + ASKED_S

    def ask(seed):
        rng = np.random.default_rng(seed)
        with Client(address) as client:
            while time.monotonic() < ends:
                pick = rng.integers(0, len(X), rng.integers(1, 17))
                try:
                    found = client.infer("linear", {"x": X[pick]})["y"]
                except ClientError as error:
                    outcome = f"error {error.code.name}"
                else:
                    same = (found.view(np.uint32) == expected[pick].view(np.uint32)).all()
                    outcome = "right" if same else "wrong"
                with lock:
                    counts[outcome] += 1

    before = replicas()
    assert len(before) == 2
    clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(KILLED_AFTER_S)
    asked_before = counts["right"]
    os.kill(min(before), signal.SIGKILL)
    killed = time.monotonic()
    for client in clients:
        client.join(BOUND_S)
    assert not any(client.is_alive() for client in clients)
    while len(replicas()) != 2:
        assert time.monotonic() < killed + BOUND_S, "Ray started no replica in its place"
        time.sleep(0.1)
    again = time.monotonic() - killed
    record = {"clients": CLIENTS, "seconds": ASKED_S, "answers": dict(counts)}
    record |= {"answers_before_the_kill": asked_before, "two_replicas_again_within_s": again}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1))
    print(f"\n{json.dumps(record)}")
    assert counts["wrong"] == 0
    assert counts["right"] > asked_before > 0
    assert replicas() != before
