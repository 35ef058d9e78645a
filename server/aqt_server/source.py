"""Where versions come from: a directory, or whatever fsspec knows by a URL."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from aqt_server.directory import Directory, Fingerprint, Key
from aqt_server.directory import SourceError as SourceError


class Source(Protocol):
    """A model repository: which versions there are, and their files. Nothing is written there."""

    def versions(self) -> Mapping[Key, Fingerprint]:
        """The versions, by model, the newest of each first.

        Raises:
          OSError: it cannot be read, which may pass.
        """
        ...

    def local(self, key: Key) -> Path:
        """The directory of this machine that has the bundle of a version, unchecked.

        Raises:
          OutsideError: it has files that are not of the repository.
          BundleError: its manifest cannot be used.
          OSError: it cannot be read.
        """
        ...


def open_source(repository: str, cache: Path) -> Source:
    """The model repository at a path, or at a URL such as s3://bucket/models.

    What comes by URL is copied to `cache`.

    Raises:
      SourceError: there is none.
    """
    if "://" in repository:
        # With fsspec, which only a store needs.
        from aqt_server.store import Store

        return Store(repository, cache.expanduser())
    root = Path(repository)
    if not root.is_dir():
        raise SourceError(
            f"{repository} is no directory: give one that holds bundles as NAME/VERSION/"
        )
    return Directory(root)
