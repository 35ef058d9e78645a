"""A model repository that is a directory, NAME/VERSION/, with a mark of the state of its files."""

import contextlib
import os
from pathlib import Path

Key = tuple[str, int]
"""A model's name and a version's number."""
Fingerprint = tuple[tuple[str, int, int | str], ...]
"""Path, size and a mark, such as the time of change, of each file: equal while nothing changes."""

_NO_FOLDER = FileNotFoundError, NotADirectoryError, PermissionError


class SourceError(Exception):
    """There is no model repository where there should be one."""


class OutsideError(Exception):
    """A version has files that are not in the repository."""


class Directory:
    """The versions in the directory `root`."""

    def __init__(self, root: Path):
        self._root = root

    def versions(self) -> dict[Key, Fingerprint]:
        """The versions, by model, the newest of each first.

        Raises:
          OSError: the directory cannot be read.
        """
        found: dict[Key, Fingerprint] = {}
        for model in sorted(self._root.iterdir()):
            if model.name.startswith(".") or not model.is_dir():
                continue
            numbers = [d.name for d in model.iterdir() if is_version(d.name)]
            for number in sorted(map(int, numbers), reverse=True):
                found[model.name, number] = _fingerprint(model / str(number))
        return found

    def local(self, key: Key) -> Path:
        """Where a version lies.

        Raises:
          OutsideError: it or one of its files is not in the repository, wherever links lead.
        """
        path = self._root / key[0] / str(key[1])
        root = self._root.resolve()
        for file in (path, *_links(path)):
            if not file.resolve().is_relative_to(root):
                raise OutsideError(
                    f"{file} leads out of the model repository, to {file.resolve()}: copy it there"
                )
        return path


def is_version(name: str) -> bool:
    """Whether a directory of this name is a version: a number from 1."""
    return name.isascii() and name.isdecimal() and name[0] != "0"


def _links(path: Path) -> list[Path]:
    """The links below `path`: nothing else there leads anywhere."""
    found: list[Path] = []
    folders = [os.fspath(path)]
    # Not by `Path`, which takes eight times as long for hundreds of files, and a start waits.
    while folders:
        with contextlib.suppress(*_NO_FOLDER), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    found.append(Path(entry.path))
                elif entry.is_dir():
                    folders.append(entry.path)
    return found


def _fingerprint(path: Path) -> Fingerprint:
    marks: list[tuple[str, int, int | str]] = []
    folders = [os.fspath(path)]
    # Not by `Path`, which takes three times as long, and this is done every few seconds.
    while folders:
        with contextlib.suppress(*_NO_FOLDER), os.scandir(folders.pop()) as entries:
            for entry in entries:
                # What was removed while we looked, the next look will tell.
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    marks.append((entry.path, status.st_size, status.st_mtime_ns))
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return tuple(sorted(marks))
