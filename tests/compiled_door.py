"""The compiled door of this checkout, made anew where its sources are newer."""

import importlib.util
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[1] / "server"


def compiled_door() -> None:
    """Has it in place, or skips the test where there is nothing to compile it with."""
    spec = importlib.util.spec_from_file_location("hatch_build", SERVER / "hatch_build.py")
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    newest = max(file.stat().st_mtime for file in hatch_build.SOURCES.iterdir())
    there = SERVER / hatch_build.TARGET
    if there.exists() and there.stat().st_mtime >= newest:
        return
    if why := hatch_build.compile_door():
        pytest.skip(f"the fast door cannot be compiled here: {why}")


def fast_flags() -> tuple[str, ...]:
    """What opens it in a server; nothing where it was not compiled."""
    return ("--fast-port", "0") if importlib.util.find_spec("aqt_server._door") else ()
