"""A version that the server knows, and the state that it is in."""

import dataclasses
import enum

from aqt_server.directory import Fingerprint
from aqt_server.servable import Servable


class State(enum.StrEnum):
    """Where a version is in its life, in the protocol's words."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A version of the repository, and why it is in its state where there is more to say."""

    name: str
    version: int
    state: State
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A version that the server knows: what came of it, and with which files.

    `servable` is what answers, if something does; `reason` says why it is not what the files are.
    """

    state: State
    fingerprint: Fingerprint
    reason: str = ""
    servable: Servable | None = None
    lacked_memory_at: int | None = None
    """How often memory had become free when it was refused for want of it."""
    unread: bool = False
    """Whether it was refused because its files could not be read, which may pass."""
    late: bool = False
    """Whether it is still being loaded, beside others, as it took longer than loads wait."""
