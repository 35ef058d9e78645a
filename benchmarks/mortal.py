"""A process that ends with the one that started it, also with one that is killed.

Linux tells a process that its parent is dead if it has asked for it, and a program that takes the
place of another in a process still is told: so this asks, and then becomes the command.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def mortal(*command: str | Path) -> list[str]:
    """`command` such that it gets SIGTERM when this process ends; to be run by its main thread."""
    program = (sys.executable, "-I", "-S", __file__, str(os.getpid()))
    return [*program, *map(str, command)]


def _become(parent: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == parent:  # else it was too late to ask
        os.execvp(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
