"""`aqt health`, as the health check of a container runs it."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from aqt_cli.commands import app
from server.certificates import Authority

STATUS = health_pb2.HealthCheckResponse


@contextlib.contextmanager
def telling(status, credentials=None):
    """The address of a server that says `status` of itself."""
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        checks = health.HealthServicer()
        checks.set(health.OVERALL_HEALTH, status)
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        if credentials:
            port = server.add_secure_port("localhost:0", credentials)
        else:
            port = server.add_insecure_port("localhost:0")
        server.start()
        try:
            yield f"localhost:{port}"
        finally:
            server.stop(0).wait()


def asked(*flags):
    found = CliRunner().invoke(app, ["health", *map(str, flags)])
    return found.exit_code, found.output


@pytest.mark.parametrize(("status", "code"), [("SERVING", 0), ("NOT_SERVING", 1)])
def test_the_exit_code_is_what_the_server_says(status, code):
    with telling(STATUS.ServingStatus.Value(status)) as address:
        found, told = asked("--server", address)
    assert found == code
    assert status.replace("_", " ").lower() in told


def test_a_server_that_is_not_there_is_not_healthy():
    with telling(STATUS.SERVING) as address:
        pass
    code, told = asked("--server", address, "--timeout", "1")
    assert code == 1
    assert told.startswith(f"{address} does not answer")


def test_an_encrypted_server_is_asked_as_one(tmp_path):
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    credentials = grpc.ssl_server_credentials([authority.sign("server")])
    with telling(STATUS.SERVING, credentials) as address:
        assert asked("--server", address, "--ca", tmp_path / "ca.pem")[0] == 0
        assert asked("--server", address, "--timeout", "1")[0] == 1
