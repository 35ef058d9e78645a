"""Load on a server, and what came of it.

A closed loop keeps so many requests under way: each caller asks again when it is answered, so a
slow server is asked less. An open loop asks at times that are fixed beforehand, whatever the server
does, and a latency counts from the time at which its request was due, not from when it could be
sent: a server that stands still for a second is charged for all that was due meanwhile.
"""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from aqt_client import AsyncClient, InferResult, ModelMetadata

Inputs = Mapping[str, np.ndarray[Any, Any]]
_Ask = Callable[[int, float], Coroutine[Any, Any, None]]
_LARGEST_INTEGER = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """`concurrency` requests under way, or with `rate_per_s` an open loop; after a warm-up.

    Those of an open loop come at equal distances, or independently of one another, as those of many
    callers do ("poisson").
    """

    concurrency: int
    rate_per_s: float | None
    arrivals: Literal["poisson", "constant"]
    seconds: float
    warmup_s: float


@dataclasses.dataclass(slots=True, kw_only=True)
class Measured:
    """What came of the requests after the warm-up.

    `latencies_s` are of those that were answered, `late_s` how long after it was due each request
    of an open loop was sent, `errors` counts the others by status, and `sentences` has what the
    first of each was told. `different` answers had not the bits of an earlier one of the same
    version to the same inputs.
    """

    seconds: float = 0.0
    latencies_s: list[float] = dataclasses.field(default_factory=list)
    late_s: list[float] = dataclasses.field(default_factory=list)
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    sentences: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    rows: int = 0
    different: int = 0


def random_inputs(model: "ModelMetadata", *, rows: int, length: int, seed: int) -> Inputs:
    """Inputs that fit `model`: `rows` rows, other sizes that a request chooses `length`.

    Floats are normal, integers below 100.

    Raises:
      ValueError: an input is of text.
    """
    from aqt_protos import tensors

    random = np.random.default_rng(seed)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for spec in model.inputs:
        datatype = tensors.datatype(spec.datatype)
        if datatype.name == "BYTES":
            raise ValueError(f"input {spec.name!r} is of BYTES: give inputs in a file")
        shape = [size if size >= 0 else length for size in spec.shape]
        if spec.shape and spec.shape[0] == -1:
            shape[0] = rows
        is_float = datatype.name in ("FP16", "FP32", "FP64", "BF16")
        most = 2 if datatype.name == "BOOL" else _LARGEST_INTEGER
        values = random.normal(size=shape) if is_float else random.integers(0, most, shape)
        found[spec.name] = values.astype(datatype.dtype)
    return found


async def put(
    client: "AsyncClient",
    model: str,
    version: str,
    requests: Sequence[Inputs],
    shape: Shape,
    *,
    check: bool,
    seed: int,
) -> Measured:
    """What comes of the load `shape` on `model`: `requests` are asked in turn, each once at a time.

    With `check` the bits of answers are compared.
    """
    from aqt_client import ClientError

    measured = Measured()
    known: dict[tuple[int, str], InferResult] = {}
    first = time.perf_counter()
    begin = first + shape.warmup_s
    end = begin + shape.seconds

    async def ask(index: int, due: float) -> None:
        which = index % len(requests)
        try:
            answer = await client.infer(model, requests[which], version=version)
        except ClientError as error:
            if due >= begin:
                measured.errors[error.code.name] += 1
                measured.sentences.setdefault(error.code.name, str(error))
            return
        now = time.perf_counter()
        if due >= begin:
            measured.latencies_s.append(now - due)
            measured.rows += _rows(requests[which])
        if check:
            before = known.setdefault((which, answer.model_version), answer)
            measured.different += not _same_bits(before, answer)

    if shape.rate_per_s is None:
        await _closed(ask, shape.concurrency, end)
    else:
        gaps = _gaps(shape, np.random.default_rng(seed))
        await _open(ask, first + np.cumsum(gaps), begin, measured)
    measured.seconds = max(time.perf_counter(), end) - begin
    return measured


async def _closed(ask: _Ask, callers: int, end: float) -> None:
    async def call(index: int) -> None:
        while (now := time.perf_counter()) < end:
            await ask(index, now)
            index += callers

    await asyncio.gather(*map(call, range(callers)))


async def _open(
    ask: _Ask,
    due_times: np.ndarray[Any, Any],
    begin: float,
    measured: Measured,
) -> None:
    async with asyncio.TaskGroup() as tasks:
        for index, due in enumerate(due_times.tolist()):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if due >= begin:
                measured.late_s.append(time.perf_counter() - due)
            tasks.create_task(ask(index, due))


def _gaps(shape: Shape, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Seconds between one request and the next, until the time is up."""
    assert shape.rate_per_s is not None
    count = round(shape.rate_per_s * (shape.warmup_s + shape.seconds))
    if shape.arrivals == "constant":
        return np.full(count, 1 / shape.rate_per_s)
    return random.exponential(1 / shape.rate_per_s, count)


def _rows(inputs: Inputs) -> int:
    return max((array.shape[0] for array in inputs.values() if array.ndim), default=1)


def _same_bits(one: "InferResult", other: "InferResult") -> bool:
    from aqt_protos import tensors

    return one.outputs.keys() == other.outputs.keys() and all(
        array.dtype == other[name].dtype
        and array.shape == other[name].shape
        and tensors.to_raw(array) == tensors.to_raw(other[name])
        for name, array in one.outputs.items()
    )
