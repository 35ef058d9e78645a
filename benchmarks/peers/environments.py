"""Environments of the peers: made once under `out/bench/env`, from pinned versions, and kept."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
ENVIRONMENTS = Path("out/bench/env")
_MOST_S = 900


class NotInstalled(Exception):
    """A peer cannot be installed here; the last lines of pip say why."""


def python(name: str) -> Path:
    """The interpreter of the environment `name`, which has what `requirements/NAME.txt` pins.

    It is made again when that file changes.

    Raises:
      NotInstalled: pip found no such versions, or none for this machine.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    pinned = hashlib.sha256(requirements.read_bytes()).hexdigest()
    home = (ENVIRONMENTS / name).absolute()
    stamp, interpreter = home / "installed", home / "bin" / "python"
    if stamp.exists() and stamp.read_text() == pinned:
        return interpreter
    print(f"installing {name} into {home}", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    options = ("--quiet", "--disable-pip-version-check", "--require-hashes")
    installing = subprocess.run(
        [interpreter, "-m", "pip", "install", *options, "-r", requirements],
        stderr=subprocess.PIPE,
        text=True,
        timeout=_MOST_S,
    )
    if installing.returncode:
        raise NotInstalled(" ".join(installing.stderr.strip().splitlines()[-2:]))
    stamp.write_text(pinned)
    return interpreter


def pins(name: str) -> dict[str, str]:
    """The versions of what is compared, by package: the lines of `requirements/NAME.in`."""
    lines = (REQUIREMENTS / f"{name}.in").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)
