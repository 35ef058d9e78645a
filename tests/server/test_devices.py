"""A server that computes on several devices, which XLA makes of one processor."""

import numpy as np
import pytest

import forked
from aqt_client import Client
from aqt_server import configuration
from bundles import FEATURES, reference, write_linear
from server_process import serving

EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.mark.slow
def test_copies_and_shards_answer_in_the_bits_of_one_device(tmp_path, monkeypatch):
    axes = {"kernel/qvalue": (None, "model"), "bias": ("model",)}
    write_linear(tmp_path / "repository" / "m" / "1", axes=axes)
    x = np.random.default_rng(0).normal(size=(70, FEATURES)).astype(np.float32)
    expected = reference(tmp_path / "repository" / "m" / "1", x)
    monkeypatch.setenv("XLA_FLAGS", EIGHT)
    flags = ("--copies", "4", "--shards", "2")
    with (
        serving(tmp_path / "repository", *flags, log=tmp_path / "log") as server,
        Client(server.address) as client,
    ):
        for rows in (1, 7, 16, 70):
            found = client.infer("m", {"x": x[:rows]})
            assert found.exact
            assert (found["y"].view(np.uint32) == expected[:rows].view(np.uint32)).all()
        # The kernel is cut as its trainer said, and the bias cannot be.
        assert "of bias, axis 0 (model): it is in float" in server.log()
        assert "of kernel" not in server.log()


@pytest.mark.slow
def test_more_devices_than_there_are_end_the_start(tmp_path):
    (tmp_path / "repository").mkdir()
    flags = ("--model-repository", tmp_path / "repository", "--shards", "9")
    done = forked.aqt("serve", *flags, XLA_FLAGS=EIGHT)
    assert done.returncode == 1
    assert "1 copies of 9 shards take 9 devices, and there are 8" in done.stderr


def test_copies_are_a_power_of_two():
    with pytest.raises(configuration.SettingsError, match="--copies has to be a power of two"):
        configuration.read(["--model-repository", ".", "--copies", "3"], {})
