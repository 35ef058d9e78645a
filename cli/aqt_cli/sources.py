"""What commands are given: models by name, arrays by file."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import numpy as np

BATCH_ROWS = 64


def read_arrays(file: Path) -> dict[str, "np.ndarray[Any, Any]"]:
    """The arrays of an .npz, by name.

    NumPy's files do not know bfloat16, which numpy.savez leaves there as two bytes without a type:
    these are read as what they were.

    Raises:
      ConversionError: `file` is not one of plain arrays.
    """
    import ml_dtypes
    import numpy as np

    from aqt_engine.convert import ConversionError

    try:
        with np.load(file) as arrays:
            read = {name: arrays[name] for name in arrays.files}
    except (ValueError, AttributeError) as error:
        raise ConversionError(
            f"{file} is no .npz file of plain arrays ({error}): write it with numpy.savez"
        ) from error
    for name, array in read.items():
        if array.dtype == np.dtype("V2"):
            read[name] = array.view(ml_dtypes.bfloat16)
        elif array.dtype.kind not in "biuf":
            raise ConversionError(
                f"{file} has {name!r} as {array.dtype}, which JAX cannot compute in: save numbers "
                f"or bools"
            )
    return read


def batches(
    arrays: dict[str, "np.ndarray[Any, Any]"],
) -> Iterator[dict[str, "np.ndarray[Any, Any]"]]:
    """`arrays` in pieces of at most `BATCH_ROWS` rows."""
    rows = min(map(len, arrays.values()), default=0)
    for start in range(0, max(rows, 1), BATCH_ROWS):
        yield {name: array[start : start + BATCH_ROWS] for name, array in arrays.items()}


def load_factory(reference: str) -> Callable[..., Any]:
    """What `reference`, "package.module:name", names.

    Raises:
      typer.BadParameter: there is no such thing.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise typer.BadParameter(
            f"{reference!r} is not of the form package.module:factory", param_hint="--model"
        )
    # A console script does not have the working directory on its path, where models mostly are.
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"{error}; run `aqt convert` where {module_name!r} can be imported",
            param_hint="--model",
        ) from error
    except AttributeError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
