"""Memory goes back to the system."""

import platform
import subprocess
import sys

import pytest

MAPPED = """
import ctypes, sys
from aqt_engine import heap

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "apart":
    heap.keep_large_apart()
libc.free(libc.malloc(16 << 20))
before = libc.mallinfo2().hblkhd
kept = libc.malloc(12 << 20)
print(libc.mallinfo2().hblkhd - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only this library keeps heaps")
@pytest.mark.parametrize(("how", "least", "most"), [("apart", 12 << 20, 13 << 20), ("", 0, 0)])
def test_large_arrays_are_apart_from_the_heap(how, least, most):
    command = [sys.executable, "-c", MAPPED, how]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert least <= int(told.stdout) <= most
