"""What calls return."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerMetadata:
    """What a server says of itself."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorMetadata:
    """Name, datatype and shape of one input or output of a model.

    `datatype` is the protocol's name ("FP32", "BF16", "BYTES"). In `shape`, -1 is any size.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelMetadata:
    """The signature of a model, and its versions that are served."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """Where one version of a model is in its life, in the server's words.

    `state` is "READY", "LOADING", "UNLOADING", or "UNAVAILABLE" for one that was refused or is not
    loaded; `reason` says why, where there is more to say.
    """

    version: str
    state: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InferResult:
    """The answer to one inference request; `result["y"]` is its output `y`.

    The arrays share the answer's memory and are read-only; copy one to change it. BYTES outputs
    have dtype object and elements of type `bytes`. `model_version` is the version that answered,
    `id` the request's own, `parameters` what else the server says.
    """

    outputs: Mapping[str, np.ndarray[Any, Any]]
    model_name: str
    model_version: str
    id: str
    parameters: Mapping[str, bool | int | float | str]

    @property
    def exact(self) -> bool | None:
        """Whether the answer has the bits that training computes; None: the server does not say.

        It is the response parameter `aqt_exact` of `aqt serve`.
        """
        value = self.parameters.get("aqt_exact")
        return value if isinstance(value, bool) else None

    def __getitem__(self, output: str) -> np.ndarray[Any, Any]:
        try:
            return self.outputs[output]
        except KeyError:
            raise KeyError(
                f"no output {output!r} in the answer, which has {sorted(self.outputs)}"
            ) from None
