"""What serving costs: requests per second to a tiny model, beside the least that gRPC can do.

    python -m benchmarks.serving --markdown --json out/bench/serving.json

Every server runs in a process of its own, and has answered a client as it should before it is
measured. `h2load` then sends one request of one row again and again over one connection, with so
many in flight, to one server after the other, in another order each time. The requests per second
of each are divided by those of a bare identity server of Python's `grpc.aio` in the same repeat:
what slows the machine down slows both. The table gives the median of these ratios and their
quartiles, and what the server's processes spent on each request in processor time. With `--peers`,
MLServer, kserve and Triton serve an identity model in environments of their own, and a second table
divides our requests per second by theirs.
"""

import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_protos import SERVICE_NAME, tensors
from aqt_protos import open_inference_pb2 as pb
from benchmarks import command
from benchmarks.bundles import TINY, TINY_FEATURES, tiny
from benchmarks.contenders import Arrays, Contender, Running, ours, running
from benchmarks.environment import described, environment
from benchmarks.load import Load, load
from benchmarks.peers.serving import servers as peers

IN_FLIGHT = (1, 16, 64)
REPEATS = 5
SECONDS = 2.0
BARE = "bare grpc.aio"
# By how much our requests per second shall at least be more than theirs.
MARKS = {"MLServer": 3.0, "kserve": 3.0, "Triton, Python backend": 1.0}


def message(model: str, inputs: Arrays) -> bytes:
    """The request that is sent: raw contents, all outputs."""
    request = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        datatype = tensors.datatype_of(array.dtype).name
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(tensors.to_raw(array))
    return request.SerializeToString()


def bare(model: str, inputs: Arrays) -> Contender:
    """The identity server of `bare_server`."""

    def same(answer: Arrays) -> bool:
        return all(np.array_equal(answer[name], array) for name, array in inputs.items())

    return Contender(
        name=BARE,
        command=(sys.executable, "-m", "benchmarks.bare_server", "127.0.0.1:{port}"),
        model=model,
        inputs=inputs,
        expected=same,
    )


def contenders(folder: Path, *, with_peers: bool) -> list[Contender]:
    """The servers that are measured, the bare one first, then ours; their files are in `folder`."""
    repository = folder / "repository"
    reference = tiny(repository)
    inputs = {"inputs": np.random.default_rng(1).normal(size=(1, TINY_FEATURES)).astype(np.float32)}
    expected = reference(inputs)["output"]

    def exact(answer: Arrays) -> bool:
        return answer["output"].tobytes() == expected.tobytes()

    both = [ours(repository, TINY, inputs, exact, fast=fast) for fast in (False, True)]
    return [bare(TINY, inputs), *both, *(peers(folder, TINY, inputs) if with_peers else ())]


def measure(
    servers: Sequence[Running], *, in_flight: Sequence[int], repeats: int, seconds: float
) -> list[dict[str, Any]]:
    """All loads of each server and number in flight, in the order of `servers`."""
    order = np.random.default_rng(0)
    found: dict[tuple[str, int], list[Load]] = {}
    for repeat in range(repeats):
        print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
        for count in in_flight:
            for index in order.permutation(len(servers)):
                server = servers[index]
                found.setdefault((server.contender.name, count), []).append(
                    load(
                        server.address,
                        f"/{SERVICE_NAME}/ModelInfer",
                        message(server.contender.model, server.contender.inputs),
                        in_flight=count,
                        seconds=seconds,
                        processes=[server.process],
                    )
                )
    return [
        _result(server.contender.name, count, found) for count in in_flight for server in servers
    ]


def _result(
    name: str, in_flight: int, found: Mapping[tuple[str, int], Sequence[Load]]
) -> dict[str, Any]:
    rates = np.array([each.requests_per_s for each in found[name, in_flight]])
    bare_rates = np.array([each.requests_per_s for each in found[BARE, in_flight]])
    low, middle, high = np.percentile(rates / bare_rates, (25, 50, 75)).tolist()
    return {
        "server": name,
        "in_flight": in_flight,
        "requests_per_s": float(np.median(rates)),
        "ratio": middle,
        "quartiles": [low, high],
        "processor_us": 1e6 * float(np.median([x.processor_s for x in found[name, in_flight]])),
        "all_requests_per_s": rates.tolist(),
    }


def show(results: Sequence[Mapping[str, Any]], *, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    table.add_column("server", no_wrap=True)
    for column in ("in flight", "requests/s", "x bare", "quartiles", "processor us"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result["server"],
            str(result["in_flight"]),
            f"{result['requests_per_s']:,.0f}",
            f"{result['ratio']:.2f}",
            "{:.2f} to {:.2f}".format(*result["quartiles"]),
            f"{result['processor_us']:.0f}",
        )
    Console(width=max(120, Console().width)).print(table)


def show_marks(results: Sequence[Mapping[str, Any]], *, markdown: bool) -> None:
    """Our requests per second by those of each peer, repeat by repeat, and the marks."""
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for column in ("by", "in flight", "of", "ratio", "quartiles", "mark", ""):
        table.add_column(column, justify="right", no_wrap=True)
    rates = {(r["server"], r["in_flight"]): np.array(r["all_requests_per_s"]) for r in results}
    for peer, least in MARKS.items():
        for (server, in_flight), of_ours in rates.items():
            if server.startswith("aqt") and (peer, in_flight) in rates:
                ratios = of_ours / rates[peer, in_flight]
                low, middle, high = np.percentile(ratios, (25, 50, 75)).tolist()
                told = "met" if middle >= least else "missed"
                row = (peer, str(in_flight), server, f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
                table.add_row(*row, f"{least:g}", told)
    Console(width=max(120, Console().width)).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("serving", __doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="default: %(default)s")
    parser.add_argument("--peers", action="store_true", help="MLServer, kserve and Triton too")
    parser.add_argument("--in-flight", type=int, nargs="+", default=IN_FLIGHT, metavar="N")
    options = parser.parse_args(arguments)
    before = environment()
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(running(c))
            for c in contenders(Path(made), with_peers=options.peers)
        ]
        results = measure(
            servers,
            in_flight=options.in_flight,
            repeats=options.repeats,
            seconds=options.seconds,
        )
    show(results, markdown=options.markdown)
    if options.peers:
        show_marks(results, markdown=options.markdown)
    Console().print(f"{options.repeats} repeats; {described(before)}", soft_wrap=True)
    command.write(options.json, before, results)


if __name__ == "__main__":
    main()
