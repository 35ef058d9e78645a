"""`aqt bench`: load on a server, and the latencies that come of it."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from aqt_cli.connection import LOCAL, Ca, Certificate, Key, Servers, TokenFile, arguments
from aqt_cli.failures import as_sentence, of_the_server

if TYPE_CHECKING:
    from aqt_cli.load import Measured, Shape
    from aqt_client import RetryPolicy

_PERCENTILES = (50, 90, 95, 99, 99.9)
_DISTINCT = 16


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.")],
    server: Servers = list(LOCAL),  # noqa: B006 - typer copies it
    version: Annotated[
        str, typer.Option(metavar="N", help="The version; without it, the server chooses.")
    ] = "",
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Inputs as `aqt predict` takes them; without it, random ones."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Of random inputs.")] = 1,
    length: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of random inputs, where a request chooses it.")
    ] = 16,
    concurrency: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests under way: a closed loop.")
    ] = 16,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="PER_S",
            min=1e-3,
            help="Requests a second, whether answered or not: an open loop, whose latencies count "
            "from when a request was due.",
        ),
    ] = None,
    arrivals: Annotated[
        Literal["poisson", "constant"],
        typer.Option(help="How the requests of --rate are spread over time."),
    ] = "poisson",
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="That are counted.")
    ] = 10.0,
    warmup: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Before it, not counted.")
    ] = 2.0,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Of each request.")] = 30.0,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare the bits of all answers to the same inputs; fail if any differ.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of random inputs and arrivals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw latency over percentile: .png, .svg or .pdf."),
    ] = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Puts load on a server, and shows latencies, throughput and errors by status."""
    from aqt_cli.load import Shape, put, random_inputs

    with of_the_server():
        from aqt_client import AsyncClient, ClientError, RetryPolicy, files

    shape = Shape(
        concurrency=concurrency,
        rate_per_s=rate,
        arrivals=arrivals,
        seconds=seconds,
        warmup_s=warmup,
    )

    async def measure(connection: dict[str, Any], once: "RetryPolicy") -> "Measured":
        async with AsyncClient(timeout_s=timeout, **connection) as asking:
            metadata = await asking.model_metadata(model, version)
        if inputs:
            requests = [files.read_inputs(inputs, metadata)]
        else:
            requests = [
                random_inputs(metadata, rows=rows, length=length, seed=seed + i)
                for i in range(_DISTINCT)
            ]
        # A failure is counted, not repeated.
        async with AsyncClient(timeout_s=timeout, retry=once, **connection) as client:
            return await put(client, model, version, requests, shape, check=check, seed=seed)

    with as_sentence(ClientError, ValueError, OSError):
        if plot:
            _require_drawing(plot)
        connection = arguments(
            server, token_file=token_file, ca=ca, certificate=certificate, key=key
        )
        measured = asyncio.run(measure(connection, RetryPolicy(max_attempts=1)))
        found = summary(measured)
        if plot:
            _draw(plot, measured, model)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _print(found, model, shape, check)
    if measured.different or not measured.latencies_s:
        raise typer.Exit(1)


def summary(measured: "Measured") -> dict[str, Any]:
    """Rates and percentiles, ready for JSON; latencies are null where nothing was answered."""
    import numpy as np

    answered = len(measured.latencies_s)
    latencies = None
    if answered:
        found = np.percentile(measured.latencies_s, _PERCENTILES).tolist()
        latencies = {f"p{p:g}": 1e3 * s for p, s in zip(_PERCENTILES, found, strict=True)}
        latencies["mean"] = 1e3 * float(np.mean(measured.latencies_s))
        latencies["max"] = 1e3 * max(measured.latencies_s)
    late = float(np.percentile(measured.late_s, 99)) if measured.late_s else 0.0
    return {
        "seconds": measured.seconds,
        "answered": answered,
        "requests_per_s": answered / measured.seconds,
        "rows_per_s": measured.rows / measured.seconds,
        "latency_ms": latencies,
        "errors": dict(measured.errors),
        "sentences": dict(measured.sentences),
        "different": measured.different,
        "sent_late_p99_ms": 1e3 * late,
    }


def _print(found: dict[str, Any], model: str, shape: "Shape", check: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    load = f"{shape.concurrency} requests under way"
    if shape.rate_per_s is not None:
        load = f"{shape.rate_per_s:g} requests a second, {shape.arrivals} arrivals"
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("requests a second", f"{found['requests_per_s']:,.1f}")
    table.add_row("rows a second", f"{found['rows_per_s']:,.1f}")
    for name, ms in (found["latency_ms"] or {}).items():
        table.add_row(f"latency {name}, ms", f"{ms:,.2f}")
    for status, count in sorted(found["errors"].items()):
        table.add_row(Text(status, "red"), f"{count:,}")
    if check:
        table.add_row("answers with other bits", f"{found['different']:,}")
    if shape.rate_per_s is not None:
        table.add_row("sent late, p99, ms", f"{found['sent_late_p99_ms']:,.2f}")
    console = Console()
    # Not as the table's title, which would be broken at its width.
    console.print(Text(f"{model}, {load}", "italic"))
    console.print(table)
    for status, sentence in sorted(found["sentences"].items()):
        console.print(Text(f"{status}: {sentence}"))


def _require_drawing(path: Path) -> None:
    """Refuses, before there is anything to draw, what could not be drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'aqt-engine[report]'") from error
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise ValueError(
            f"--plot {path} is no file of a kind that can be drawn: name it .png or .svg"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path} is in a directory that is not there: make it first")


def _draw(path: Path, measured: "Measured", model: str) -> None:
    import numpy as np
    from matplotlib.figure import Figure

    if not measured.latencies_s:
        raise ValueError("there is nothing to draw: no request was answered")
    ordered = 1e3 * np.sort(measured.latencies_s)
    beyond = len(ordered) / np.arange(len(ordered), 0, -1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.step(beyond, ordered, where="post")
    marks = [p for p in (0, 50, 90, 99, 99.9, 99.99) if 100 / (100 - p) <= len(ordered)]
    axes.set_xscale("log")
    axes.set_xticks([100 / (100 - p) for p in marks], [f"{p:g}%" for p in marks], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="percentile", ylabel="latency, ms", title=model)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path)
