"""On which devices versions compute."""

import dataclasses
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """On which devices each version computes."""

    copies: Annotated[
        PositiveInt,
        Field(
            title="N",
            description="of each version, a power of two, each on devices of its own: batches are "
            "spread over them. Raise --max-batch-rows with it. Versions in mode fast have one",
        ),
    ] = 1
    shards: Annotated[
        PositiveInt,
        Field(
            title="N",
            description="of the integer weights of each copy, on as many devices; for models that "
            "one device cannot hold, as devices then wait for each other in every layer",
        ),
    ] = 1
    hosts: Annotated[
        PositiveInt,
        Field(
            title="N",
            description="that compute each version together, with as many devices of each; start "
            "the server on each of them, with the same settings but --host-index",
        ),
    ] = 1
    host_index: Annotated[
        NonNegativeInt,
        Field(
            title="I",
            description="of this host among them; the one of index 0 leads and answers requests",
        ),
    ] = 0
    coordinator: Annotated[
        str,
        Field(
            title="ADDRESS:PORT",
            description="where the host that leads listens to the others, without encryption: in "
            "a network of the hosts alone",
        ),
    ] = ""
