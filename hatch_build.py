"""Compiles the int8 kernel: for the wheel, or in place with `python hatch_build.py`.

Where it cannot be compiled, for want of a compiler or of jaxlib's headers, it is left out and said
so: XLA then computes what it would, in the same bits.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
SOURCES = ROOT / "aqt_engine/kernels/native"
TARGET = "aqt_engine/kernels/native/libaqt_kernels.so"
_MACHINES = ("x86_64",)
# Not for the processor that compiles it: the kernel chooses its instructions while it runs.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-s", "-Wall", "-Wextra")
# A machine that serves need not have the compiler's own libraries.
_LINKED = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
_COMPILERS = ("c++", "g++", "clang++")


def compile_kernel() -> str | None:
    """Compiles it in place; returns why that cannot be done, or None."""
    (ROOT / TARGET).unlink(missing_ok=True)
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        return f"there is none for {platform.system()} on {platform.machine()}"
    named = os.environ.get("CXX")
    compiler = named or next((c for c in _COMPILERS if shutil.which(c)), None)
    if compiler is None:
        return "there is no C++ compiler"
    jaxlib = importlib.util.find_spec("jaxlib")
    if jaxlib is None or jaxlib.origin is None:
        return "jaxlib, whose headers it needs, is not installed"
    headers = Path(jaxlib.origin).parent / "include"
    sources = sorted(map(str, SOURCES.glob("*.cc")))
    # Under another name first: a process that has loaded the old one keeps it.
    beside = ROOT / f"{TARGET}.{os.getpid()}"
    options = (*_FLAGS, *_LINKED, "-isystem", str(headers))
    try:
        done = subprocess.run(
            [compiler, *options, *sources, "-o", str(beside)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return f"{compiler} says: {done.stderr[-2000:]}"
        beside.replace(ROOT / TARGET)
    except OSError as error:
        return f"{compiler} cannot be run: {error}"
    finally:
        beside.unlink(missing_ok=True)
    return None


class CompiledKernel(BuildHookInterface[Any]):
    """Puts the kernel into the wheel where it can be compiled: then that is of this platform."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles it, and says what the wheel holds of it."""
        if why := compile_kernel():
            print(f"{TARGET} is left out: {why}", file=sys.stderr)
        # An editable installation loads it from where it is compiled.
        elif version != "editable":
            of = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{of}"
            build_data["force_include"][str(ROOT / TARGET)] = TARGET


if __name__ == "__main__":
    sys.exit(compile_kernel())
