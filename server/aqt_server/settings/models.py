"""Which models are served, and how their versions are."""

import dataclasses
import enum
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class ModelControl(enum.StrEnum):
    """Who decides which models are loaded."""

    POLL = "poll"
    """The directory: what appears is loaded, what vanishes is unloaded."""
    EXPLICIT = "explicit"
    """Clients, by RepositoryModelLoad and Unload, beginning with `load_model`."""
    NONE = "none"
    """Nobody: what is there at the start is loaded, and stays."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Which models are served."""

    model_repository: Annotated[
        str,
        Field(
            title="DIR",
            description="directory of bundles, NAME/VERSION/, or a URL of one that fsspec knows, "
            "such as s3://bucket/models; nothing is written there",
        ),
    ]
    model_control: Annotated[
        ModelControl,
        Field(
            title="WHO",
            description="poll: load versions that appear in the repository, drain and unload "
            "versions that vanish; explicit: load and unload as clients ask for it; none: load "
            "what is there at the start",
        ),
    ] = ModelControl.POLL
    load_model: Annotated[
        tuple[str, ...],
        Field(
            title="NAME",
            description="a model to load at the start under --model-control explicit, '*' for all; "
            "may be repeated",
        ),
    ] = ()
    poll_s: Annotated[
        PositiveFloat,
        Field(
            title="SECONDS",
            description="between two looks at the repository under --model-control poll; raise it "
            "where a look is slow, as on network storage",
        ),
    ] = 2.0
    allow_inexact: Annotated[
        bool,
        Field(
            description="serve versions whose witness does not reproduce here; their responses say "
            "`aqt_exact: false`"
        ),
    ] = False
    fast_model: Annotated[
        tuple[str, ...],
        Field(
            title="NAME",
            description="a model to serve in mode fast, '*' for all; may be repeated. Its bits may "
            "differ with the batch that a request shares; its responses say `aqt_mode: fast`",
        ),
    ] = ()
    proof_s: Annotated[
        NonNegativeFloat,
        Field(
            title="SECONDS",
            description="that a version may take at load to be tried on more than its witness in "
            "every executable, which is always done: in other orders, beside other rows, and on "
            "random inputs",
        ),
    ] = 5.0
    compilation_cache: Annotated[
        Path,
        Field(
            title="DIR",
            description="compiled executables, and what was proved with them, so that a restart "
            "does neither again; put it on a volume that outlives the container. It is trusted: "
            "only the server may write there",
        ),
    ] = Path("~/.cache/aqt/compiled")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How the versions of a model are served."""

    model_policies: Annotated[
        Path | None,
        Field(
            title="FILE",
            description="TOML of which versions of which model are served, under which aliases and "
            "in which shares; a new content is used without a restart. Without it, all are, and a "
            "request that names none gets the newest",
        ),
    ] = None
    bundle_cache: Annotated[
        Path,
        Field(
            title="DIR",
            description="copies of the bundles of a model repository at a URL; put it on a volume "
            "that outlives the container, with room for all of them",
        ),
    ] = Path("~/.cache/aqt/bundles")
    model_memory_bytes: Annotated[
        PositiveInt | None,
        Field(
            title="BYTES",
            description="that weights and workspace of all versions may take together; one that "
            "does not fit is refused. Without it, a version is loaded if as much is available at "
            "that moment; set it where others use the same memory later",
        ),
    ] = None
    load_s: Annotated[
        PositiveFloat,
        Field(
            title="SECONDS",
            description="that other loads, and the server's readiness, wait for a version that is "
            "being loaded, or for the repository to be listed; what takes longer goes on beside "
            "them. Give it more than the largest model takes, as loads beside each other need "
            "memory at once",
        ),
    ] = 300.0
    response_cache_bytes: Annotated[
        NonNegativeInt,
        Field(
            title="BYTES",
            description="of answers that are kept for requests that come again, of all versions "
            "together; 0 for none. Set it where they do: each request costs a digest",
        ),
    ] = 0
