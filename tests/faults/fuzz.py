"""A million requests that no client means, through the gRPC door without its socket: `make fuzz`.

PYTHONPATH=tests python -m faults.fuzz --inputs 1000000 --seed 7
"""

import argparse
import asyncio
import collections
import itertools
import secrets
import sys
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np
import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_protos import SERVICE_NAME
from aqt_protos.tensors import DATATYPES
from aqt_server.errors import InvalidRequest
from aqt_server.rest_tensors import read_request
from bundles import FEATURES, write_linear
from compiled_door import fast_flags
from faults.inside import REFUSALS, inside
from faults.mutations import damaged, mutated, seeds
from server.odd_bundles import ARRAY_DATATYPES, TILE, WIDTH, write_identity
from server_process import WAIT_S, serving

BODIES = [
    b'{"id": "1", "parameters": {"priority": 1, "a": null}, "inputs": [{"name": "x", "shape": '
    b'[1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}], "outputs": [{"name": '
    b'"y", "parameters": {"binary_data": true}}]}\x00\x00\x80\x3f\x00\x00\x80\x3f',
    b'{"inputs": [{"name": "x", "shape": [2, 2], "datatype": "INT64", "data": [[1, -2], [3e1, 4]]},'
    b' {"name": "b", "shape": [2], "datatype": "BYTES", "data": ["a", "\xc3\xa9"]}, {"name": "t", '
    b'"shape": [1], "datatype": "BOOL", "data": [true]}, {"name": "f", "shape": [1], "datatype": '
    b'"BF16", "data": [NaN, 1.5e300, -Infinity]}]}',
]
console = Console()


def models(root: Path) -> list[bytes]:
    """Writes two models at `root`; returns requests to them: of floats, and of every datatype."""
    write_linear(root / "linear" / "1")
    write_identity(root / "identity" / "1")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, FEATURES)).astype(np.float32)
    every = [
        (name, name, np.arange(TILE * WIDTH).reshape(TILE, WIDTH).astype(DATATYPES[name].dtype))
        for name in ARRAY_DATATYPES
    ]
    return seeds([("linear", [("x", "FP32", x)]), ("identity", every)])


def fuzz_bodies(count: int, seed: int) -> list[bytes]:
    """Of `count` bodies of HTTP, those that are neither read nor refused."""
    wrong: list[bytes] = []
    for body in itertools.islice(damaged(BODIES, seed), count):
        for length in (None, str(len(BODIES[0])), "40"):
            try:
                read_request(body, length, model="linear", version="", max_json_bytes=10**6)
            except InvalidRequest:
                pass
            except Exception:
                wrong.append(body)
    return wrong


async def fuzz_inside(repository: Path, originals: list[bytes], count: int, seed: int, log) -> dict:
    """Sends `count` inputs, and returns what came of them.

    `log` is called with the number sent and the process's memory in bytes, some hundred times.
    """
    process = psutil.Process()
    wrong: list[bytes] = []
    async with inside(repository) as door:
        for sent in originals:
            await door.send(sent)
        for number, sent in enumerate(itertools.islice(mutated(originals, seed), count), start=1):
            status = await door.send(sent)
            if status != "OK" and status not in REFUSALS:
                wrong.append(sent)
            if number % max(1, count // 100) == 0:
                log(number, process.memory_info().rss)
        return {"statuses": door.statuses, "wrong": wrong}


def fuzz_live(address: str, originals: list[bytes], count: int, seed: int) -> collections.Counter:
    """Sends `count` inputs to the server at `address`; the statuses."""
    statuses = collections.Counter[str]()
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer")
        for sent in itertools.islice(mutated(originals, seed), count):
            statuses[call.future(sent, timeout=WAIT_S).code().name] += 1
    return statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="without a socket")
    parser.add_argument(
        "--live",
        type=int,
        default=20_000,
        help="to a server process, in halves to its two doors of gRPC where it has both",
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    arguments = parser.parse_args()
    memory: list[tuple[int, int]] = []
    started = time.monotonic()

    def log(number: int, rss: int) -> None:
        memory.append((number, rss))
        if len(memory) % 10 == 0:
            took = time.monotonic() - started
            console.print(f"{number:,} inputs, {took:.0f} s, {rss / 2**20:.1f} MiB", style="dim")

    with tempfile.TemporaryDirectory() as name:
        repository = Path(name) / "repository"
        originals = models(repository)
        told = asyncio.run(
            fuzz_inside(repository, originals, arguments.inputs, arguments.seed, log)
        )
        wrong_bodies = fuzz_bodies(arguments.inputs // 10, arguments.seed)
        took = time.monotonic() - started
        with serving(repository, *fast_flags(), log=Path(name) / "log", forked=False) as server:
            before = psutil.Process(server.process.pid).memory_info().rss
            doors = [server.address, *filter(None, [server.fast_address])]
            live = collections.Counter[str]()
            for seed, address in enumerate(doors, start=arguments.seed + 1):
                live += fuzz_live(address, originals, arguments.live // len(doors), seed)
            after = psutil.Process(server.process.pid).memory_info().rss
            alive = server.process.poll() is None and "Traceback" not in server.log()
    tenth = memory[len(memory) // 10][1]
    table = Table(box=box.MARKDOWN, title=f"Fuzz of seed {arguments.seed}, {took:.0f} s")
    table.add_column("what")
    table.add_column("how many", justify="right")
    for status, count in sorted(told["statuses"].items()):
        table.add_row(f"{status} in this process", f"{count:,}")
    for status, count in sorted(live.items()):
        table.add_row(f"{status} of a server process", f"{count:,}")
    table.add_row("memory after a tenth, MiB", f"{tenth / 2**20:.1f}")
    table.add_row("memory at the end, MiB", f"{memory[-1][1] / 2**20:.1f}")
    table.add_row("memory of the server process before, MiB", f"{before / 2**20:.1f}")
    table.add_row("memory of the server process after, MiB", f"{after / 2**20:.1f}")
    table.add_row("bodies of HTTP, only read", f"{3 * (arguments.inputs // 10):,}")
    console.print(table)
    wrong = [sent.hex() for sent in (*told["wrong"], *wrong_bodies)]
    if wrong or not alive or not live.keys() <= {"OK", *REFUSALS}:
        sys.exit("\n".join(["the server failed, or answered with another status:", *wrong[:20]]))


if __name__ == "__main__":
    main()
