"""The benchmark of serving runs, and counts only what was answered."""

import json
import shutil

import pytest

from benchmarks import serving
from compiled_door import compiled_door

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("h2load") is None, reason="the load generator is not there"),
]


def test_every_server_is_measured_under_load(tmp_path, capsys):
    compiled_door()
    path = tmp_path / "serving.json"
    options = ["--repeats", "1", "--seconds", "0.2", "--in-flight", "4", "--json", str(path)]
    serving.main([*options, "--markdown"])
    assert "| aqt serve" in capsys.readouterr().out
    bare, *ours = json.loads(path.read_text())["results"]
    assert bare["ratio"] == 1
    assert len(ours) == 2
    assert all(each["requests_per_s"] > 0 and each["processor_us"] > 0 for each in ours)
