"""OpenTelemetry spans of requests: under the caller's span, with the stages as children.

Without an endpoint nothing is made, nor is OpenTelemetry imported. The stages are told afterwards,
from the moments that are kept of each request anyway.
"""

import contextlib
import sys
import time
from collections.abc import Generator, Mapping

from aqt_server.errors import RequestError
from aqt_server.statistics import Times

_NAME = "aqt_server"


class NoSdkError(Exception):
    """Spans are to be sent, and what sends them is not installed."""


class Spans:
    """Makes spans if `endpoint`, the base URL of an OTLP collector over HTTP, is given.

    `ratio` of the traces that begin here are kept; in those of a caller, the caller decides.

    Raises:
      NoSdkError: the OpenTelemetry SDK is not installed.
    """

    def __init__(self, endpoint: str | None = None, ratio: float = 1.0):
        self._provider = _provider(endpoint, ratio) if endpoint else None
        self._tracer = self._provider.get_tracer(_NAME) if self._provider else None

    @contextlib.contextmanager
    def request(self, headers: Mapping[str, str], attributes: Mapping[str, str]) -> Generator[None]:
        """The span of a call, around the block; what it raises is its status.

        `headers` have the caller's span, if there is one.
        """
        if self._tracer is None:
            yield
            return
        from opentelemetry import propagate, trace

        with self._tracer.start_as_current_span(
            f"inference.GRPCInferenceService/{attributes['rpc']}",
            context=propagate.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes={f"aqt.{name}": value for name, value in attributes.items() if value},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                code = error.code.name if isinstance(error, RequestError) else type(error).__name__
                span.set_attribute("aqt.status", code)
                span.set_status(trace.StatusCode.ERROR, str(error))
                raise

    def stages(self, *, arrived: int, times: Times | None, rows: int) -> None:
        """Adds the stages of a request that is answered now to its span.

        One that was answered from the cache, without `times`, has none.
        """
        if self._tracer is None:
            return
        from opentelemetry import trace

        trace.get_current_span().set_attribute("aqt.rows", rows)
        trace.get_current_span().set_attribute("aqt.cached", times is None)
        if times is None:
            return
        # The moments are of a clock that only goes forward; spans have the time of day.
        since_epoch = time.time_ns() - time.monotonic_ns()
        moments = (
            ("decode", arrived, times.queued),
            ("queue", times.queued, times.started),
            ("compute", times.started, times.finished),
            ("encode", times.finished, time.monotonic_ns()),
        )
        for name, start, end in moments:
            span = self._tracer.start_span(name, start_time=start + since_epoch)
            span.end(end + since_epoch)

    def close(self) -> None:
        """Sends what was not sent yet."""
        if self._provider:
            self._provider.shutdown()


def trace_id() -> str:
    """The current trace in hex, "" outside of one."""
    # Whoever has a span has imported what it is of.
    if "opentelemetry.trace" not in sys.modules:
        return ""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def _provider(endpoint: str, ratio: float):
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise NoSdkError(
            f"--otlp-endpoint needs what sends spans ({error}): pip install 'aqt-server[otlp]'"
        ) from error
    provider = TracerProvider(
        resource=Resource.create({"service.name": _NAME}),
        sampler=ParentBased(TraceIdRatioBased(ratio)),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
