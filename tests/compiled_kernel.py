"""The int8 kernel of this checkout, made anew where its sources are newer."""

import fcntl
import importlib.util
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def why_no_kernel() -> str | None:
    """Has it in place and returns None, or why there is nothing to compile it with."""
    spec = importlib.util.spec_from_file_location("hatch_build_kernel", ROOT / "hatch_build.py")
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    sources = [*hatch_build.SOURCES.glob("*.cc"), *hatch_build.SOURCES.glob("*.h")]
    newest = max(file.stat().st_mtime for file in sources)
    there = ROOT / hatch_build.TARGET
    # Several processes test at once.
    with (Path(tempfile.gettempdir()) / "aqt-compiled-kernel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if there.exists() and there.stat().st_mtime >= newest:
            return None
        return hatch_build.compile_kernel()
