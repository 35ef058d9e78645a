"""Encryption, tokens, certificates and rules at the doors of a real server."""

import re
import socket
import ssl
import subprocess
import urllib.error
import urllib.request

import grpc
import pytest
import tritonclient.grpc as stock
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

import forked
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from bundles import reference, write_linear
from engine.contractions import assert_same_bits
from server.certificates import Authority
from server.messages import MODEL, raises_status, request_of, stock_input, x_of
from server_process import AQT, WAIT_S, eventually, serving

pytestmark = pytest.mark.slow

TEAM, OPS = "token-of-the-team-1234", "token-of-operations-1234"
POLICY = f"""
[[allow]]
principals = ["team"]
actions = ["infer"]
models = ["{MODEL}"]

[[allow]]
principals = ["ops"]
actions = ["read", "control", "metrics", "administer"]
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    write_linear(root / MODEL / "1")
    write_linear(root / "secret" / "1", seed=1)
    return root


@pytest.fixture
def files(tmp_path):
    """A directory with a certificate, tokens and rules, and the authority of the certificate."""
    authority = Authority()
    install(tmp_path, authority)
    (tmp_path / "tokens").write_text(f'team = "{TEAM}"\nops = "{OPS}"\n')
    (tmp_path / "policy").write_text(POLICY)
    (tmp_path / "ca").write_bytes(authority.pem)
    return tmp_path, authority


def install(directory, authority):
    key, certificate = authority.sign("server")
    (directory / "certificate").write_bytes(certificate)
    (directory / "key").write_bytes(key)


def flags(directory, **settings):
    """Flags that name the files of `directory` which are given by setting."""
    return [f"--{k.replace('_', '-')}={directory / v}" for k, v in settings.items()]


ENCRYPTED = {"tls_certificate": "certificate", "tls_key": "key"}
KNOWN = {"auth_tokens": "tokens", "auth_policy": "policy"}


def trusting(authority, identity=(None, None)):
    return grpc.ssl_channel_credentials(authority.pem, *identity)


def bearer(token):
    return (("authorization", f"Bearer {token}"),)


def get(url, *, token=None, context=None):
    """Status and body."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S, context=context) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_who_may_do_what_over_encrypted_connections(repository, files, tmp_path):
    directory, authority = files
    trust = trusting(authority)
    flag = flags(directory, **ENCRYPTED, **KNOWN)
    control = ("--model-control", "explicit", "--load-model", "*")
    with (
        serving(repository, *flag, *control, log=tmp_path / "log", credentials=trust) as server,
        stock.InferenceServerClient(server.address, ssl=True, creds=trust) as client,
        server.channel(trust) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        team, ops = ({"authorization": f"Bearer {t}"} for t in (TEAM, OPS))
        x = x_of(5)
        result = client.infer(MODEL, [stock_input(x)], headers=team)
        assert_same_bits(result.as_numpy("y"), reference(repository / MODEL / "1", x))
        # Nobody, somebody unknown, and somebody who may not.
        with raises_status("UNAUTHENTICATED", "authorization: Bearer"):
            client.infer(MODEL, [stock_input(x)])
        with raises_status("UNAUTHENTICATED", "not known here"):
            client.infer(MODEL, [stock_input(x)], headers={"authorization": "Bearer " + "x" * 20})
        with raises_status("PERMISSION_DENIED", "'team' may not infer on model 'secret'"):
            client.infer("secret", [stock_input(x)], headers=team)
        with raises_status("PERMISSION_DENIED", "'ops' may not infer"):
            client.infer(MODEL, [stock_input(x)], headers=ops)
        with raises_status("PERMISSION_DENIED", "'team' may not control"):
            client.unload_model(MODEL, headers=team)
        with raises_status("PERMISSION_DENIED", "'team' may not administer"):
            client.update_log_settings({"log_info": False}, headers=team)
        with raises_status("PERMISSION_DENIED", "'team' may not read on model 'secret'"):
            client.get_model_metadata("secret", headers=team)
        # Lists show what may be seen.
        index = client.get_model_repository_index(headers=team).models
        assert [m.name for m in index] == [MODEL]
        statistics = client.get_inference_statistics(headers=team).model_stats
        assert [m.name for m in statistics] == [MODEL]
        assert len(client.get_model_repository_index(headers=ops).models) == 2
        # In a stream, each request is asked about.
        requests = [request_of(x), request_of(x, model_name="secret")]
        one, two = stub.ModelStreamInfer(iter(requests), metadata=bearer(TEAM), timeout=WAIT_S)
        assert one.infer_response.outputs
        assert two.infer_response.parameters["aqt_status"].string_param == "PERMISSION_DENIED"
        (refused,) = stub.ModelStreamInfer(iter([request_of(x)]), timeout=WAIT_S)
        assert refused.infer_response.parameters["aqt_status"].string_param == "UNAUTHENTICATED"
        # Health and reflection are open, the metrics are not.
        assert client.is_server_ready()
        assert "inference.GRPCInferenceService" in (
            ProtoReflectionDescriptorDatabase(channel).get_services()
        )
        context = ssl.create_default_context(cadata=authority.pem.decode())
        assert get(server.metrics_url, context=context)[0] == 401
        assert get(server.metrics_url, token=TEAM, context=context)[0] == 403
        status, metrics = get(server.metrics_url, token=OPS, context=context)
        assert (status, "aqt_inference_count_total" in metrics) == (200, True)
        client.unload_model("secret", headers=ops)
        # No connection that is not encrypted.
        with raises_status("UNAVAILABLE", ".*"), server.channel(None) as plain:
            pb_grpc.GRPCInferenceServiceStub(plain).ServerLive(pb.ServerLiveRequest(), timeout=20)
        client.update_log_settings({"log_verbose_level": 1}, headers=ops)
        client.infer(MODEL, [stock_input(x)], headers=team)
        log = server.log()
        assert "answered 5 rows" in log
        assert not [t for t in (TEAM, OPS, "x" * 20) if t in log]
        assert "Traceback" not in log


def test_a_renewed_certificate_and_new_tokens_need_no_restart(repository, files, tmp_path):
    directory, authority = files
    flag = flags(directory, **ENCRYPTED, auth_tokens="tokens")
    with serving(
        repository, *flag, log=tmp_path / "log", credentials=trusting(authority)
    ) as server:
        new = Authority("another CA")
        # Half of it first, as a slow writer leaves it: the old one holds on.
        key, certificate = new.sign("server")
        (directory / "certificate").write_bytes(certificate)

        def answers(by, token):
            with server.channel(trusting(by)) as channel:
                stub = pb_grpc.GRPCInferenceServiceStub(channel)
                request = pb.ModelMetadataRequest(name=MODEL)
                try:
                    return stub.ModelMetadata(request, metadata=bearer(token), timeout=20).name
                except grpc.RpcError:
                    return None

        def presented():
            """What the HTTP side of the server has as its certificate now."""
            context = ssl._create_unverified_context()
            host, port = server.metrics_url.split("/")[2].split(":")
            with (
                socket.create_connection((host, int(port)), timeout=WAIT_S) as plain,
                context.wrap_socket(plain) as encrypted,
            ):
                return ssl.DER_cert_to_PEM_cert(encrypted.getpeercert(binary_form=True))

        eventually(lambda: presented() and "cannot be read again" in server.log())
        assert answers(authority, TEAM) == MODEL
        (directory / "key").write_bytes(key)
        (directory / "tokens").write_text('new = "token-after-rotation"')
        eventually(lambda: answers(new, "token-after-rotation") == MODEL)
        eventually(lambda: presented() == certificate.decode())
        assert answers(new, TEAM) is None
        assert answers(authority, "token-after-rotation") is None


def test_the_certificate_says_who_calls(repository, files, tmp_path):
    directory, authority = files
    flag = flags(directory, **ENCRYPTED, tls_client_ca="ca", auth_policy="policy")
    team, other = (trusting(authority, authority.sign(name)) for name in ("team", "stranger"))
    unknown = trusting(authority, Authority().sign("team"))
    with serving(repository, *flag, log=tmp_path / "log", credentials=team) as server:

        def infer(credentials):
            with server.channel(credentials) as channel:
                stub = pb_grpc.GRPCInferenceServiceStub(channel)
                return stub.ModelInfer(request_of(x_of(2)), timeout=20)

        assert infer(team).outputs
        with raises_status("PERMISSION_DENIED", "'stranger' may not infer"):
            infer(other)
        for refused in (trusting(authority), unknown):
            with raises_status("UNAVAILABLE", ".*"):
                infer(refused)
        # The same over HTTP.
        for name, expected in (("team", 403), ("ops", 200)):
            context = ssl.create_default_context(cadata=authority.pem.decode())
            key, certificate = authority.sign(name)
            (tmp_path / "client.pem").write_bytes(key + certificate)
            context.load_cert_chain(tmp_path / "client.pem")
            assert get(server.metrics_url, context=context)[0] == expected
        # `ops` is the last of them.
        (tmp_path / "ca.pem").write_bytes(authority.pem)
        shown = ("--certificate", tmp_path / "client.pem", "--key", tmp_path / "client.pem")
        for more, told in ((shown, MODEL), (("--key", "a"), "give all three")):
            command = [AQT, "top", server.metrics_url, "--once", "--json", "--ca"]
            command += [tmp_path / "ca.pem", *more]
            done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
            assert told in done.stdout + done.stderr
        with pytest.raises(OSError, match=r"certificate required|reset|EOF|closed"):
            get(
                server.metrics_url,
                context=ssl.create_default_context(cadata=authority.pem.decode()),
            )


def test_health_and_reflection_can_be_guarded(repository, files, tmp_path):
    directory, _ = files
    flag = (*flags(directory, auth_tokens="tokens"), "--auth-exempt", "metrics")
    with (
        serving(repository, *flag, log=tmp_path / "log", ready=False) as server,
        server.channel(None) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        with raises_status("UNAUTHENTICATED", "authorization: Bearer"):
            health.Check(request, timeout=WAIT_S)
        with raises_status("UNAUTHENTICATED", "not known here"):
            list(health.Watch(request, metadata=bearer("x" * 20), timeout=WAIT_S))
        assert health.Check(request, metadata=bearer(TEAM), timeout=WAIT_S).status
        with raises_status("UNAUTHENTICATED", ".*"):
            ProtoReflectionDescriptorDatabase(channel).get_services()
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        with raises_status("UNAUTHENTICATED", ".*"):
            stub.ServerReady(pb.ServerReadyRequest(), timeout=WAIT_S)
        assert stub.ServerLive(pb.ServerLiveRequest(), metadata=bearer(TEAM), timeout=WAIT_S).live
        assert get(server.metrics_url)[0] == 200


def test_regions_of_shared_memory_are_seen_by_who_registered_them(repository, files, tmp_path):
    import tritonclient.utils.shared_memory as shm

    directory, _ = files
    x = x_of(2)
    region = shm.create_shared_memory_region("mine", f"/aqt-{tmp_path.name}", x.nbytes)
    try:
        shm.set_shared_memory_region(region, [x])
        with (
            serving(
                repository, *flags(directory, auth_tokens="tokens"), log=tmp_path / "log"
            ) as server,
            stock.InferenceServerClient(server.address) as client,
        ):
            team, ops = ({"authorization": f"Bearer {t}"} for t in (TEAM, OPS))
            client.register_system_shared_memory(
                "mine", f"/aqt-{tmp_path.name}", x.nbytes, headers=team
            )
            tensor = stock.InferInput("x", x.shape, "FP32")
            tensor.set_shared_memory("mine", x.nbytes)
            result = client.infer(MODEL, [tensor], headers=team)
            assert_same_bits(result.as_numpy("y"), reference(repository / MODEL / "1", x))
            with raises_status("NOT_FOUND", "no shared memory region 'mine'"):
                client.infer(MODEL, [tensor], headers=ops)
            assert not client.get_system_shared_memory_status(headers=ops).regions
            client.unregister_system_shared_memory(headers=ops)
            assert client.infer(MODEL, [tensor], headers=team)
    finally:
        shm.destroy_shared_memory_region(region)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"tls_certificate": "ca", "tls_key": "key"}, "--tls-certificate .*ca"),
        ({"tls_certificate": "nowhere", "tls_key": "key"}, "No such file"),
        ({"auth_tokens": "key"}, "no TOML file of lines"),
    ],
)
def test_files_that_cannot_be_used_end_the_start(repository, files, tmp_path, wrong, match):
    directory, _ = files
    ended = forked.aqt("serve", "--model-repository", repository, *flags(directory, **wrong))
    assert ended.returncode == 1
    assert re.search(match, ended.stderr)
    assert "Traceback" not in ended.stderr
    secrets = (directory / "key").read_text().splitlines()[1:-1]
    assert not [line for line in secrets if line in ended.stderr]
