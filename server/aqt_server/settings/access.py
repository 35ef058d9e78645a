"""Who may do what."""

import dataclasses
import enum
from pathlib import Path
from typing import Annotated

from pydantic import Field


class Exempt(enum.StrEnum):
    """What may be asked without saying who asks."""

    HEALTH = "health"
    REFLECTION = "reflection"
    METRICS = "metrics"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may do what."""

    auth_tokens: Annotated[
        Path | None,
        Field(
            title="FILE",
            description='lines `name = "token"` of who may call; a new content is used without a '
            "restart",
        ),
    ] = None
    auth_jwks: Annotated[
        Path | None,
        Field(
            title="FILE",
            description="JSON web key set of who signs tokens (HS256, RS256); the subject of a "
            "token is who calls. A new content is used without a restart",
        ),
    ] = None
    auth_issuer: Annotated[
        str | None, Field(title="NAME", description="that tokens must have as `iss`")
    ] = None
    auth_audience: Annotated[
        str | None,
        Field(
            title="NAME",
            description="that tokens must have as `aud`; set it where the issuer also makes tokens "
            "for others. Without it, a token that has an audience is refused",
        ),
    ] = None
    auth_policy: Annotated[
        Path | None,
        Field(
            title="FILE",
            description="rules of who may infer with, see, load and unload which models; without "
            "it, whoever is authenticated may do everything",
        ),
    ] = None
    auth_exempt: Annotated[
        tuple[Exempt, ...],
        Field(
            title="WHAT",
            description="may be asked without saying who asks: health, reflection, metrics; may be "
            "repeated. Add metrics where the scraper has no token",
        ),
    ] = (Exempt.HEALTH, Exempt.REFLECTION)
