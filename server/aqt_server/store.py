"""A model repository in an object store, or in any other file system that fsspec knows.

Its bundles are copied to a directory of this machine under the digests of their manifests, so that
a restart copies nothing again. A store cannot rename many files at once: a version is there when it
has a manifest, which is therefore to be copied last.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from aqt_engine import bundle
from aqt_engine.bundle import BundleError
from aqt_engine.files import MANIFEST, check_files, unfinished
from aqt_server.directory import Fingerprint, Key, SourceError, is_version


class Store:
    """The versions below a URL. Its methods block, and may be called from any thread.

    Raises:
      SourceError: there is no such protocol, or what it needs is not installed.
    """

    def __init__(self, url: str, cache: Path):
        self._url = url
        self._cache = cache
        try:
            found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise SourceError(f"{url} cannot be opened: {error}") from error
        self._files, root = found
        self._root = root.rstrip("/")

    def versions(self) -> dict[Key, Fingerprint]:
        """The versions that have a manifest, by model, the newest of each first.

        Raises:
          OSError: the store does not answer, or has nothing there.
        """
        try:
            self._files.invalidate_cache()
            there: Mapping[str, Mapping[str, Any]] = self._files.find(self._root, detail=True)
        except Exception as error:
            # Each store fails in its own words.
            raise OSError(f"{self._url}: {error or type(error).__name__}") from error
        if not there:
            # A store that was renamed or is not the right one looks the same as one that is empty.
            raise FileNotFoundError(f"there is nothing at {self._url}")
        marks: dict[Key, list[tuple[str, int, str]]] = {}
        whole: set[Key] = set()
        for path, told in sorted(there.items()):
            parts = path.removeprefix(f"{self._root}/").split("/", 2)
            if len(parts) < 3 or parts[0].startswith(".") or not is_version(parts[1]):
                continue
            key = parts[0], int(parts[1])
            # What else a store tells of a file, such as its ETag, is its own; it is the same while
            # the file is.
            mark = hashlib.sha256(repr(sorted(told.items(), key=str)).encode()).hexdigest()
            marks.setdefault(key, []).append((path, int(told.get("size") or 0), mark))
            if path == self._path(key, MANIFEST):
                whole.add(key)
        ordered = sorted(whole, key=lambda key: (key[0], -key[1]))
        return {key: tuple(marks[key]) for key in ordered}

    def local(self, key: Key) -> Path:
        """The copy of a version, made now if there is none, or none that is whole.

        Raises:
          BundleError: its manifest cannot be used, or names a file that is not of the bundle.
          OSError: the store does not answer, or the copy cannot be written.
        """
        self._cache.mkdir(parents=True, exist_ok=True)
        with unfinished(self._cache, "copy") as temporary:
            self._copy(key, MANIFEST, temporary)
            found = hashlib.sha256((temporary / MANIFEST).read_bytes()).hexdigest()
            copy = self._cache / found
            manifest = bundle.read_manifest(temporary)
            if copy.exists():
                try:
                    check_files(copy, manifest)
                    return copy
                except BundleError:
                    shutil.rmtree(copy)
            for name in manifest.files:
                self._copy(key, name, temporary)
            try:
                temporary.rename(copy)
            except OSError:
                if not copy.exists():
                    raise
                # Another server has made the same copy meanwhile.
            return copy

    def _copy(self, key: Key, name: str, into: Path) -> None:
        target = into / name
        if not target.resolve().is_relative_to(into.resolve()):
            raise BundleError(f"{self._path(key, MANIFEST)} names {name}, which is outside of it")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._files.get_file(self._path(key, name), str(target))
        except FileNotFoundError as error:
            raise BundleError(f"{self._path(key, name)} is missing: copy it there again") from error
        except Exception as error:
            raise OSError(f"{self._path(key, name)} cannot be copied: {error}") from error

    def _path(self, key: Key, name: str) -> str:
        return f"{self._root}/{key[0]}/{key[1]}/{name}"
