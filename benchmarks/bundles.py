"""The bundles that a benchmark runs on."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from examples.zoo import MODELS, SMALL, convert_untrained


@contextlib.contextmanager
def repository_or_zoo(repository: Path | None) -> Iterator[Path]:
    """`repository`, or one of the small models of the zoo, which is made here and deleted.

    Their weights were not trained: that decides neither how fast they are nor which bits they have.
    """
    if repository is not None:
        yield repository
        return
    with tempfile.TemporaryDirectory() as made:
        for name in SMALL:
            convert_untrained(MODELS[name], Path(made))
        yield Path(made)


def newest(repository: Path) -> dict[str, Path]:
    """The newest version of every model, by its name."""
    return {
        model.name: max(model.iterdir(), key=lambda version: int(version.name))
        for model in sorted(repository.iterdir())
    }
