"""What a test of the zoo does: convert fast variants by command, serve them, compare every bit."""

from collections.abc import Sequence
from pathlib import Path

import pytest

import forked
from aqt_client import Client
from aqt_engine import bundle
from examples import zoo
from examples.entry import Model
from server_process import serving


def assert_served_exactly(models: Sequence[Model], root: Path) -> None:
    """Models with their fast weights answer from a server process as R does, row by row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "aqt", _aqt)
        references = [zoo.make(model, root, fast=True) for model in models]
    flags = ("--proof-s", "0", "--max-batch-rows", "32")
    with (
        serving(root / "repository", *flags, log=root / "log") as server,
        Client(server.address, timeout_s=120) as client,
    ):
        for model, reference in zip(models, references, strict=True):
            assert client.is_model_ready(model.name), server.log()
            values, differ = zoo.compare(model, reference, client)
            assert values > 0
            assert differ == 0, model.name


def _aqt(*arguments: str | Path) -> None:
    done = forked.aqt(*arguments)
    assert done.returncode == 0, done.stderr


def assert_no_float_copy(path: Path, *, quantized: int, floats: Sequence[str] = ()) -> None:
    """So many weights are quantized, and no matrix but those named is stored in float."""
    weights = bundle.read_manifest(path).weights
    assert sum(weight.role == "qvalue" for weight in weights) == quantized
    matrices = [w.name for w in weights if w.role == "float" and len(w.shape) > 1]
    assert matrices == [f"params/{name}" for name in floats]
