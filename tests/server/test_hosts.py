"""Two processes of four devices each that compute one version together, as two hosts would."""

import contextlib
import os
import re
import socket
import subprocess

import numpy as np
import pytest

from aqt_client import Client, ServerError
from aqt_server import configuration
from bundles import FEATURES, reference, write_linear
from server_process import AQT, WAIT_S, eventually, serving

DEVICES = "--xla_force_host_platform_device_count=4"


@contextlib.contextmanager
def two_hosts(root, *flags, follower_has="repository"):
    """The server that leads, and the process that follows it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = (*flags, "--hosts", "2", "--coordinator", coordinator)
    command = [AQT, "serve", "--model-repository", root / follower_has, *flags]
    with (root / "follower.log").open("w") as log:
        follower = subprocess.Popen([*command, "--host-index", "1"], stderr=log)
    try:
        with serving(root / "repository", *flags, log=root / "log") as server:
            yield server, follower
    finally:
        if follower.poll() is None:
            follower.kill()
        follower.wait(WAIT_S)


def served_by(root, monkeypatch, *, rows):
    """Where a model of processes of four devices lies, inputs for it, and their answers."""
    path = root / "repository" / "m" / "1"
    write_linear(path)
    x = np.random.default_rng(rows).normal(size=(rows, FEATURES)).astype(np.float32)
    expected = reference(path, x)
    monkeypatch.setenv("XLA_FLAGS", DEVICES)
    return path, x, expected


@pytest.mark.slow
def test_two_hosts_answer_in_the_bits_of_one_device(tmp_path, monkeypatch):
    """And beside a version whose manifest is a pipe, which is read until somebody writes to it."""
    _, x, expected = served_by(tmp_path, monkeypatch, rows=70)
    stalled = tmp_path / "repository" / "before" / "1"
    stalled.mkdir(parents=True)
    os.mkfifo(stalled / "manifest.json")
    flags = ("--copies", "2", "--shards", "4", "--load-s", "0.5")
    with two_hosts(tmp_path, *flags) as (server, follower):
        with Client(server.address) as client:
            # The other may take as long here.
            eventually(lambda: client.is_model_ready("m"))
            assert not client.is_model_ready("before")
            for rows in (1, 7, 16, 70):
                found = client.infer("m", {"x": x[:rows]})
                assert found.exact
                assert (found["y"].view(np.uint32) == expected[:rows].view(np.uint32)).all()
        assert server.terminate() == 0, server.log()
        assert follower.wait(WAIT_S) == 0, (tmp_path / "follower.log").read_text()


@pytest.mark.slow
def test_weights_in_shards_on_both_hosts_and_a_host_that_is_lost(tmp_path, monkeypatch):
    path, x, expected = served_by(tmp_path, monkeypatch, rows=9)
    flags = ("--shards", "8", "--model-control", "poll", "--poll-s", "0.1")
    with two_hosts(tmp_path, *flags) as (server, follower):
        with Client(server.address) as client:
            assert (client.infer("m", {"x": x})["y"].view("u4") == expected.view("u4")).all()
            write_linear(path.with_name("2"))
            eventually(lambda: client.infer("m", {"x": x}).model_version == "2")
            follower.kill()
            assert server.process.wait(WAIT_S) == 1
        assert "host 1 is lost" in server.log()


@pytest.mark.slow
def test_a_host_with_another_bundle_is_told_of(tmp_path, monkeypatch):
    write_linear(tmp_path / "repository" / "m" / "1")
    write_linear(tmp_path / "other" / "m" / "1", seed=1)
    monkeypatch.setenv("XLA_FLAGS", DEVICES)
    with two_hosts(tmp_path, "--shards", "8", follower_has="other") as (server, _):
        with Client(server.address) as client:
            x = np.zeros((1, FEATURES), np.float32)
            with pytest.raises(ServerError, match="host 1 could not load it: its m version 1"):
                client.infer("m", {"x": x})
        assert server.terminate() == 0, server.log()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hosts", "2", "--shards", "2"], "--hosts need --coordinator"),
        (["--host-index", "1"], "--host-index is below --hosts"),
        (
            ["--hosts", "2", "--coordinator", "a:1", "--shards", "3"],
            "--copies times --shards are 3 devices",
        ),
    ],
)
def test_settings_of_hosts_that_do_not_go_together(flags, said):
    with pytest.raises(configuration.SettingsError, match=re.escape(said)):
        configuration.read(["--model-repository", ".", *flags], {})
