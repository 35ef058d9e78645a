"""The files of a bundle: what is there, whether it is what was written, and on the disk."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Generator
from pathlib import Path

from aqt_engine.manifest import FileDigest, Manifest

MANIFEST = "manifest.json"
_AT_ONCE = 2**16
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
_TENSORSTORE = re.compile(r"\[os_error_code='(\d+)'\]")


class BundleError(ValueError):
    """A bundle cannot be read: it is missing, damaged, changed, or of another format."""


def files(root: Path) -> list[str]:
    """The files below `root` but for the manifest, as a manifest lists them."""
    # By `os`, as there may be hundreds, and a restart waits for them.
    found: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = folder + entry.name
                # A link is no directory of ours, whatever it leads to.
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif name != MANIFEST:
                    found.append(name)
    return sorted(found)


def digest(file: Path) -> FileDigest:
    """What a manifest says of `file`."""
    # A pipe that nobody writes to would be waited for, for ever.
    if not file.is_file():
        raise OSError(0, "it is no regular file")
    with file.open("rb", buffering=0) as stream:
        nbytes = os.fstat(stream.fileno()).st_size
        if nbytes <= _AT_ONCE:
            # Without a buffer for each of hundreds of small ones.
            content = stream.read()
            return FileDigest(sha256=hashlib.sha256(content).hexdigest(), nbytes=len(content))
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileDigest(sha256=sha256, nbytes=nbytes)


def passes(error: OSError) -> bool:
    """Whether what `error` says is of the machine at this moment, and not of the file."""
    return error.errno in _PASSING


def check_files(root: Path, manifest: Manifest) -> None:
    """Checks that the files at `root` are those of `manifest`, in every byte.

    Raises:
      BundleError: one is missing, not listed, truncated or changed.
      OSError: one could not be read, which may pass.
    """
    present = set(files(root))
    wrong = [f"{name} is missing" for name in sorted(set(manifest.files) - present)]
    wrong += [f"{name} is not listed" for name in sorted(present - set(manifest.files))]
    for name in sorted(present & set(manifest.files)):
        try:
            expected, found = manifest.files[name], digest(root / name)
        except OSError as error:
            if passes(error):
                raise
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


@contextlib.contextmanager
def unfinished(parent: Path, name: str) -> Generator[Path]:
    """A new hidden directory in `parent` for what is to be renamed once it is whole.

    It is removed at the end of the block; where the process is killed before, by whoever makes the
    next one in `parent`. It is locked meanwhile, and what is locked is nobody else's to remove; on
    a file system without locks nothing is.
    """
    with _locked(parent) as alone:
        if alone:
            _remove_abandoned(parent)
        # A leading dot and no number: no repository takes it for a version.
        path = parent / f".{name}.{uuid.uuid4().hex}.writing"
        path.mkdir()
        held = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)


@contextlib.contextmanager
def onto(target: Path) -> Generator[None]:
    """Around what is written for `target`, which a full disk's error then names.

    Raises:
      OSError: what the system said, also where TensorStore has put it into words of its own.
    """
    try:
        yield
    except ValueError as error:
        if not (found := _TENSORSTORE.search(str(error))):
            raise
        code = int(found[1])
        raise OSError(code, os.strerror(code), str(target)) from error
    except OSError as error:
        # Errors of other kinds say themselves what they are about.
        if type(error) is not OSError:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


@contextlib.contextmanager
def _locked(directory: Path, *, wait: bool = True) -> Generator[bool]:
    """Whether `directory` is locked for the block; False where it has no locks, or another's."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f".*.{'?' * 32}.writing"):
        with contextlib.suppress(OSError), _locked(path, wait=False) as abandoned:
            if abandoned:
                shutil.rmtree(path, ignore_errors=True)
