"""What a restart imports before its first answer: nothing of options that are off."""

import signal
import sys
import urllib.request

import numpy as np
import pytest

from aqt_client import Client
from bundles import FEATURES, write_linear
from server.messages import MODEL
from server_process import WAIT_S, serving

# Says which modules there are whenever it gets the signal.
TELLING = """
import signal, sys
signal.signal(signal.SIGUSR1, lambda *_: print(*sys.modules, flush=True))
from aqt_cli.main import app
app()
"""
# Doors of HTTP, spans, tokens, stores, several hosts, other commands, and what makes bundles.
OPTIONAL = {
    *("aiohttp", "prometheus_client", "opentelemetry", "jwt", "fsspec", "multiprocessing"),
    *("typer", "rich", "flax", "orbax", "optax", "tensorflow"),
    *("aqt_engine.config", "aqt_engine.ops", "aqt_engine.kernels.substitution", "jax.extend"),
    *("aqt_engine.replication", "aqt_server.hosts", "aqt_server.rest", "aqt_cli.commands"),
}
NEEDED = {
    *("aqt_cli", "aqt_engine", "aqt_server", "aqt_protos", "jax", "jaxlib", "numpy"),
    *("grpc", "grpc_health", "grpc_reflection", "google", "pydantic", "pydantic_core"),
}


def modules(server):
    server.process.send_signal(signal.SIGUSR1)
    return set(server.process.stdout.readline().split())


@pytest.mark.slow
def test_a_restart_imports_nothing_of_what_is_off(tmp_path):
    root = tmp_path / "models"
    write_linear(root / MODEL / "1")
    kept = ("--compilation-cache", str(tmp_path / "cache"))
    with serving(root, *kept, log=tmp_path / "first") as first:
        assert first.terminate() == 0

    telling = (sys.executable, "-c", TELLING)
    with serving(root, *kept, log=tmp_path / "again", forked=False, by=telling) as again:
        assert "at an earlier start" in again.log()
        with Client(again.address, timeout_s=WAIT_S) as client:
            client.infer(MODEL, {"x": np.ones((1, FEATURES), np.float32)})
        imported = modules(again)
        assert imported >= NEEDED
        assert imported & OPTIONAL == set()
        with urllib.request.urlopen(again.metrics_url, timeout=WAIT_S) as answer:
            assert f'model="{MODEL}"' in answer.read().decode()
        assert modules(again) & OPTIONAL == {"aiohttp", "prometheus_client"}
