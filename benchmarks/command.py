"""What the commands of benchmarks share: how they are asked, and what they write."""

import argparse
import json
from pathlib import Path
from typing import Any


def parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m benchmarks.MODULE`, with the options that all of them have."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", type=Path, help="write the environment and all figures here")
    made.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return made


def write(path: Path | None, environment: dict[str, Any], results: Any) -> None:
    """Writes what was measured, and with what, to `path` if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": environment, "results": results}
        path.write_text(json.dumps(document, indent=2) + "\n")
