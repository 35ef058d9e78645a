"""kill -9 at any moment of a conversion, of a load and of serving; damage, and full disks.

`make faults` kills many times as often.
"""

import contextlib
import os
import random
import resource
import secrets
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from aqt_client import Client, ClientError
from aqt_engine import bundle
from bundles import reference, write_linear
from faults.amount import amount
from server.messages import MODEL, x_of
from server_process import AQT, WAIT_S, ServerProcess, environment, eventually, serving

pytestmark = pytest.mark.slow

X = x_of(5)


@pytest.fixture(scope="module")
def drawn():
    seed = int(os.environ.get("AQT_SEED") or secrets.randbelow(2**32))
    print(f"AQT_SEED={seed}")
    return random.Random(seed)


def assert_exact(client, model, expected):
    found = client.infer(model, {"x": X})["y"]
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


MODULE = """
import flax.linen as nn
from aqt_engine import QuantMode, config
from aqt_engine.flax import AqtDotGeneral
def model(mode=QuantMode.TRAIN):
    return nn.Dense(3, dot_general=AqtDotGeneral(config.fully_quantized(), rhs_quant_mode=mode))
"""
CHECKPOINT = """
import sys
import numpy as np, orbax.checkpoint as ocp
with ocp.StandardCheckpointer() as saving:
    saving.save(sys.argv[1], {"params": {"kernel": np.ones((6, 3), np.float32),
                                         "bias": np.ones(3, np.float32)}})
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = tmp_path_factory.mktemp("trained")
    (made / "trained.py").write_text(MODULE)
    np.savez(made / "example.npz", inputs=x_of(8))
    subprocess.run([AQT.parent / "python", "-c", CHECKPOINT, made / "checkpoint"], check=True)
    return made


def converting(trained, output):
    """A process that converts the model to `output`."""
    command = [AQT, "convert", "--model", "trained:model", "--checkpoint", trained / "checkpoint"]
    command += ["--example", trained / "example.npz", "--tile", "8", "--output", output]
    path = f"{trained}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        command, env=environment(PYTHONPATH=path), stderr=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def no_file_beyond(nbytes):
    """Processes that begin in the block cannot write a file of more bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_conversion_onto_a_full_disk_is_one_sentence_and_leaves_nothing(trained, tmp_path):
    """No file may grow beyond what the graph takes."""
    output = tmp_path / "m" / "1"
    with no_file_beyond(2048):
        process = converting(trained, output)
    with process:
        errors = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 1
    assert errors.splitlines()[-1] == f"aqt: [Errno 27] File too large: '{output}'"
    assert "Traceback" not in errors
    assert list(output.parent.iterdir()) == []


