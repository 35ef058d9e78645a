"""Memory that nothing needs, back to the system."""

import contextlib
import ctypes
import gc

_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 8 << 20


def keep_large_apart() -> None:
    """Has this process take each array of 8 MiB and more from the system, and give it back at once.

    Else the C library of GNU puts arrays of up to 32 MiB into the heap of whatever thread makes
    them, once one was freed, and keeps the end of such a heap. It costs new pages for each array,
    and so is for work that is done once. With another library nothing is done.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def give_back() -> None:
    """Gives back what is free in the heap: a compiler leaves much of it there.

    JAX keeps the memory that it took from NumPy until it is called again or Python looks for
    garbage, so that is done first. Only the C library of GNU can give back more than the end of a
    heap; with another nothing more is done.
    """
    gc.collect(0)
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
