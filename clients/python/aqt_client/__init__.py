"""Clients of the Open Inference Protocol over gRPC: `Client`, and `AsyncClient` for asyncio.

    with Client("localhost:8001") as client:
        result = client.infer("mnist", {"image": images})
        result["logits"], result.exact

They speak to `aqt serve`, and to any other server of the protocol. Importing this needs no jax.
"""

from aqt_client._aio import AsyncClient as AsyncClient
from aqt_client._calls import RetryPolicy as RetryPolicy
from aqt_client._errors import AccessDenied as AccessDenied
from aqt_client._errors import ClientError as ClientError
from aqt_client._errors import DeadlineExceeded as DeadlineExceeded
from aqt_client._errors import InvalidRequest as InvalidRequest
from aqt_client._errors import MessageTooLarge as MessageTooLarge
from aqt_client._errors import NotFound as NotFound
from aqt_client._errors import Overloaded as Overloaded
from aqt_client._errors import ServerError as ServerError
from aqt_client._errors import Unavailable as Unavailable
from aqt_client._results import InferResult as InferResult
from aqt_client._results import ModelMetadata as ModelMetadata
from aqt_client._results import ModelState as ModelState
from aqt_client._results import ServerMetadata as ServerMetadata
from aqt_client._results import TensorMetadata as TensorMetadata
from aqt_client._shared_memory import Region as Region
from aqt_client._shared_memory import SharedTensor as SharedTensor
from aqt_client._sync import Client as Client

__all__ = [
    "AccessDenied",
    "AsyncClient",
    "Client",
    "ClientError",
    "DeadlineExceeded",
    "InferResult",
    "InvalidRequest",
    "MessageTooLarge",
    "ModelMetadata",
    "ModelState",
    "NotFound",
    "Overloaded",
    "Region",
    "RetryPolicy",
    "ServerError",
    "ServerMetadata",
    "SharedTensor",
    "TensorMetadata",
    "Unavailable",
]
