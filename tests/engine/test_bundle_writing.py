"""Writing a bundle: whole or not at all, whatever happens, and never over another."""

import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import tensorstore

import bundles
from aqt_engine import bundle
from aqt_engine.files import onto
from compiled import for_children

BOUND_S = 120.0


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("repository") / "linear" / "1"
    bundles.write_linear(path)
    return path


def visible(folder):
    return [p.name for p in folder.iterdir() if not p.name.startswith(".")]


def rewrite(source, path, check=lambda written: None):
    """Writes the bundle `source` again, at `path`."""
    loaded = bundle.load(source)
    manifest = loaded.manifest
    return bundle.write(
        path,
        graph=loaded.graph,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        tile=manifest.tile,
        weights={s.name: w for s, w in zip(manifest.weights, loaded.weights, strict=True)},
        roles={s.name: s.role for s in manifest.weights},
        float_nbytes=manifest.float_nbytes,
        tools=manifest.tools,
        witness=loaded.witness,
        check=check,
    )


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_it_returns_the_manifest_that_readers_get(written, tmp_path):
    manifest = rewrite(written, tmp_path / "new" / "folders" / "1")
    assert manifest == bundle.read_manifest(tmp_path / "new" / "folders" / "1")


def test_the_check_sees_what_a_reader_will_before_a_reader_can(written, tmp_path):
    seen = []

    def check(loaded):
        seen.append(loaded)
        assert visible(tmp_path) == []

    manifest = rewrite(written, tmp_path / "1", check)
    assert [b.manifest for b in seen] == [manifest]
    assert visible(tmp_path) == ["1"]
    assert list(tmp_path.iterdir()) == [tmp_path / "1"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_the_check_refuses_leaves_nothing_behind(written, tmp_path, kind):
    def refuse(loaded):
        raise kind("no")

    with pytest.raises(kind, match="no"):
        rewrite(written, tmp_path / "1", refuse)
    assert list(tmp_path.iterdir()) == []
    rewrite(written, tmp_path / "1")
    bundle.load(tmp_path / "1")


@pytest.mark.parametrize("name", ["graph.stablehlo", "manifest.json"])
def test_a_disk_that_refuses_a_file_leaves_nothing_behind(written, tmp_path, name):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    bundle.load(written)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((written / name).stat().st_size - 1, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/1'"):
            rewrite(written, tmp_path / "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    rewrite(written, tmp_path / "1")


def test_what_tensorstore_says_of_a_full_disk_is_what_the_system_said(tmp_path):
    """It writes the weights, by Orbax, whose tasks a failure would leave behind in this process."""
    store = tensorstore.KvStore.open(f"file://{tmp_path}/").result()
    target = tmp_path / "m" / "1"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{target}'"), onto(target):
            store.write("weights", bytes(200)).result()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(ValueError, match="another"), onto(target):
        raise ValueError("another")


def test_whatever_stands_there_already_stays(written, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(written)
    shutil.copytree(written, tmp_path / "bundle")
    before = contents(tmp_path)
    for name in ("file", "folder", "link", "bundle"):
        with pytest.raises(FileExistsError, match="a served version never changes: write to a new"):
            rewrite(written, tmp_path / name)
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "file", "folder", "link"]


def test_of_two_writers_at_once_the_first_wins(written, tmp_path):
    def other_is_faster(loaded):
        shutil.copytree(written, tmp_path / "1")
        (tmp_path / "1" / "mark").touch()

    with pytest.raises(FileExistsError, match="written by another meanwhile"):
        rewrite(written, tmp_path / "1", other_is_faster)
    assert (tmp_path / "1" / "mark").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "1"]


def test_what_is_being_written_is_left_alone_and_what_nobody_writes_is_removed(written, tmp_path):
    abandoned = tmp_path / f".1.{'0' * 32}.writing"
    shutil.copytree(written, abandoned)
    (tmp_path / ".mine.writing").mkdir()
    rewrite(written, tmp_path / "1", lambda loaded: rewrite(written, tmp_path / "2"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.writing", "1", "2"]


def test_every_file_is_on_the_disk_before_the_bundle_is_visible(written, tmp_path, monkeypatch):
    synced, unsynced = set(), []
    fsync, rename = os.fsync, pathlib.Path.rename

    def record(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checked(source, target):
        if pathlib.Path(target).parent == tmp_path:
            everything = [source, *source.rglob("*")]
            unsynced.extend(p for p in everything if p.stat().st_ino not in synced)
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(pathlib.Path, "rename", checked)
    rewrite(written, tmp_path / "1")
    assert len(synced) > len(contents(tmp_path / "1"))
    assert unsynced == []


CHILD = """
import os, sys
import bundles
from aqt_engine import bundle
from aqt_engine.files import onto

folder, stop_at = sys.argv[1], int(sys.argv[2])
changes = 0

def count(event, args):
    global changes
    if event not in ("open", "os.mkdir", "os.rename") or folder not in str(args[0]):
        return
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return
    changes += 1
    if changes == stop_at:
        os.write(1, b"stopped")
        while True:  # every thread that comes by stays, until the process is killed
            os.read(0, 1)

sys.addaudithook(count)
bundles.write_linear(os.path.join(folder, "1"))
print(changes)
"""


def writer(folder, stop_at=0):
    """A process that writes a bundle and stops before its change number `stop_at` to `folder`."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(stop_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=for_children() | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.slow
@pytest.mark.timeout(4 * BOUND_S)
def test_a_writer_that_is_killed_leaves_no_bundle_and_hinders_no_other(tmp_path):
    with writer(tmp_path / "whole") as process:
        changes = int(process.communicate(timeout=BOUND_S)[0])
    assert process.returncode == 0
    bundle.load(tmp_path / "whole" / "1")
    # The first change makes the model's folder, the second the temporary one, the last renames it.
    for stop_at in (2, changes // 2, changes):
        folder = tmp_path / f"stopped-{stop_at}"
        with writer(folder, stop_at) as process:
            try:
                assert process.stdout.read(7) == b"stopped"
            finally:
                process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert visible(folder) == []
        left = [p.name for p in folder.iterdir()]
        assert len(left) == (0 if stop_at == 2 else 1)
        if stop_at == changes:
            assert "manifest.json" in {p.name for p in (folder / left[0]).iterdir()}
        with pytest.raises(bundle.BundleError, match="is not a bundle"):
            bundle.load(folder / "1")
        bundles.write_linear(folder / "1")
        bundle.load(folder / "1")
        # What the killed one left is gone too.
        assert list(folder.iterdir()) == [folder / "1"]
