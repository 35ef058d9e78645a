"""The README's quickstart is run as it stands there."""

import re
from pathlib import Path

import pytest

from server_process import serving

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(name):
    found = re.search(rf"<!-- quickstart: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    return found.group(1)


def test_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(block("python") + block("rules"), names)
    assert block("serve").split()[:2] == [".venv/bin/aqt", "serve"]
    repository = tmp_path / block("serve").split("--model-repository ")[1].split()[0]
    with serving(repository, log=tmp_path / "log", forked=False) as server:
        exec(block("ask").replace("localhost:8001", server.address), names)
    assert names["logits"].shape == (150, 3)
