"""What the server tells of itself."""

import dataclasses
import enum
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat


class LogFormat(enum.StrEnum):
    """How the log is written."""

    TEXT = "text"
    JSON = "json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observe:
    """What the server tells of itself."""

    log_format: Annotated[
        LogFormat,
        Field(
            title="FORM",
            description="of the log on standard error: text, or json, an object a line with the "
            "request's id, model, caller and trace",
        ),
    ] = LogFormat.TEXT
    otlp_endpoint: Annotated[
        str | None,
        Field(
            title="URL",
            pattern="^https?://.+",
            description="of an OpenTelemetry collector over HTTP, such as http://localhost:4318, "
            "that gets a span of each request; needs aqt-server[otlp]",
        ),
    ] = None
    otlp_ratio: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            title="RATIO",
            description="of traces that begin here which are kept; where the caller has a trace, "
            "the caller decides. Lower it under load",
        ),
    ] = 1.0
    status_page: Annotated[
        bool,
        Field(
            description="show what the server does to browsers, at /status of the HTTP door: "
            "models, weights and latencies, and a form for a request. Only under an address or "
            "localhost, so that no page of elsewhere gets at it; versions load a little slower",
        ),
    ] = False
    profile_directory: Annotated[
        Path | None,
        Field(
            title="DIR",
            description="for profiles that are asked for at POST /aqt/profile of the HTTP door; "
            "without it none are taken, as they slow the server down",
        ),
    ] = None
    profile_max_s: Annotated[
        PositiveFloat, Field(title="SECONDS", description="of the longest profile")
    ] = 60.0
