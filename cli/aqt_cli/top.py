"""`aqt top`: what a server is doing, from its metrics."""

import dataclasses
import json
import ssl
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aqt_cli.connection import Certificate, Key, check_pair
from aqt_cli.failures import as_sentence, of_the_server

if TYPE_CHECKING:
    from rich.table import Table

_BOUND_S = 10.0
_Key = tuple[str, str]


class ScrapeError(Exception):
    """What is at the URL is not the metrics of a server."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The samples of each version at one moment: values by name, failures summed over reasons."""

    at: float
    versions: Mapping[_Key, Mapping[str, float]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One version: rates over `seconds`, or since it was loaded where they are None."""

    model: str
    version: str
    exact: bool
    pending_requests: int
    weight_bytes: int
    requests: float
    rows: float
    failures: float
    batches: float
    latency_ms: float | None
    queue_ms: float | None
    compute_ms: float | None
    rows_per_batch: float | None


def top(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Of the server's metrics.")
    ] = "http://localhost:8002/metrics",
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Between two looks.")
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Show totals since each version was loaded, and end.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, an object for each look.")
    ] = False,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the token that the metrics ask for.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM of who vouches for the server.")
    ] = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Shows requests, latency, queue and exactness of each version that a server has."""
    from rich.console import Console
    from rich.live import Live

    with as_sentence(ScrapeError, OSError, ValueError):
        token = token_file.read_text().strip() if token_file else None
        context = _context(ca, certificate, key)
        before = scrape(url, token=token, context=context)
        if once:
            rows = compare(None, before)
            if as_json:
                typer.echo(json.dumps(_document(rows, None)))
            else:
                Console().print(_table(rows, f"{url}, since each was loaded"))
            return
        live = None if as_json else Live(_table(compare(None, before), url), auto_refresh=False)
        try:
            if live:
                live.start()
            while True:
                time.sleep(interval)
                now = scrape(url, token=token, context=context)
                rows = compare(before, now)
                if live:
                    live.update(_table(rows, f"{url}, per second"), refresh=True)
                else:
                    typer.echo(json.dumps(_document(rows, now.at - before.at)))
                before = now
        except KeyboardInterrupt:
            return
        finally:
            if live:
                live.stop()


def _context(ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    check_pair(ca, certificate, key)
    if not ca:
        return None
    try:
        context = ssl.create_default_context(cafile=ca)
        if certificate:
            context.load_cert_chain(certificate, key)
    except OSError as error:
        raise ValueError(
            f"--ca {ca}, --certificate {certificate or '(none)'} and --key {key or '(none)'} "
            f"cannot be used: {error}"
        ) from error
    return context


def scrape(url: str, *, token: str | None, context: ssl.SSLContext | None) -> Moment:
    """The samples at `url`, now.

    Raises:
      ScrapeError: they are not the metrics of a server.
      OSError: the server cannot be reached, or refuses.
    """
    with of_the_server():
        from prometheus_client.parser import text_string_to_metric_families

    if not url.startswith(("http://", "https://")):
        raise ScrapeError(f"{url} is no URL of HTTP: give one as http://localhost:8002/metrics")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_BOUND_S, context=context) as response:
        text = response.read().decode(errors="replace")
    versions: dict[_Key, dict[str, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if {"model", "version"} <= sample.labels.keys() and "le" not in sample.labels:
                    key = sample.labels["model"], sample.labels["version"]
                    found = versions.setdefault(key, {})
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
    except ValueError as error:
        raise ScrapeError(f"{url} has no metrics: {error}") from error
    if "aqt_model_versions" not in text:
        raise ScrapeError(f"{url} has no metrics of an aqt server: give that of its metrics port")
    return Moment(at=time.monotonic(), versions=versions)


def compare(before: Moment | None, now: Moment) -> list[Row]:
    """A row for each version: per second since `before`, or without it since it was loaded."""
    seconds = now.at - before.at if before else 1.0
    return [
        _row(key, found, before.versions.get(key, {}) if before else {}, seconds)
        for key, found in sorted(now.versions.items())
    ]


def _row(
    key: _Key, found: Mapping[str, float], earlier: Mapping[str, float], seconds: float
) -> Row:
    def grown(name: str) -> float:
        # A version that was loaded anew begins at 0 again.
        return max(0.0, found.get(f"aqt_{name}", 0.0) - earlier.get(f"aqt_{name}", 0.0))

    requests = grown("inference_request_success_total")
    batches = grown("inference_exec_count_total")

    def mean_ms(name: str) -> float | None:
        return grown(f"inference_{name}_duration_us_total") / 1e3 / requests if requests else None

    return Row(
        model=key[0],
        version=key[1],
        exact=found.get("aqt_model_exact") == 1,
        pending_requests=int(found.get("aqt_inference_pending_request_count", 0)),
        weight_bytes=int(found.get("aqt_model_weight_bytes", 0)),
        requests=requests / seconds,
        rows=grown("inference_count_total") / seconds,
        failures=grown("inference_request_failure_total") / seconds,
        batches=batches / seconds,
        latency_ms=mean_ms("request"),
        queue_ms=mean_ms("queue"),
        compute_ms=mean_ms("compute_infer"),
        rows_per_batch=grown("inference_batch_rows_sum") / batches if batches else None,
    )


def _document(rows: list[Row], seconds: float | None) -> dict[str, object]:
    return {"seconds": seconds, "versions": [dataclasses.asdict(row) for row in rows]}


def _table(rows: list[Row], title: str) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title),
        title_justify="left",
        caption="ms: mean time of a request; batch: mean rows; wait: requests in the queue",
        caption_justify="left",
    )
    table.add_column("model", overflow="fold")
    for column in ("exact", "req", "rows", "fail", "ms", "queue", "compute", "batch", "wait"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(f"{row.model}/{row.version}"),
            Text("yes", "green") if row.exact else Text("no", "red"),
            *map(_number, (row.requests, row.rows, row.failures)),
            *map(_number, (row.latency_ms, row.queue_ms, row.compute_ms, row.rows_per_batch)),
            str(row.pending_requests),
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
