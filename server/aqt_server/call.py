"""What the server knows of a call beside its message, whichever door it came through."""

import dataclasses
from collections.abc import Mapping

from aqt_server.security.authentication import Principal


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Who calls, from where, and how many seconds the answer may take (None: any number).

    `headers` are those of HTTP, or the metadata of gRPC; their names are in lower case.
    """

    principal: Principal
    peer: str
    remaining_s: float | None
    headers: Mapping[str, str]
