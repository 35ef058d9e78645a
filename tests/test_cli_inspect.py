"""What `aqt inspect` says of a bundle, where other tests of it do not."""

import json

from typer.testing import CliRunner

from aqt_cli.commands import app
from bundles import write_linear


def inspected(*arguments):
    found = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    return found.output


def test_axes_that_the_trainer_named_are_shown(tmp_path):
    axes = {"kernel/qvalue": (None, "model"), "bias": (("data", "model"),)}
    write_linear(tmp_path / "named", axes=axes)
    write_linear(tmp_path / "plain")
    layers = {x["layer"]: x for x in json.loads(inspected(tmp_path / "named", "--json"))["layers"]}
    assert layers["kernel"]["axes"] == [None, "model"]
    assert layers["bias"]["axes"] == [["data", "model"]]
    shown = inspected(tmp_path / "named")
    assert "- x model" in shown
    assert "data+model" in shown
    assert " axes " in shown
    assert " axes " not in inspected(tmp_path / "plain")
    # So that whoever knows no names of axes reads what has none.
    assert "axes" not in (tmp_path / "plain" / "manifest.json").read_text()
