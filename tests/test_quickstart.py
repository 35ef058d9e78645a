"""The README's quickstart is run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from server_process import WAIT_S, serving

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(name):
    found = re.search(rf"<!-- quickstart: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    return found.group(1)


def test_quickstart(tmp_path):
    python = tmp_path / "quickstart.py"
    python.write_text(block("python") + block("rules"))
    subprocess.run([sys.executable, python], cwd=tmp_path, check=True, timeout=WAIT_S)
    assert block("serve").split()[:2] == [".venv/bin/aqt", "serve"]
    repository = tmp_path / block("serve").split("--model-repository ")[1].split()[0]
    with serving(repository, log=tmp_path / "log", forked=False) as server:
        ask = block("ask").replace("localhost:8001", server.address)
        loading = (
            "import sklearn.datasets\nx = sklearn.datasets.load_iris().data.astype('float32')\n"
        )
        python.write_text(f"{loading}{ask}\nassert logits.shape == (150, 3)\n")
        subprocess.run([sys.executable, python], cwd=tmp_path, check=True, timeout=WAIT_S)
