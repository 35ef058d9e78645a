"""Random requests against live servers, every answer compared in bits with the training forward.

Request i of a seed is always the same: its model, rows, length, replica, arrival, and whether its
caller goes away or gives it too little time. Which requests share a batch is up to the moment, and
must not matter. Meanwhile the replicas are restarted, killed, and loaded again.
"""

import asyncio
import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from aqt_client import DeadlineExceeded, NotFound, Overloaded, Unavailable
from aqt_engine import witness
from exactness.pools import Pool, rows_of, values
from exactness.replica import Connection, Replica
from examples.zoo import MODELS, SMALL

STREAMS = 16
MOST_ROWS = 80
FEW_ROWS = 4
"""As many as a request of a model that is not small has at most."""
ATTEMPTS = 400
"""For one request, each at another replica than before; one of them is always up."""
SHOWN = 10

Disturbance = tuple[str, Callable[[], None]]
"""What it is, and what blocks until it is over."""


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What came of an attack."""

    seed: int
    requests: int = 0
    answers: dict[str, int] = dataclasses.field(default_factory=collections.Counter)
    rows: int = 0
    values: int = 0
    refused: int = 0
    cancelled: int = 0
    expired: int = 0
    disturbances: dict[str, int] = dataclasses.field(default_factory=collections.Counter)
    differing: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    """The first requests whose answers differ, in words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Number `number` of the stream of its seed.

    `cancelled_s` is when its caller goes away, `timeout_s` how long it may take, if anything.
    """

    number: int
    model: str
    pool: Pool
    rows: list[int]
    replica: int
    pause_s: float
    cancelled_s: float | None
    timeout_s: float | None


def request(seed: int, number: int, pools: Mapping[str, Sequence[Pool]], replicas: int) -> Request:
    rng = np.random.default_rng([seed, number])
    weights = np.array([1 / MODELS[name].cost for name in pools])
    model = str(rng.choice(list(pools), p=weights / weights.sum()))
    fate = rng.random()
    return Request(
        number=number,
        model=model,
        pool=pools[model][rng.integers(len(pools[model]))],
        rows=rows_of(rng, MOST_ROWS if model in SMALL else FEW_ROWS),
        replica=int(rng.integers(replicas)),
        pause_s=float(rng.exponential(0.01)) if rng.random() < 0.2 else 0.0,
        cancelled_s=float(rng.exponential(0.01)) if fate < 0.03 else None,
        timeout_s=float(rng.exponential(0.02)) + 0.001 if fate > 0.97 else None,
    )


async def attack(
    pools: Mapping[str, Sequence[Pool]],
    replicas: Sequence[Replica],
    *,
    requests: int,
    seed: int,
    most_s: float = math.inf,
    exact: bool = True,
    disturbances: Sequence[Disturbance] = (),
    on_progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Sends at least `requests` requests, and goes on until every disturbance is over.

    Disturbances come one after the other, evenly over the requests. After `most_s` seconds no more
    requests are sent, and no more disturbances begun. `exact` is what every answer has to say of
    itself.
    """
    tally = Tally(seed=seed)
    over = asyncio.Event()
    end = time.monotonic() + most_s

    async def disturb() -> None:
        for number, (name, happen) in enumerate(disturbances, 1):
            while tally.requests < number * requests / (len(disturbances) + 1):
                await asyncio.sleep(0.05)
                if time.monotonic() > end:
                    return
            await asyncio.to_thread(happen)
            tally.disturbances[name] += 1
        over.set()

    async def stream(connections: Sequence[Connection]) -> None:
        while (tally.requests < requests or not over.is_set()) and time.monotonic() < end:
            made = request(seed, tally.requests, pools, len(replicas))
            tally.requests += 1
            await asyncio.sleep(made.pause_s)
            try:
                await _ask(made, connections, tally, exact=exact)
            except Exception as error:
                error.add_note(f"in request {made.number} of seed {seed}, to {made.model}")
                raise
            on_progress(tally)

    async with contextlib.AsyncExitStack() as stack:
        connections = [Connection(replica) for replica in replicas]
        for connection in connections:
            stack.push_async_callback(connection.close)
        async with asyncio.TaskGroup() as group:
            group.create_task(disturb())
            for _ in range(STREAMS):
                group.create_task(stream(connections))
    return tally


async def _ask(
    made: Request, connections: Sequence[Connection], tally: Tally, *, exact: bool
) -> None:
    inputs = made.pool.request(made.rows)
    for attempt in range(ATTEMPTS):
        client = connections[(made.replica + attempt) % len(connections)].client
        asked = asyncio.create_task(client.infer(made.model, inputs, timeout_s=made.timeout_s))
        if made.cancelled_s is not None:
            await asyncio.wait({asked}, timeout=made.cancelled_s)
            asked.cancel()
        try:
            result = await asked
        except asyncio.CancelledError:
            tally.cancelled += 1
            return
        except DeadlineExceeded:
            if made.timeout_s is None:
                raise
            tally.expired += 1
            return
        except (Unavailable, NotFound, Overloaded):
            tally.refused += 1
            await asyncio.sleep(0.01 if attempt % len(connections) == 0 else 0.2)
            continue
        assert result.exact is exact, f"the answer says exact: {result.exact}"
        _compare(made, result.outputs, tally)
        return
    raise AssertionError(f"no replica answered in {ATTEMPTS} attempts")


def _compare(made: Request, found: Mapping[str, np.ndarray], tally: Tally) -> None:
    expected = made.pool.answer(made.rows)
    tally.answers[made.model] += 1
    tally.rows += len(made.rows)
    tally.values += values(expected)
    if found.keys() == expected.keys() and all(_same(found[k], expected[k]) for k in expected):
        return
    verdict = witness.compare(found, expected)
    tally.differing += sum(d.values for d in verdict.differences)
    if len(tally.wrong) < SHOWN:
        tally.wrong.append(
            f"seed {tally.seed}, request {made.number}: {made.model}, rows {made.rows} of its "
            f"pool: {verdict}"
        )


def _same(found: np.ndarray, expected: np.ndarray) -> bool:
    """What `witness.compare` finds too, in less time: shapes, dtypes and bits are the same."""
    described = (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return described and found.tobytes() == expected.tobytes()
