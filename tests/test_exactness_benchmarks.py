"""The benchmarks of exactness run, and tell what differs from what does not."""

import json

import pytest

from aqt_engine.convert import convert
from benchmarks import exactness, platforms
from engine.portable_models import transforming

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    convert(*transforming(), root / "transforming" / "1")
    return root


def test_cost_is_told_for_every_number_of_rows(repository, tmp_path, capsys):
    path = tmp_path / "cost.json"
    options = ["--repository", str(repository), "--pairs", "2", "--json", str(path)]
    exactness.main([*options, "--markdown"])
    assert "| transforming" in capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    assert [result["rows"] for result in results] == list(exactness.ROWS)
    assert all(result["ratio"] > 0 for result in results)
    assert all(len(result["seconds"]["exact"]) == 2 for result in results)


@pytest.mark.long
def test_what_is_not_portable_is_told_from_what_is(repository, monkeypatch, capsys):
    tried = {name: platforms.PLATFORMS[name] for name in ("all instructions", "SSE4.2")}
    monkeypatch.setattr(platforms, "PLATFORMS", tried)
    platforms.main(["--repository", str(repository), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    (portable,) = [line for line in lines if "portable" in line]
    (transformer,) = [line for line in lines if "transforming" in line]
    assert "same" in portable
    assert "ulp" in transformer
