"""The bundles that a benchmark runs on."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from aqt_engine import QuantMode, config, tiles
from aqt_engine.convert import convert
from aqt_engine.flax import AqtDotGeneral
from examples.entry import Forward, forward_of
from examples.zoo import MODELS, SMALL, convert_untrained

TINY = "tiny"
TINY_FEATURES = 16
_TINY_TILE = 16


def small_models(repository: Path) -> None:
    """The small models of the zoo, at tiles of 16 rows, so that they are the same everywhere."""
    for name in SMALL:
        convert_untrained(MODELS[name], repository)


def whole_zoo(repository: Path) -> None:
    """Every model at its longest length, in the tile that `aqt convert` finds cheapest here."""
    for name, model in MODELS.items():
        print(f"converting {name}", file=sys.stderr, flush=True)
        longest = model.with_lengths(model.lengths[-1])
        convert_untrained(longest, repository, tile=tiles.measured)


@contextlib.contextmanager
def repository_or_zoo(repository: Path | None, make: Callable[[Path], None]) -> Iterator[Path]:
    """`repository`, or one that `make` fills with models of the zoo, and that is deleted.

    Their weights were not trained: that decides neither how fast they are nor which bits they have.
    """
    if repository is not None:
        yield repository
        return
    with tempfile.TemporaryDirectory() as made:
        make(Path(made))
        yield Path(made)


def newest(repository: Path) -> dict[str, Path]:
    """The newest version of every model, by its name."""
    return {
        model.name: max(model.iterdir(), key=lambda version: int(version.name))
        for model in sorted(repository.iterdir())
    }


def tiny_model(mode: QuantMode = QuantMode.TRAIN) -> nn.Module:
    """One dense layer in int8, so small that computing it is nothing beside asking for it."""
    int8 = AqtDotGeneral(config.fully_quantized(8), rhs_quant_mode=mode)
    return nn.Dense(TINY_FEATURES, dot_general=int8)


def tiny(repository: Path) -> Forward:
    """Converts `tiny_model` into `repository`, and gives its training forward."""
    typical = np.random.default_rng(0).normal(size=(32, TINY_FEATURES)).astype(np.float32)
    variables = tiny_model().init(jax.random.key(0), typical)
    convert(tiny_model, variables, {"inputs": typical}, repository / TINY / "1", tile=_TINY_TILE)

    def named(variables: Any, inputs: np.ndarray) -> dict[str, Any]:
        return {"output": tiny_model().apply(variables, inputs)}

    return forward_of(named, variables, _TINY_TILE)
