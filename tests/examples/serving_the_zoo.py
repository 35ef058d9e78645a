"""What a test of the zoo does: convert fast variants by command, serve them, compare every bit."""

from collections.abc import Sequence
from pathlib import Path

from aqt_client import Client
from aqt_engine import bundle
from examples import zoo
from server_process import serving


def assert_served_exactly(names: list[str], root: Path) -> None:
    """Models with their fast weights answer from a server process as R does, row by row."""
    models = [zoo.MODELS[name] for name in names]
    references = [zoo.make(model, root, fast=True) for model in models]
    flags = ("--proof-s", "0", "--max-batch-rows", "64")
    with (
        serving(root / "repository", *flags, log=root / "log") as server,
        Client(server.address, timeout_s=120) as client,
    ):
        for model, reference in zip(models, references, strict=True):
            assert client.is_model_ready(model.name), server.log()
            values, differ = zoo.compare(model, reference, client)
            assert values > 0
            assert differ == 0, model.name


def assert_no_float_copy(path: Path, *, quantized: int, floats: Sequence[str] = ()) -> None:
    """So many weights are quantized, and no matrix but those named is stored in float."""
    weights = bundle.read_manifest(path).weights
    assert sum(weight.role == "qvalue" for weight in weights) == quantized
    matrices = [w.name for w in weights if w.role == "float" and len(w.shape) > 1]
    assert matrices == [f"params/{name}" for name in floats]
