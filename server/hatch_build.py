"""Compiles the fast door: for the wheel, or in place with `python server/hatch_build.py`.

Where it cannot be compiled, for want of a compiler or of libnghttp2's headers, it is left out and
said so: the server works without it, and refuses the setting that asks for it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
SOURCES = ROOT / "native"
TARGET = "aqt_server/_door.abi3.so"
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-s", "-fvisibility=hidden")
_HARDENED = ("-D_FORTIFY_SOURCE=2", "-fstack-protector-strong", "-Wl,-z,relro,-z,now")
# A machine that serves need not have the compiler's own libraries.
_LINKED = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-lnghttp2")
_COMPILERS = ("c++", "g++", "clang++")


def compile_door() -> str | None:
    """Compiles it in place; returns why that cannot be done, or None."""
    named = os.environ.get("CXX")
    compiler = named or next((c for c in _COMPILERS if shutil.which(c)), None)
    if compiler is None:
        return "there is no C++ compiler"
    sources = sorted(map(str, SOURCES.glob("*.cc")))
    # Under another name first: a process that has loaded the old one keeps it.
    beside = ROOT / f"{TARGET}.{os.getpid()}"
    include = f"-I{sysconfig.get_path('include')}"
    command = [compiler, *_FLAGS, *_HARDENED, include, *sources, "-o", str(beside), *_LINKED]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{compiler} says: {done.stderr[-2000:]}"
        beside.replace(ROOT / TARGET)
    except OSError as error:
        return f"{compiler} cannot be run: {error}"
    finally:
        beside.unlink(missing_ok=True)
    return None


class CompiledDoor(BuildHookInterface[Any]):
    """Puts the door into the wheel where it can be compiled: then that is of this platform."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles it, and says what the wheel holds of it."""
        if why := compile_door():
            print(f"{TARGET} is left out: {why}", file=sys.stderr)
        # An editable installation loads it from where it is compiled.
        elif version != "editable":
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"cp311-abi3-{platform}"
            build_data["force_include"][str(ROOT / TARGET)] = TARGET


if __name__ == "__main__":
    sys.exit(compile_door())
