"""Model repositories at a URL, and directories in which nothing may be written."""

import json
import shutil
import subprocess

import fsspec
import numpy as np
import pytest

from aqt_client import Client
from aqt_engine.bundle import BundleError
from aqt_server.directory import Directory
from aqt_server.source import SourceError, open_source
from aqt_server.store import Store
from bundles import reference, write_linear
from engine.contractions import assert_same_bits
from server.messages import MODEL, x_of
from server_process import AQT, WAIT_S, eventually, serving

X = x_of(5)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundles")
    for version in (1, 2):
        write_linear(root / MODEL / str(version), seed=version)
    return root


@pytest.fixture
def remote(bundles, tmp_path):
    """A repository in memory, with a bundle; how it is copied is counted."""
    files = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    files.put(str(bundles / MODEL / "1"), f"{root}/{MODEL}/1", recursive=True)
    yield files, root
    files.rm(root, recursive=True)


def contents(path):
    return {f.relative_to(path): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_a_version_is_copied_once_and_has_its_bytes(remote, bundles, tmp_path, monkeypatch):
    files, root = remote
    copied = []
    copy = files.get_file
    monkeypatch.setattr(files, "get_file", lambda path, *a: (copied.append(path), copy(path, *a)))
    store = Store(f"memory:/{root}", tmp_path / "cache")
    assert list(store.versions()) == [(MODEL, 1)]
    found = store.local((MODEL, 1))
    assert contents(found) == contents(bundles / MODEL / "1")
    assert len(copied) == len(contents(found))
    # Another server that starts with the same cache copies the manifest alone.
    copied.clear()
    assert Store(f"memory:/{root}", tmp_path / "cache").local((MODEL, 1)) == found
    assert copied == [f"{root}/{MODEL}/1/manifest.json"]
    # A damaged copy is made again.
    (found / "graph.stablehlo").write_bytes(b"")
    assert contents(store.local((MODEL, 1))) == contents(bundles / MODEL / "1")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [found.name]


def test_a_version_is_there_with_its_manifest_and_changes_with_its_files(remote, bundles, tmp_path):
    files, root = remote
    store = Store(f"memory:/{root}", tmp_path)
    before = store.versions()
    assert store.versions() == before
    files.put(str(bundles / MODEL / "2" / "weights"), f"{root}/{MODEL}/2/weights", recursive=True)
    for other in (f"{MODEL}/007/manifest.json", ".hidden/1/manifest.json", "notes", "a/1/b/c"):
        files.pipe(f"{root}/{other}", b"")
    assert store.versions() == before
    files.put(str(bundles / MODEL / "2" / "manifest.json"), f"{root}/{MODEL}/2/manifest.json")
    assert list(store.versions()) == [(MODEL, 2), (MODEL, 1)]
    with pytest.raises(BundleError, match=r"2/graph\.stablehlo is missing"):
        store.local((MODEL, 2))
    files.pipe(f"{root}/{MODEL}/1/graph.stablehlo", b"other")
    assert store.versions()[MODEL, 1] != before[MODEL, 1]


def test_a_manifest_does_not_lead_out_of_the_copy(remote, tmp_path, monkeypatch):
    files, root = remote
    manifest = json.loads(files.cat(f"{root}/{MODEL}/1/manifest.json"))
    name = next(iter(manifest["files"]))
    text = json.dumps(manifest).replace(f'"{name}"', '"../../../escaped"')
    files.pipe(f"{root}/{MODEL}/1/manifest.json", text.encode())
    monkeypatch.setattr("aqt_engine.bundle._canonical_digest", lambda document: manifest["digest"])
    with pytest.raises(BundleError, match=r"names \.\./\.\./\.\./escaped, which is outside"):
        Store(f"memory:/{root}", tmp_path / "a/b/c").local((MODEL, 1))
    assert not list((tmp_path / "a/b/c").iterdir())


def test_what_is_not_there_says_so(tmp_path):
    with pytest.raises(SourceError, match="nosuch://x cannot be opened: Protocol not known"):
        open_source("nosuch://x", tmp_path)
    with pytest.raises(SourceError, match="nowhere is no directory"):
        open_source("nowhere", tmp_path)
    with pytest.raises(OSError, match="there is nothing at memory://nothing-there"):
        Store("memory://nothing-there", tmp_path).versions()
    assert isinstance(open_source(str(tmp_path), tmp_path), Directory)
    command = [AQT, "serve", "--model-repository", "nosuch://x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert "--model-repository nosuch://x cannot be opened" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_server_follows_a_repository_at_a_url(bundles, tmp_path):
    root = tmp_path / "repository"
    shutil.copytree(bundles / MODEL / "1", root / MODEL / "1")
    flags = ("--bundle-cache", str(tmp_path / "cache"), "--poll-s", "0.1")
    with (
        serving(f"file://{root}", *flags, log=tmp_path / "log") as server,
        Client(server.address, timeout_s=WAIT_S) as client,
    ):
        assert_same_bits(client.infer(MODEL, {"x": X})["y"], reference(root / MODEL / "1", X))
        # Copied without a rename, the manifest last.
        new = shutil.copytree(bundles / MODEL / "2", tmp_path / "2")
        (new / "manifest.json").rename(tmp_path / "manifest.json")
        shutil.copytree(new, root / MODEL / "2")
        shutil.copy(tmp_path / "manifest.json", root / MODEL / "2" / "manifest.json")
        eventually(lambda: client.is_model_ready(MODEL, "2"))
        assert_same_bits(client.infer(MODEL, {"x": X})["y"], reference(root / MODEL / "2", X))
        # A store that does not answer takes nothing away, and what comes then is served.
        root.rename(tmp_path / "away")
        eventually(lambda: "cannot be read" in server.log())
        assert client.infer(MODEL, {"x": X}).model_version == "2"
        shutil.rmtree(tmp_path / "away" / MODEL / "2")
        (tmp_path / "away").rename(root)
        eventually(lambda: not client.is_model_ready(MODEL, "2"))
        assert client.infer(MODEL, {"x": X}).model_version == "1"


@pytest.mark.slow
def test_a_repository_is_only_read(bundles, tmp_path):
    root = shutil.copytree(bundles, tmp_path / "repository")
    every = [root, *root.rglob("*")]
    for path in every:
        path.chmod(0o555 if path.is_dir() else 0o444)
    # Whoever may write all the same, as root may, is found out by the times.
    before = {path: path.stat().st_mtime_ns for path in every}
    expected = {v: reference(root / MODEL / v, X) for v in "12"}
    try:
        with (
            serving(root, "--poll-s", "0.1", log=tmp_path / "log") as server,
            Client(server.address, timeout_s=WAIT_S) as client,
        ):
            for version, wanted in expected.items():
                found = client.infer(MODEL, {"x": X}, version=version)["y"]
                assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))
            server.terminate()
        assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before
    finally:
        for path in every:
            path.chmod(0o755)
