"""The compiled kernel: whether there is one here, and which instructions it computes with.

It is compiled when the package is installed, where there is a compiler (`hatch_build.py`). Where it
is not there, or the processor has none of its instruction sets, everything is computed by XLA, in
the same bits. The environment variable `AQT_KERNELS` chooses: `auto`, the default, `off`, or an
instruction set.
"""

import ctypes
import functools
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aqt_engine.kernels.packing import pack

Array = np.ndarray[Any, Any]

TARGET = "aqt.int8_matmul.1"
"""What a graph calls the kernel; numbered, as a compiled graph may be kept on disk."""
QUANTIZE_TARGET = "aqt.quantize_rows.1"
"""What it calls to quantize rows by their largest magnitudes."""
INSTRUCTION_SETS = ("amx", "avx512vnni", "avx2")
"""Fastest first."""
_VARIABLE = "AQT_KERNELS"
_FILE = Path(__file__).parent / "native/libaqt_kernels.so"
_log = logging.getLogger(__name__)


@functools.cache
def instruction_set() -> str | None:
    """The one that the kernel computes with, unless told by `use`; None where there is no kernel.

    Says once in the log which of it is the case.

    Raises:
      ValueError: `AQT_KERNELS` asks for what there is not.
    """
    name = os.environ.get(_VARIABLE, "auto")
    if name == "off":
        _log.info("int8 contractions are computed by XLA, as %s is off", _VARIABLE)
        return None
    chosen = next(iter(supported()), None) if name == "auto" else name
    if chosen is None:
        _log.warning("int8 contractions are computed by XLA, in the same bits: %s", _why_not())
        return None
    try:
        use(chosen)
    except ValueError as error:
        raise ValueError(f"{_VARIABLE} is {name!r}: {error}") from error
    _log.info("int8 contractions are computed by the kernel for %s", chosen)
    return chosen


@functools.cache
def supported() -> tuple[str, ...]:
    """The instruction sets of this processor that compute what they should, fastest first."""
    library = _library()
    if library is None or jax.default_backend() != "cpu":
        return ()
    there = [name for name in INSTRUCTION_SETS if library.aqt_supported(name.encode())]
    right = tuple(name for name in there if _computes(library, name))
    if wrong := sorted(set(there) - set(right)):
        _log.error("the int8 kernel computes wrong sums with %s here, and does without", wrong)
    return right


def use(name: str) -> None:
    """Computes with the instruction set `name` from now on, in all threads.

    Raises:
      ValueError: it is none of `supported()`.
    """
    _having(name).aqt_use(name.encode())


def product(name: str, lhs: Array, packed: Array, columns: int, *, threads: int = 1) -> Array:
    """`lhs` times a packed matrix by the instruction set `name`, outside of XLA.

    It is int32 of shape (rows, columns), for int8 of shape (rows, depth).

    Raises:
      ValueError: it is none of `supported()`.
    """
    return _product(_having(name), name, lhs, packed, columns, threads)


def quantized(
    name: str, values: Array, factor: float, bound: float, *, threads: int = 1
) -> tuple[Array, Array]:
    """`values` by the instruction set `name`, outside of XLA: int8, and a scale for each row.

    Raises:
      ValueError: it is none of `supported()`.
    """
    library = _having(name)
    values = np.ascontiguousarray(values)
    rows, depth = values.shape
    integers, scales = np.zeros((rows, depth), np.int8), np.zeros((rows, 1), np.float32)
    addresses = (values.ctypes.data, integers.ctypes.data, scales.ctypes.data)
    library.aqt_quantize(name.encode(), threads, *addresses, rows, depth, factor, bound)
    return integers, scales


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The shared library, whose kernel XLA knows from now on; None where it cannot be loaded."""
    try:
        library = ctypes.CDLL(str(_FILE))
    except OSError:
        return None
    library.aqt_supported.argtypes = (ctypes.c_char_p,)
    library.aqt_supported.restype = ctypes.c_bool
    library.aqt_use.argtypes = (ctypes.c_char_p,)
    library.aqt_use.restype = None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    arrays, sizes = (pointer, pointer, pointer), (size, size, size)
    library.aqt_multiply.argtypes = (ctypes.c_char_p, size, *arrays, *sizes)
    library.aqt_multiply.restype = None
    numbers = (ctypes.c_float, ctypes.c_float)
    library.aqt_quantize.argtypes = (ctypes.c_char_p, size, *arrays, size, size, *numbers)
    library.aqt_quantize.restype = None
    for target, handler in (
        (TARGET, library.aqt_int8_matmul),
        (QUANTIZE_TARGET, library.aqt_quantize_rows),
    ):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    return library


def _having(name: str) -> ctypes.CDLL:
    library = _library()
    if library is None or name not in supported():
        raise ValueError(
            f"there is no int8 kernel for {name!r} here; there is one for "
            f"{', '.join(supported()) or 'nothing'}"
        )
    return library


def _why_not() -> str:
    if jax.default_backend() != "cpu":
        return "the kernel is one for processors"
    if not _FILE.exists():
        return "the kernel was not compiled, as there was no C++ compiler at installation"
    if _library() is None:
        return f"{_FILE} cannot be loaded here"
    return "this processor has no instructions that the kernel knows"


def _computes(library: ctypes.CDLL, name: str) -> bool:
    """Whether sums of extreme and random values are right, in whole tiles and in what is left."""
    rng = np.random.default_rng(0)
    for rows, depth, columns in ((1, 64, 16), (19, 131, 45), (33, 7, 70)):
        lhs = rng.integers(-128, 128, (rows, depth), np.int8)
        rhs = rng.integers(-128, 128, (depth, columns), np.int8)
        lhs[0], rhs[:, 0] = -128, -128
        expected = lhs.astype(np.int32) @ rhs.astype(np.int32)
        if not np.array_equal(_product(library, name, lhs, pack(rhs), columns, 1), expected):
            return False
    return True


def _product(
    library: ctypes.CDLL, name: str, lhs: Array, packed: Array, columns: int, threads: int
) -> Array:
    lhs = np.ascontiguousarray(lhs)
    rows, depth = lhs.shape
    out = np.zeros((rows, columns), np.int32)
    addresses = (lhs.ctypes.data, packed.ctypes.data, out.ctypes.data)
    library.aqt_multiply(name.encode(), threads, *addresses, rows, depth, columns)
    return out
