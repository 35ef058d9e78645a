"""A server under mixed traffic for long, with its memory watched: `make soak MINUTES=30`.

PYTHONPATH=tests python -m faults.soak --minutes 30

Good requests through every door, whose every bit is compared, streams, requests that are cancelled
or out of time, garbage, connections that come and go, scrapes of the metrics. After a warm-up the
memory of the server may not change by more than 2 %, with what gRPC itself loses for each call that
is cancelled before it was read (docs/operations.md). Where the fast door is compiled, it is open.
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import grpc
import numpy as np
import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_protos import SERVICE_NAME
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from bundles import FEATURES, reference, write_linear
from compiled_door import fast_flags
from faults.inside import REFUSALS
from faults.mutations import damaged, mutated, seeds
from server.messages import MODEL, request_of
from server_process import WAIT_S, ServerProcess, serving

MOST_CHANGE = 0.02
GRPC_LOSES = 96
"""Bytes for each call that is gone before grpc.aio has read its request: docs/operations.md."""
CANCELLED = "cancelled or late, gRPC"
CANCELLED_AT_ONCE = 6
PAUSE_S = 0.02
CANCELLED_PAUSE_S = 0.6
"""Six at once, and yet fewer than the good ones: callers give up, but most do not."""
console = Console()
Sample = tuple[float, int, int, int]
"""When, in seconds; memory in bytes; open files; threads."""


class Traffic:
    """What the clients do, each again and again until the time is up."""

    def __init__(self, server: ServerProcess, bundle: Path):
        rng = np.random.default_rng(0)
        self._server = server
        self._rows = rng.normal(size=(64, FEATURES)).astype(np.float32)
        self._expected = reference(bundle, self._rows)
        self._random = random.Random(0)
        originals = seeds([(MODEL, [("x", "FP32", self._rows[:3])])])
        self._mutated = mutated(originals, 0)
        body = {"inputs": [self._json(self._rows[:2])]}
        self._bodies = damaged([json.dumps(body).encode()], 0)
        self.done = collections.Counter[str]()
        self.wrong: list[str] = []

    @staticmethod
    def _json(x: np.ndarray) -> dict:
        return {"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}

    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        start = self._random.randrange(60)
        chosen = slice(start, start + self._random.randint(1, 64 - start))
        return self._rows[chosen], self._expected[chosen]

    def _check(self, raw: bytes, expected: np.ndarray) -> None:
        if raw != expected.tobytes():
            self.wrong.append("an answer has other bits")

    async def run(self, seconds: float) -> None:
        """All kinds of clients at once, for so long."""
        end = time.monotonic() + seconds
        async with contextlib.AsyncExitStack() as opened:
            http = await opened.enter_async_context(aiohttp.ClientSession(self._server.http_url))
            channel = await self._channel(opened, self._server.address)
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            kinds: dict[str, Callable[[], Awaitable[None]]] = {
                **self._unary("gRPC", channel, channel),
                "good, HTTP": lambda: self._good_http(http),
                "streams of 10": lambda: self._stream(stub),
                "garbage, HTTP": lambda: self._garbage_http(http),
                "new connections": self._connection,
                "scrapes": lambda: self._scrape(http),
            }
            if address := self._server.fast_address:
                # Who resets often is cut off there, and others on the same connection with them.
                fast, resetting = [await self._channel(opened, address) for _ in range(2)]
                kinds |= self._unary("fast door", fast, resetting)
            async with asyncio.TaskGroup() as clients:
                for kind, once in kinds.items():
                    clients.create_task(self._repeat(kind, once, end))

    async def _channel(self, opened: contextlib.AsyncExitStack, address: str) -> grpc.aio.Channel:
        own = [("grpc.use_local_subchannel_pool", 1)]
        return await opened.enter_async_context(grpc.aio.insecure_channel(address, options=own))

    def _unary(
        self, door: str, channel: grpc.aio.Channel, cancelling: grpc.aio.Channel
    ) -> dict[str, Callable[[], Awaitable[None]]]:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        other = pb_grpc.GRPCInferenceServiceStub(cancelling)
        raw = channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer")
        return {
            f"good, {door}": lambda: self._good(stub),
            f"cancelled or late, {door}": lambda: self._cancelled(other),
            f"garbage, {door}": lambda: self._garbage(raw),
        }

    async def _repeat(self, kind: str, once: Callable[[], Awaitable[None]], end: float) -> None:
        while time.monotonic() < end:
            await once()
            self.done[kind] += 1
            await asyncio.sleep(PAUSE_S)

    async def _good(self, stub) -> None:
        x, expected = self._drawn()
        answer = await stub.ModelInfer(request_of(x), timeout=WAIT_S)
        self._check(answer.raw_output_contents[0], expected)

    async def _good_http(self, http: aiohttp.ClientSession) -> None:
        x, expected = self._drawn()
        body = {"inputs": [self._json(x)], "parameters": {"binary_data_output": True}}
        async with http.post(f"/v2/models/{MODEL}/infer", json=body) as response:
            answer = await response.read()
            length = int(response.headers["Inference-Header-Content-Length"])
        self._check(answer[length:], expected)

    async def _stream(self, stub) -> None:
        drawn = [self._drawn() for _ in range(10)]
        answers = stub.ModelStreamInfer(iter([request_of(x) for x, _ in drawn]), timeout=WAIT_S)
        expected = iter(drawn)
        async for answer in answers:
            self._check(answer.infer_response.raw_output_contents[0], next(expected)[1])

    async def _cancelled(self, stub) -> None:
        calls = [stub.ModelInfer(request_of(self._rows)) for _ in range(CANCELLED_AT_ONCE - 1)]
        late = stub.ModelInfer(request_of(self._rows), timeout=1e-4)
        await asyncio.sleep(self._random.random() * 0.002)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, late, return_exceptions=True)
        await asyncio.sleep(CANCELLED_PAUSE_S)

    async def _garbage(self, raw) -> None:
        for sent in itertools.islice(self._mutated, 10):
            try:
                await raw(sent, timeout=WAIT_S)
            except grpc.aio.AioRpcError as error:
                if error.code().name not in REFUSALS:
                    self.wrong.append(f"{error.code().name} for {sent.hex()}")

    async def _garbage_http(self, http: aiohttp.ClientSession) -> None:
        body = next(self._bodies)
        async with http.post(f"/v2/models/{MODEL}/infer", data=body) as response:
            await response.read()
            if response.status not in (200, 400):
                self.wrong.append(f"{response.status} for {body.hex()}")

    async def _connection(self) -> None:
        server = self._server
        http = server.http_url.removeprefix("http://")
        for address in filter(None, (server.address, server.fast_address, http)):
            host, _, port = address.rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(self._random.randbytes(20))
            writer.close()

    async def _scrape(self, http: aiohttp.ClientSession) -> None:
        async with http.get(self._server.metrics_url) as response:
            await response.read()
        await asyncio.sleep(1)


async def watch(
    process: psutil.Process, every_s: float, samples: list[tuple[float, int, int, int]]
):
    """Appends a sample of `process` again and again, until it is cancelled."""
    started = time.monotonic()
    while True:
        with process.oneshot():
            memory, threads = process.memory_info().rss, process.num_threads()
        samples.append((time.monotonic() - started, memory, process.num_fds(), threads))
        await asyncio.sleep(every_s)


async def soak(server: ServerProcess, bundle: Path, seconds: float):
    """The traffic, and samples of the server, some hundred of them."""
    traffic = Traffic(server, bundle)
    samples: list[Sample] = []
    watching = asyncio.create_task(
        watch(psutil.Process(server.process.pid), max(0.5, seconds / 100), samples)
    )
    await traffic.run(seconds)
    watching.cancel()
    return traffic, samples


def change(samples: list[Sample], lost: float) -> tuple[float, float]:
    """Of the memory, from the median of the second tenth of the time to that of the last.

    Then the same without `lost`, bytes that go evenly over the whole time.
    """
    tenth = max(1, len(samples) // 10)
    early, late = samples[tenth : 2 * tenth], samples[-tenth:]
    before = float(np.median([memory for _, memory, *_ in early]))
    after = float(np.median([memory for _, memory, *_ in late]))
    meanwhile = lost * (np.median([t for t, *_ in late]) - np.median([t for t, *_ in early]))
    return after / before - 1, float(after - meanwhile / samples[-1][0]) / before - 1


def growth(samples: list[Sample]) -> list[float]:
    """Bytes a minute by which the memory grew in each third of the time after the first tenth."""
    tenth = len(samples) // 10
    thirds = np.array_split(np.array(samples)[tenth:, :2], 3)
    return [float(np.polyfit(part[:, 0] / 60, part[:, 1], 1)[0]) for part in thirds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        bundle = root / "repository" / MODEL / "1"
        write_linear(bundle)
        flags = (*fast_flags(), "--http-port", "0")
        with serving(root / "repository", *flags, log=root / "log", forked=False) as server:
            traffic, samples = asyncio.run(soak(server, bundle, arguments.minutes * 60))
            code = server.terminate()
            log = server.log()
    table = Table(box=box.MARKDOWN, title=f"Soak of {arguments.minutes:g} minutes")
    for column in ("minute", "memory, MiB", "open files", "threads"):
        table.add_column(column, justify="right")
    for seconds, memory, files, threads in samples[:: max(1, len(samples) // 10)]:
        table.add_row(f"{seconds / 60:.1f}", f"{memory / 2**20:.1f}", f"{files}", f"{threads}")
    console.print(table)
    for kind, count in traffic.done.items():
        console.print(f"{count:,} {kind}")
    gone = CANCELLED_AT_ONCE * traffic.done[CANCELLED]
    found, rest = change(samples, GRPC_LOSES * gone)
    console.print(f"memory changed by {found:+.2%} from the second tenth to the last")
    console.print(f"and by {rest:+.2%} without {GRPC_LOSES} bytes for each of {gone:,} calls")
    by_third = ", ".join(f"{bytes_ / 2**20:+.2f}" for bytes_ in growth(samples))
    console.print(f"in MiB a minute, by thirds of the time after the first tenth: {by_third}")
    wrong = traffic.wrong[:20]
    if wrong or abs(found) > MOST_CHANGE or code or "Traceback" in log:
        sys.exit("\n".join([f"ended with {code}", *wrong, log[-4000:]]))


if __name__ == "__main__":
    main()
