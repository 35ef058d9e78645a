"""The benchmark of serving runs, and counts only what was answered."""

import json
import shutil

import pytest

from benchmarks import scale, serving
from compiled_door import compiled_door

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("h2load") is None, reason="the load generator is not there"),
]


@pytest.mark.long
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


@pytest.mark.long
def test_how_cost_grows_is_measured_and_drawn(tmp_path, capsys):
    compiled_door()
    path, plot = tmp_path / "scale.json", tmp_path / "scale.png"
    options = ["--of", "rows", "clients", "--steps", "2", "--json", str(path), "--plot", str(plot)]
    scale.main(options)
    assert "in proportion" in capsys.readouterr().out
    steps = json.loads(path.read_text())["results"]
    assert [(s["of"], s["size"]) for s in steps if s["measured"].startswith("a ")] == [
        ("rows", 1),
        ("rows", 4),
        ("clients", 1),
        ("clients", 10),
    ]
    assert all(step["value"] > 0 for step in steps)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_cost_is_compared_with_what_is_in_proportion():
    steps = [
        scale.Step(of="rows", size=size, measured="a call", unit="ms", value=value)
        for size, value in ((1, 2.0), (4, 4.0), (8, 16.0))
    ]
    assert [grown for _, grown in scale.proportions(steps)] == [None, 0.5, 2.0]
