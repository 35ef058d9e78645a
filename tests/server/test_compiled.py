"""The compilation cache on disk: damage, a full disk, and what a killed process left."""

import resource
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from aqt_server.compiled import Entries
from server_process import WAIT_S

VALUE = bytes(range(256)) * 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "made" / "late"


@hypothesis.given(data=st.data())
def test_what_is_damaged_is_not_there_and_is_kept_anew(directory, data):
    cache = Entries(directory)
    cache.put("key", VALUE)
    (file,) = directory.iterdir()
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    assert cache.get("key") is None
    cache.put("key", VALUE)
    assert cache.get("key") == VALUE
    assert list(directory.iterdir()) == [file]


def test_what_is_not_there_is_none(directory):
    assert Entries(directory).get("another") is None


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, caplog):
    cache = Entries(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        cache.put("key", VALUE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be kept" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert cache.get("key") is None


KILLED = """
import os, sys
from pathlib import Path
from aqt_server.compiled import Entries
Path.rename = lambda *_: os.kill(os.getpid(), 9)
Entries(Path(sys.argv[1])).put("key", b"value")
"""


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path]
    assert subprocess.run(command, timeout=WAIT_S).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".writing"
    cache = Entries(tmp_path)
    assert cache.get("key") is None
    cache.put("key", VALUE)
    assert [path.name for path in tmp_path.iterdir()] == ["key.compiled"]
