"""The files of a bundle: what is there, whether it is what was written, and on the disk."""

import hashlib
import os
from pathlib import Path

from aqt_engine.manifest import FileDigest, Manifest

MANIFEST = "manifest.json"


class BundleError(ValueError):
    """A bundle cannot be read: it is missing, damaged, changed, or of another format."""


def files(root: Path) -> list[str]:
    """The files below `root` but for the manifest, as a manifest lists them."""
    return sorted(
        file.relative_to(root).as_posix()
        for file in root.rglob("*")
        # A link is no directory of ours, whatever it leads to.
        if (file.is_symlink() or not file.is_dir()) and file != root / MANIFEST
    )


def digest(file: Path) -> FileDigest:
    """What a manifest says of `file`."""
    # A pipe that nobody writes to would be waited for, for ever.
    if not file.is_file():
        raise OSError(0, "it is no regular file")
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileDigest(sha256=sha256, nbytes=file.stat().st_size)


def check_files(root: Path, manifest: Manifest) -> None:
    """Checks that the files at `root` are those of `manifest`, in every byte.

    Raises:
      BundleError: one is missing, not listed, truncated or changed.
    """
    present = set(files(root))
    wrong = [f"{name} is missing" for name in sorted(set(manifest.files) - present)]
    wrong += [f"{name} is not listed" for name in sorted(present - set(manifest.files))]
    for name in sorted(present & set(manifest.files)):
        try:
            expected, found = manifest.files[name], digest(root / name)
        except OSError as error:
            wrong.append(f"{name} cannot be read ({error.strerror})")
            continue
        if found.nbytes != expected.nbytes:
            wrong.append(f"{name} has {found.nbytes} bytes instead of {expected.nbytes}")
        elif found != expected:
            wrong.append(f"{name} has other content than was written")
    if wrong:
        raise BundleError(
            f"{root} does not match its manifest: {'; '.join(wrong)}; copy it again from its "
            f"source or convert again"
        )


def sync(root: Path) -> None:
    """Puts every file on the disk before the rename makes the bundle visible."""
    for path in [*root.rglob("*"), root]:
        sync_entry(path)


def sync_entry(path: Path) -> None:
    """Puts a file, or the entries of a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
