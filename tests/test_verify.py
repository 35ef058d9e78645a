"""`aqt convert` and `aqt verify` of a model with lengths, and what verify says of a difference."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from typer.testing import CliRunner

import sequences
from aqt_cli.commands import app
from aqt_engine import bundle

pytestmark = pytest.mark.slow


def aqt(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The tagger's checkpoint, another with one weight changed, and its bundle."""
    root = tmp_path_factory.mktemp("tagger")
    variables = jax.tree.map(np.asarray, sequences.variables())
    changed = jax.tree.map(np.copy, variables)
    changed["params"]["Dense_1"]["kernel"][0, 0] += 10
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(root / "checkpoint", variables)
        checkpointer.save(root / "changed", changed)
    example = sequences.inputs_of(10, 5)
    np.savez(root / "example.npz", **{**example, "temperature": np.float32(1.5)})
    result = aqt(
        *("convert", "--model", "sequences:Tagger", "--checkpoint", root / "checkpoint"),
        *("--example", root / "example.npz", "--output", root / "tagger" / "1", "--tile", "4"),
        *("--shape", "ids=batch,length", "--lengths", "length=3,6", "--pad", "ids=-1"),
        *("--per-request", "temperature"),
    )
    assert result.exit_code == 0, result.output
    return root


def verified(root, *arguments):
    return aqt("verify", root / "tagger" / "1", "--rows", "8", *arguments)


def test_the_options_are_the_signature(root):
    manifest = bundle.read_manifest(root / "tagger" / "1")
    assert (manifest.lengths, manifest.pads) == ({"length": (3, 6)}, {"ids": -1})
    assert (manifest.per_request, manifest.tile) == (("temperature",), 4)
    shown = aqt("inspect", root / "tagger" / "1").output
    assert "length is padded to 3, 6" in shown


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--shape", "ids"), "not of the form NAME=VALUE"),
        (("--lengths", "length=a"), "'a' is no number"),
    ],
)
def test_options_that_say_nothing_are_refused(root, option, message):
    result = aqt(
        *("convert", "--model", "sequences:Tagger", "--checkpoint", root / "checkpoint"),
        *("--example", root / "example.npz", "--output", root / "tagger" / "2", *option),
    )
    assert result.exit_code == 2
    assert message in result.output


def test_verify_replays_the_training_forward_itself(root):
    result = verified(
        root, "--against", root / "checkpoint", "--model", "sequences:Tagger", "--json"
    )
    document = json.loads(result.stdout)
    assert (result.exit_code, document["exact"], document["reference"]) == (0, True, "training")
    assert document["first_difference"] is None
    one = document["trials"]["at length=3, with all rows"]["outputs"][0]
    assert one.keys() == {"output", "values", "total", "rows", "max_ulps"}
    assert all(trial["exact"] for trial in document["trials"].values())
    for bucket in ("at length=3", "at length=6"):
        for presented in (
            "with the rows reversed",
            "random inputs, with the rows shuffled",
            "random inputs, with NaNs beside the even rows",
            "random inputs, with infinities in the padding",
            "random inputs, at random lengths",
        ):
            assert f"{bucket}, {presented}" in document["trials"]


def test_verify_names_the_first_operation_that_differs(root):
    arguments = ("--against", root / "changed", "--model", "sequences:Tagger")
    result = verified(root, *arguments)
    assert result.exit_code == 1
    told = " ".join(result.stdout.split())
    assert "not exact: bits differ in" in told
    assert "the right operand of `dot_general` in Tagger/Dense_1/" in told


def test_verify_needs_the_model_of_a_checkpoint(root):
    result = verified(root, "--against", root / "checkpoint")
    assert result.exit_code == 2
    assert "--against and --model need each other" in result.output
