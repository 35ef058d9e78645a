"""Arrays in a bundle: an Orbax checkpoint of which each array is one file, as it lies in memory.

Orbax writes it, without compression, under the number of each array in its order; whoever has Orbax
can restore it. A bundle's reader needs neither Orbax nor a second copy: the bytes of each file are
read to where executables on a CPU take them as they are. They are not mapped: a file that is cut
short or written over would end the server, or change its answers.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

Array = np.ndarray[Any, Any]
_ALIGNMENT = 64


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros at an address that executables on a CPU read from; others they copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def save(path: Path, arrays: Sequence[Array]) -> None:
    """Writes `arrays`, none of which is empty, to the new directory `path`."""
    # Orbax takes a third as long to import as JAX, and only who writes needs it.
    import orbax.checkpoint as ocp
    from etils import epath

    path.mkdir()
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=False, use_compression=False, save_concurrent_gb=1
    )
    tree = {str(i): np.asarray(array) for i, array in enumerate(arrays)}
    # Without a checkpointer, which makes a whole directory visible at once: so does the bundle.
    handler.save(epath.Path(path), args=ocp.args.PyTreeSave(tree))
    handler.close()


def load(path: Path) -> list[Array]:
    """The arrays that `save` wrote at `path`, each at an address that executables read from.

    Raises:
      ValueError: they are stored otherwise.
      OSError: one cannot be read.
    """
    return [_read(path / str(i)) for i in range(sum(entry.is_dir() for entry in path.iterdir()))]


def _read(path: Path) -> Array:
    form = json.loads((path / ".zarray").read_text())
    shape, dtype = tuple(form["shape"]), np.dtype(form["dtype"])
    file = path / (".".join("0" * len(shape)) or "0")
    array = aligned_zeros(shape, dtype)
    whole = (form["compressor"], form["order"], form["chunks"]) == (None, "C", form["shape"])
    if not whole or file.stat().st_size != array.nbytes:
        raise ValueError(f"{file} is not one whole array of {dtype}{list(shape)}")
    with file.open("rb") as stream:
        stream.readinto(array.reshape(-1).view(np.uint8).data)
    return array


def by_name(path: Path) -> bool:
    """Whether the arrays at `path` are stored by their names and in parts, as formats 1 and 2."""
    return (path / "manifest.ocdbt").exists()


def restore(path: Path) -> dict[str, Array]:
    """Arrays by name, of any checkpoint, by Orbax."""
    import orbax.checkpoint as ocp

    # Alone: by itself it waits for the other processes of JAX's, who read other files, or none.
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"host{here}"
    )
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        return {k: np.asarray(v) for k, v in checkpointer.restore(path.absolute()).items()}
