"""All settings of the server, each from a flag, an environment variable, or its default."""

import enum
from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_MIB = 2**20


class ModelControl(enum.StrEnum):
    """Who decides which models are loaded."""

    POLL = "poll"
    """The directory: what appears is loaded, what vanishes is unloaded."""
    EXPLICIT = "explicit"
    """Clients, by RepositoryModelLoad and Unload, beginning with `load_model`."""
    NONE = "none"
    """Nobody: what is there at the start is loaded, and stays."""


class Settings(BaseSettings):
    """Serves the bundles of a model repository over the Open Inference Protocol (gRPC).

    Each option may also be given as an environment variable: AQT_PORT for --port, and so on.
    """

    model_config = SettingsConfigDict(
        env_prefix="AQT_",
        frozen=True,
        cli_prog_name="aqt serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        # Else a directory `model/` would be reserved by pydantic.
        protected_namespaces=(),
    )

    model_repository: Path = Field(description="directory of bundles, NAME/VERSION/")
    host: str = Field(
        default="127.0.0.1", description="address to listen on; 0.0.0.0 for all, as in a container"
    )
    port: int = Field(default=8001, ge=0, le=65535, description="port to listen on; 0 for any free")
    max_batch_rows: PositiveInt = Field(
        default=64,
        description="rows computed at once, rounded up to whole buckets of tiles; more raises "
        "throughput and the latency under load",
    )
    queue_rows: PositiveInt = Field(
        default=1024,
        description="rows of a model that may wait before requests are refused with "
        "RESOURCE_EXHAUSTED; also the most rows of one request",
    )
    max_message_bytes: PositiveInt = Field(
        default=64 * _MIB, description="largest request and response, in bytes"
    )
    metrics_port: int = Field(
        default=8002,
        ge=-1,
        le=65535,
        description="port of the Prometheus metrics, at /metrics; 0 for any free, -1 for none",
    )
    model_control: ModelControl = Field(
        default=ModelControl.POLL,
        description="poll: load versions that appear in the repository, drain and unload versions "
        "that vanish; explicit: load and unload as clients ask for it; none: load what is there at "
        "the start",
    )
    load_model: tuple[str, ...] = Field(
        default=(),
        description="name of a model to load at the start under --model-control explicit, '*' for "
        "all; may be repeated",
    )
    poll_s: PositiveFloat = Field(
        default=2.0,
        description="seconds between two looks at the repository under --model-control poll",
    )
    drain_s: NonNegativeFloat = Field(
        default=30.0,
        description="seconds that accepted requests have to finish after SIGTERM or SIGINT, or "
        "when their version is unloaded; what takes longer is cut off",
    )
    compilation_cache: Path = Field(
        default=Path("~/.cache/aqt/compiled"),
        description="directory of compiled executables, so that a restart does not compile again",
    )
    allow_inexact: bool = Field(
        default=False,
        description="serve versions whose witness does not reproduce here; their responses say "
        "`aqt_exact: false`",
    )

    @model_validator(mode="after")
    def _check_load_model(self) -> Self:
        if self.load_model and self.model_control is not ModelControl.EXPLICIT:
            raise ValueError(
                f"--load-model needs --model-control explicit, and it is {self.model_control}"
            )
        return self
