"""Memory that nothing needs, back to the system."""

import contextlib
import ctypes
import gc


def give_back() -> None:
    """Gives back what is free in the heap: a compiler leaves much of it there.

    JAX keeps the memory that it took from NumPy until it is called again or Python looks for
    garbage, so that is done first. Only the C library of GNU can give back more than the end of a
    heap; with another nothing more is done.
    """
    gc.collect(0)
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