def test_a_conversion_that_is_killed_leaves_nothing_that_is_served(trained, tmp_path, drawn):
    folder = tmp_path / "repository" / "m"

    def convert():
        return converting(trained, folder / "1")

    def said(word):
        return lambda process: any(word in line for line in process.stderr)

    def writing(process):
        return process.poll() is not None or list(folder.glob(".1.*.writing"))

    def after(seconds):
        return lambda process: time.sleep(seconds) or True

    moments = [lambda p: eventually(lambda: writing(p))]
    moments += amount([], [said("Reading"), said("Tracing")])
    moments += [after(drawn.uniform(0, 6)) for _ in range(amount(0, 20))]
    for until in moments:
        with convert() as process:
            until(process)
            process.kill()
        # It may have ended just before it was killed, or been about to say so.
        if (folder / "1").exists():
            bundle.load(folder / "1")
            shutil.rmtree(folder / "1")
    with convert() as process:
        errors = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 0, errors
    bundle.load(folder / "1")
    assert list(folder.iterdir()) == [folder / "1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("killed")
    for seed in (1, 2):
        write_linear(made / "repository" / f"{MODEL}-{seed}" / "1", seed=seed)
    return made


def flags(root):
    return (
        *("--compilation-cache", str(root / "compiled"), "--bundle-cache", str(root / "copies")),
        *("--proof-s", "0", "--poll-s", "0.1"),
    )


def until_seen(directory, pattern):
    """Waits until there is a file of `pattern` in `directory`, looking all the time."""
    end = time.monotonic() + WAIT_S
    while not list(directory.glob(pattern)):
        assert time.monotonic() < end


def test_a_server_that_is_killed_serves_the_same_afterwards(root, drawn):
    """It copies from a store, and compiles; killed while it does either, and at drawn moments."""
    url = f"file://{root / 'repository'}"
    command = [AQT, "serve", "--model-repository", url, "--port", "0", *flags(root)]
    command += ["--metrics-port", "-1"]
    moments = [lambda: until_seen(root / "copies", "*")]
    moments += amount([], [lambda: until_seen(root / "compiled", "*.compiled")])
    for _ in range(amount(1, 40)):
        moments.append(lambda: time.sleep(drawn.uniform(0, 3)))
    for number, until in enumerate(moments):
        server = ServerProcess(command, root / f"log-{number}")
        try:
            until()
        finally:
            server.kill()
            server.process.stdout.close()
    with serving(url, *flags(root), log=root / "log") as server, Client(server.address) as client:
        for path in (root / "repository").iterdir():
            assert_exact(client, path.name, reference(path / "1", X))
        log = server.log()
        assert "refused" not in log
        assert "Traceback" not in log
        # What those that were killed had begun is gone.
        assert not list((root / "copies").glob(".*"))
        server.kill()


def _flip(drawn, file):
    content = bytearray(file.read_bytes())
    content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    file.write_bytes(content)


def _truncate(drawn, file):
    file.write_bytes(file.read_bytes()[: drawn.randrange(file.stat().st_size)])


def test_nothing_damaged_is_served(root, drawn):
    """Every file of a bundle, and every entry of the compilation cache, flipped or cut short."""
    repository = root / "damaged"
    whole = root / "repository" / f"{MODEL}-1" / "1"
    shutil.copytree(whole, repository / "whole" / "1")
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    harmed = {}
    for number, file in enumerate(files * amount(1, 5)):
        for damage in (_flip, _truncate):
            name = f"{damage.__name__.strip('_')}-{number}"
            copy = shutil.copytree(whole, repository / name / "1")
            if (copy / file).stat().st_size:
                damage(drawn, copy / file)
                harmed[name] = file
    with serving(root / "repository", *flags(root), log=root / "log-compiled"):
        entries = list((root / "compiled").glob("*.compiled"))
    assert entries
    for entry in entries:
        drawn.choice((_flip, _truncate))(drawn, entry)
    expected = reference(whole, X)
    with (
        serving(repository, *flags(root), log=root / "log-damaged") as server,
        Client(server.address) as client,
    ):
        assert_exact(client, "whole", expected)
        for name, file in harmed.items():
            with pytest.raises(ClientError) as raised:
                client.infer(name, {"x": X})
            assert raised.value.code.name == "FAILED_PRECONDITION"
            # Of a changed manifest, another format may have come.
            assert file.name in str(raised.value) or file.name == "manifest.json"
        assert server.log().count("is damaged, and is compiled again") >= 1
        assert_exact(client, "whole", expected)


def test_a_full_disk_costs_the_cache_and_the_log_and_no_request(root, tmp_path):
    """No file may grow beyond a few bytes, and the log is a device that is always full."""
    with no_file_beyond(64):
        server = ServerProcess(
            [
                *(AQT, "serve", "--model-repository", root / "repository", "--port", "0"),
                *("--compilation-cache", tmp_path / "compiled", "--proof-s", "0"),
                *("--metrics-port", "-1"),
            ],
            Path("/dev/full"),
        )
    try:
        server.wait_ready()
        with Client(server.address) as client:
            for path in (root / "repository").iterdir():
                assert_exact(client, path.name, reference(path / "1", X))
        assert list((tmp_path / "compiled").iterdir()) == []
        assert server.terminate() == 0
    finally:
        server.kill()
        server.process.stdout.close()
