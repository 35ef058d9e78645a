"""Versions on disk and in the server: picked up, refused, repaired, replaced, removed."""

import json
import shutil

import numpy as np
import pytest

from aqt_client import Client, ClientError, NotFound
from bundles import FEATURES, reference, write_linear
from engine.contractions import assert_same_bits
from server_process import eventually, serving

pytestmark = pytest.mark.slow

X = np.random.default_rng(0).normal(size=(9, FEATURES)).astype(np.float32)


def _truncate(path):
    file = max(
        (f for f in (path / "weights").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    file.write_bytes(file.read_bytes()[:-1])


def _flip_a_bit_of_the_graph(path):
    data = bytearray((path / "graph.stablehlo").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "graph.stablehlo").write_bytes(data)


def _edit_the_manifest(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tile"] = 8
    (path / "manifest.json").write_text(json.dumps(manifest))


def _claim_another_format(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format_version"] = 99
    (path / "manifest.json").write_text(json.dumps(manifest))


def _remove_the_manifest(path):
    (path / "manifest.json").unlink()


DAMAGE = {
    "truncated": (_truncate, "instead of"),
    "flipped": (_flip_a_bit_of_the_graph, "graph.stablehlo has other content"),
    "edited": (_edit_the_manifest, "manifest.json was changed"),
    "newer": (_claim_another_format, "format 99"),
    "headless": (_remove_the_manifest, "not a bundle"),
}


def test_what_is_damaged_or_inexact_is_refused_and_the_rest_served(tmp_path):
    root = tmp_path / "repository"
    write_linear(root / "good" / "1")
    for name, (damage, _) in DAMAGE.items():
        write_linear(root / name / "1")
        damage(root / name / "1")
    write_linear(root / "wrong" / "1", wrong_witness=True)
    with (
        serving(root, "--poll-s", "0.1", log=tmp_path / "log") as server,
        Client(server.address) as c,
    ):
        assert c.is_ready()
        for name, (_, message) in DAMAGE.items():
            assert not c.is_model_ready(name)
            with pytest.raises(ClientError, match=message) as raised:
                c.infer(name, {"x": X})
            assert raised.value.code.name == "FAILED_PRECONDITION"
        with pytest.raises(ClientError, match=r"1 of \d+ values.* 1 ulp"):
            c.infer("wrong", {"x": X})
        assert_same_bits(c.infer("good", {"x": X})["y"], reference(root / "good" / "1", X))

        # Repaired in place: it is loaded without a restart.
        shutil.rmtree(root / "truncated" / "1")
        write_linear(root / "truncated" / "1", seed=3)
        eventually(lambda: c.is_model_ready("truncated"))
        found = c.infer("truncated", {"x": X})["y"]
        assert_same_bits(found, reference(root / "truncated" / "1", X))


def test_an_inexact_version_is_served_only_on_request_and_says_so(tmp_path):
    write_linear(tmp_path / "r" / "wrong" / "1", wrong_witness=True)
    with (
        serving(tmp_path / "r", "--allow-inexact", log=tmp_path / "log") as server,
        Client(server.address) as client,
    ):
        assert client.infer("wrong", {"x": X}).exact is False


def test_versions_come_and_go_while_the_server_runs(tmp_path):
    root = tmp_path / "repository"
    write_linear(root / "m" / "1", seed=1)
    answers = {1: reference(root / "m" / "1", X)}
    with (
        serving(root, "--poll-s", "0.1", log=tmp_path / "log") as server,
        Client(server.address) as c,
    ):
        assert_same_bits(c.infer("m", {"x": X})["y"], answers[1])

        write_linear(root / "m" / "2", seed=2)
        answers[2] = reference(root / "m" / "2", X)
        eventually(lambda: c.is_model_ready("m", "2"))
        assert c.infer("m", {"x": X}).model_version == "2"
        assert_same_bits(c.infer("m", {"x": X})["y"], answers[2])
        assert_same_bits(c.infer("m", {"x": X}, version="1")["y"], answers[1])

        # A newer version that is refused does not take the place of one that answers.
        write_linear(root / "m" / "3", seed=3)
        _edit_the_manifest(root / "m" / "3")
        write_linear(root / "seen" / "1")  # loaded after 3 was looked at
        eventually(lambda: c.is_model_ready("seen"))
        assert c.infer("m", {"x": X}).model_version == "2"

        shutil.rmtree(root / "m" / "2")
        eventually(lambda: not c.is_model_ready("m", "2"))
        assert_same_bits(c.infer("m", {"x": X})["y"], answers[1])
        shutil.rmtree(root / "m")
        eventually(lambda: not c.is_model_ready("m"))
        with pytest.raises(NotFound):
            c.infer("m", {"x": X})


def test_a_bundle_that_is_still_being_written_is_not_a_version(tmp_path):
    root = tmp_path / "repository"
    write_linear(root / "m" / "1")
    shutil.copytree(root / "m" / "1", root / "m" / ".2.abc.writing")
    (root / "m" / "notes").mkdir()
    (root / "m" / "007").mkdir()
    (root / ".hidden" / "1").mkdir(parents=True)
    with serving(root, log=tmp_path / "log") as server, Client(server.address) as client:
        assert client.model_metadata("m").versions == ("1",)
        assert "refused" not in server.log()
