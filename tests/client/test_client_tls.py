"""Encrypted connections of both clients, to servers that have certificates of their own."""

import dataclasses
import shutil
import subprocess

import grpc
import numpy as np
import pytest
import typer
import typer.testing

import aqt_client
from aqt_cli.predict import predict
from client.connecting import BOTH
from client.fake_server import BOUND_S, FakeServer

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl makes the certificates and is not installed"
)

ONCE = aqt_client.RetryPolicy(max_attempts=1)


@dataclasses.dataclass(frozen=True)
class Identity:
    """A private key, and a certificate that it has signed itself; both PEM."""

    key: bytes
    certificate: bytes


def identity(folder, *names):
    """An identity for `names`, such as DNS:localhost or IP:127.0.0.1."""
    folder.mkdir()
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=test"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-addext", f"subjectAltName={','.join(names)}"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
        timeout=BOUND_S,
    )
    return Identity(key.read_bytes(), certificate.read_bytes())


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return identity(tmp_path_factory.mktemp("tls") / "own", "DNS:localhost", "IP:127.0.0.1")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return identity(tmp_path_factory.mktemp("tls") / "other", "DNS:elsewhere.example")


def served_by(who, *, clients=None):
    """Credentials of a server that is `who`, and that lets in only `clients`, None: everyone."""
    return grpc.ssl_server_credentials(
        [(who.key, who.certificate)],
        root_certificates=None if clients is None else clients.certificate,
        require_client_auth=clients is not None,
    )


def trusting(who):
    return grpc.ssl_channel_credentials(root_certificates=who.certificate)


@BOTH
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_an_encrypted_call_is_answered(connect, own, host):
    array = np.arange(2**20, dtype=np.float64)  # 8 MiB: the message limits hold here too
    with (
        FakeServer(credentials=served_by(own)) as server,
        connect(f"{host}:{server.port}", credentials=trusting(own)) as client,
    ):
        assert client.is_live()
        assert client.infer("identity", {"x": array})["x"].tobytes() == array.tobytes()


@BOTH
def test_a_server_that_is_not_trusted_gets_no_request(connect, own, other):
    with (
        FakeServer(credentials=served_by(own)) as server,
        connect(server.address, credentials=trusting(other), retry=ONCE) as client,
        pytest.raises(aqt_client.Unavailable, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        client.is_live()
    assert server.calls == []


@BOTH
def test_a_certificate_for_another_name_is_not_trusted(connect, other):
    with (
        FakeServer(credentials=served_by(other)) as server,
        connect(server.address, credentials=trusting(other), retry=ONCE) as client,
        pytest.raises(aqt_client.Unavailable, match="Hostname Verification"),
    ):
        client.is_live()
    assert server.calls == []


@BOTH
@pytest.mark.parametrize("encrypted", ["server", "client"])
def test_one_side_alone_cannot_encrypt(connect, own, encrypted):
    credentials = {"server": (served_by(own), None), "client": (None, trusting(own))}[encrypted]
    with (
        FakeServer(credentials=credentials[0]) as server,
        connect(server.address, credentials=credentials[1], retry=ONCE) as client,
        pytest.raises(aqt_client.Unavailable),
    ):
        client.is_live()
    assert server.calls == []


@BOTH
def test_a_server_can_ask_who_calls(connect, own, other):
    known = grpc.ssl_channel_credentials(own.certificate, other.key, other.certificate)
    with FakeServer(credentials=served_by(own, clients=other)) as server:
        with connect(server.address, credentials=known) as client:
            assert client.is_live()
        with (
            connect(server.address, credentials=trusting(own), retry=ONCE) as client,
            pytest.raises(aqt_client.Unavailable),
        ):
            client.is_live()
    assert len(server.calls) == 1


@BOTH
def test_several_servers_are_encrypted_too(connect, own):
    with (
        FakeServer(credentials=served_by(own)) as one,
        FakeServer(credentials=served_by(own)) as other,
    ):
        addresses = [f"localhost:{one.port}", f"localhost:{other.port}"]
        with connect(addresses, credentials=trusting(own), token="secret") as client:
            assert client.infer("identity", {"x": np.arange(3)}).exact
        (call,) = one.calls + other.calls
        assert call.metadata["authorization"] == "Bearer secret"


def test_predict_shows_its_certificate(own, tmp_path):
    (tmp_path / "certificate.pem").write_bytes(own.certificate)
    (tmp_path / "key.pem").write_bytes(own.key)
    np.savez(tmp_path / "x.npz", x=np.ones((1, 3), np.float32))
    app = typer.Typer()
    app.command()(predict)
    with FakeServer(credentials=served_by(own, clients=own)) as server:
        server.model.inputs.add(name="x", datatype="FP32", shape=[-1, 3])
        given = ("identity", "--inputs", tmp_path / "x.npz", "--timeout", 5)
        given += ("--server", f"localhost:{server.port}", "--ca", tmp_path / "certificate.pem")
        mine = ("--certificate", tmp_path / "certificate.pem", "--key", tmp_path / "key.pem")
        runner = typer.testing.CliRunner()
        done = runner.invoke(app, [str(word) for word in (*given, *mine)])
        assert done.exit_code == 0, done.output
        assert runner.invoke(app, [str(word) for word in (*given, "--timeout", 0.5)]).exit_code == 1
