"""The image of the target `cpu`: built, run read-only as its own user, asked, and stopped.

Run by `make image-test`, as root, with buildah and debootstrap installed.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from container import BOUND_S, Container, configuration, unpacked

from aqt_client import Client, RetryPolicy, Unavailable
from aqt_engine import QuantMode, bundle, convert
from examples.digits.model import int8_model
from examples.digits.train import split_digits, train

IMAGE = "localhost/aqt:cpu"
BUILD_S = 1200
MOST_BYTES = 10**9
FLAGS = ("--port", "0", "--http-port", "0", "--metrics-port", "0", "--host", "127.0.0.1")

pytestmark = pytest.mark.timeout(BUILD_S)


@pytest.fixture(scope="module")
def config():
    subprocess.run([Path(__file__).parent / "build.sh"], check=True, timeout=BUILD_S)
    return configuration(IMAGE)


@pytest.fixture(scope="module")
def root(config):
    with unpacked(IMAGE) as folder:
        yield folder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """A repository with the digits bundle, and an empty volume that the image's user may write."""
    folder = tmp_path_factory.mktemp("volumes")
    images, model = split_digits()[0], int8_model(QuantMode.TRAIN)
    variables = train(model, images, epochs=2, on_epoch=lambda loss: None)
    example = {"image": images.images[:256]}
    convert.convert(int8_model, variables, example, folder / "models" / "digits" / "1")
    (folder / "cache").mkdir()
    os.chown(folder / "cache", 10001, 10001)
    for path in (folder, *folder.parents):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    return {"/models": folder / "models", "/var/cache/aqt": folder / "cache"}


@pytest.fixture(scope="module")
def witness(volumes):
    """What the training forward answered, with all rows of the bundle's witness."""
    return bundle.load(volumes["/models"] / "digits" / "1").witness


@contextlib.contextmanager
def running(root, config, volumes):
    container = Container(root, config, volumes, *FLAGS)
    try:
        end = time.monotonic() + BOUND_S
        while container.run("aqt", "health", "--server", container.told[0]).returncode:
            assert time.monotonic() < end, "the server did not become healthy"
        yield container
    finally:
        container.close()


@pytest.fixture(scope="module")
def container(root, config, volumes):
    with running(root, config, volumes) as found:
        yield found


def differing(answer, witness):
    return sum(
        int((answer[name].view(np.uint8) != expected.view(np.uint8)).sum())
        for name, expected in witness.outputs.items()
    )


def test_it_says_how_it_is_run(config):
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"] == ["CMD", "aqt", "health"]
    assert config["StopSignal"] == "SIGTERM"
    assert set(config["Volumes"]) == {"/var/cache/aqt"}
    assert set(config["ExposedPorts"]) == {"8000/tcp", "8001/tcp", "8002/tcp"}


def test_it_is_small_and_keeps_nothing_of_the_build(root):
    size = sum(p.lstat().st_size for p in root.rglob("*") if not p.is_dir())
    print(f"\nthe image has {size / 1e6:.0f} MB")
    assert size < MOST_BYTES
    for left in ("etc/pip.conf", "opt/pip", "build", "wheel", "src"):
        assert not (root / left).exists(), left
    assert not list((root / "opt/aqt/lib").glob("*/site-packages/pip"))


def test_it_answers_with_the_bits_of_training(container, witness):
    with Client(container.told[0]) as client:
        answer = client.infer("digits", witness.inputs)
    assert answer.exact
    assert differing(answer, witness) == 0


def test_it_has_what_is_compiled(root, container):
    assert container.run("python", "-c", "import aqt_server._door").returncode == 0
    assert list(root.glob("opt/aqt/lib/*/site-packages/aqt_engine/kernels/native/*.so"))


def test_it_runs_without_rights_and_writes_to_its_volume_only(container):
    status = Path(f"/proc/{container.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["10001"] * 4
    assert fields["Gid"].split() == ["10001"] * 4
    assert fields["NSpid"].split()[-1] == "1"
    assert {int(fields[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff")} == {0}
    for folder in ("/", "/opt/aqt", "/models", "/var/lib"):
        assert container.run("touch", f"{folder}/new").returncode, folder
    assert "Read-only file system" in container.run("touch", "/var/lib/new").stderr
    assert not container.run("touch", "/var/cache/aqt/new", "/tmp/new").returncode


def test_a_second_start_compiles_nothing(root, config, volumes, container):
    with (
        running(root, config, volumes) as again,
        urllib.request.urlopen(again.told[2], timeout=BOUND_S) as response,
    ):
        metrics = response.read().decode()
    counts = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[:4] == "aqt_")
    assert float(counts["aqt_compilation_cache_hits_total"]) > 0
    assert float(counts["aqt_compilation_cache_misses_total"]) == 0


def test_it_is_stopped_gracefully(root, config, volumes, witness):
    answers, refused = [], threading.Event()

    def ask(address):
        with Client(address, retry=RetryPolicy(max_attempts=1)) as client:
            while True:
                try:
                    answers.append(differing(client.infer("digits", witness.inputs), witness))
                except Unavailable:
                    return refused.set()

    with running(root, config, volumes) as stopping:
        clients = [threading.Thread(target=ask, args=(stopping.told[0],)) for _ in range(4)]
        for client in clients:
            client.start()
        end = time.monotonic() + BOUND_S
        while len(answers) < 20:
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(stopping.pid, signal.SIGTERM)
        assert stopping.wait() == 0
        for client in clients:
            client.join(BOUND_S)
    # Nobody was cut off: any error but UNAVAILABLE would have ended a thread without a word.
    assert refused.is_set()
    assert not any(client.is_alive() for client in clients)
    assert not any(answers)
