"""The benchmark of starts tells ratios of each round."""

import json

import pytest

from benchmarks import start
from benchmarks.bundles import tiny


def figures(*elapsed):
    return [{"elapsed_s": s, "processor_s": 2 * s} for s in elapsed]


def test_a_start_is_compared_with_the_bare_python_of_its_round(capsys):
    # The machine was three times as slow in the second round.
    found = {
        start.BARE: figures(1, 3, 1),
        start.COLD: figures(20, 60, 20),
        start.WARM: figures(2.5, 6, 2),
    }
    bare, cold, warm = told = start.results(found)
    assert (bare["elapsed_s_ratio"], cold["elapsed_s_ratio"]) == (1, 20)
    assert warm["processor_s_ratio"] == 2
    assert warm["elapsed_s_quartiles"] == [2, 2.25]
    start.show(told, markdown=True)
    assert "2.00x, met" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
def test_starts_of_a_server_are_measured(tmp_path):
    tiny(tmp_path / "repository")
    path = tmp_path / "start.json"
    start.main(["--repository", str(tmp_path / "repository"), "--rounds", "1", "--json", str(path)])
    bare, cold, warm = json.loads(path.read_text())["results"]
    assert 0 < bare["elapsed_s"] < warm["elapsed_s"]
    assert cold["processor_s"] > bare["processor_s"]
