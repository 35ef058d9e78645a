"""`aqt export` says what it needs; `make savedmodel-test` runs it with TensorFlow."""

import importlib.util

import pytest
from typer.testing import CliRunner

from aqt_cli.commands import app
from bundles import write_linear

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed"
)


def test_without_tensorflow_it_says_what_to_install(tmp_path):
    write_linear(tmp_path / "m" / "1")
    arguments = ["export", str(tmp_path / "m" / "1"), "--saved-model", str(tmp_path / "saved")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "install tensorflow, or tensorflow-cpu, beside aqt-engine" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "saved").exists()
