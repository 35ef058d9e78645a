"""What stands in a model repository: NAME/VERSION/, and a mark of the state of its files."""

from pathlib import Path

Key = tuple[str, int]
"""A model's name and a version's number."""
Fingerprint = tuple[tuple[str, int, int], ...]
"""Path, size and modification time (ns) of each file: equal while nothing has changed."""


def versions(repository: Path) -> dict[Key, Fingerprint]:
    """The versions in `repository`, by model, the newest of each first.

    Raises:
      OSError: the directory cannot be read.
    """
    found: dict[Key, Fingerprint] = {}
    for model in sorted(repository.iterdir()):
        if model.name.startswith(".") or not model.is_dir():
            continue
        numbers = [d.name for d in model.iterdir() if d.name.isdecimal() and d.name[0] != "0"]
        for number in sorted(map(int, numbers), reverse=True):
            found[model.name, number] = _fingerprint(model / str(number))
    return found


def _fingerprint(path: Path) -> Fingerprint:
    marks: list[tuple[str, int, int]] = []
    for file in sorted(path.rglob("*")):
        try:
            status = file.stat()
        except FileNotFoundError:
            continue  # it was removed while we looked, and the next look will tell
        marks.append((str(file), status.st_size, status.st_mtime_ns))
    return tuple(marks)


class OutsideError(Exception):
    """A version has files that are not in the repository."""


def check_inside(repository: Path, version: Path) -> None:
    """Returns if `version` and each of its files are in `repository`, wherever links lead.

    Raises:
      OutsideError: one is not.
    """
    root = repository.resolve()
    for path in (version, *version.rglob("*")):
        if not path.resolve().is_relative_to(root):
            raise OutsideError(
                f"{path} leads out of the model repository, to {path.resolve()}: copy it there"
            )
