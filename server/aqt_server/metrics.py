"""The Prometheus metrics, as `http` serves them at /metrics.

Names are Triton's with `aqt` for `nv`, counters with Prometheus's `_total` after them; durations
add up microseconds, as there.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import prometheus_client
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from aqt_engine.execution import Mode
from aqt_server.compiled import CacheEvents
from aqt_server.entry import State
from aqt_server.repository import Repository
from aqt_server.response_cache import ResponseCache
from aqt_server.servable import Servable
from aqt_server.statistics import Statistics

_VERSION = ("model", "version")

_COUNTERS: dict[str, tuple[str, Callable[[Statistics], float]]] = {
    "inference_request_success": ("Requests that were answered", lambda s: s.success.count),
    "inference_count": ("Rows of the requests that were computed and answered", lambda s: s.rows),
    "inference_exec_count": ("Batches that were computed", lambda s: s.executions),
    "inference_request_duration_us": (
        "Time from arrival to answer, of the requests that were answered",
        lambda s: s.success.ns / 1000,
    ),
    "inference_queue_duration_us": ("Time in the queue", lambda s: s.queue.ns / 1000),
    "inference_compute_input_duration_us": (
        "Time in which batches were put together",
        lambda s: s.requests.inputs.ns / 1000,
    ),
    "inference_compute_infer_duration_us": (
        "Time in which batches were computed",
        lambda s: s.requests.infer.ns / 1000,
    ),
    "inference_compute_output_duration_us": (
        "Time in which batches were taken apart",
        lambda s: s.requests.outputs.ns / 1000,
    ),
    "cache_num_hits_per_model": (
        "Requests that were answered from the response cache",
        lambda s: s.cache_hit.count,
    ),
    "cache_hit_duration_per_model": (
        "Microseconds until answers were found in the response cache",
        lambda s: s.cache_hit.ns / 1000,
    ),
    "cache_num_misses_per_model": (
        "Requests that were computed as the response cache had no answer",
        lambda s: s.cache_miss.count,
    ),
    "cache_miss_duration_per_model": (
        "Microseconds to look for answers that were not there, and to keep them then",
        lambda s: s.cache_miss.ns / 1000,
    ),
}
_GAUGES: dict[str, tuple[str, Callable[[Servable], float]]] = {
    "inference_pending_request_count": (
        "Requests in the queue",
        lambda servable: servable.batcher.pending_requests,
    ),
    "inference_pending_row_count": (
        "Rows in the queue, of which --queue-rows bounds the number",
        lambda servable: servable.batcher.pending_rows,
    ),
    "inference_computing_seconds": (
        "Time that the batch which is being computed takes so far",
        lambda servable: servable.batcher.computing_s,
    ),
    "model_exact": (
        "1 if the version was proved here to answer with the bits of training, else 0",
        lambda servable: servable.exact,
    ),
    "model_workspace_bytes": (
        "Bytes beside the weights that the version computes in",
        lambda servable: servable.workspace_nbytes,
    ),
    "model_weight_bytes": (
        "Bytes of the version's weights",
        lambda servable: servable.manifest.nbytes,
    ),
}


class _Collected(Collector):
    """Families that were collected already."""

    def __init__(self, families: Sequence[Metric]):
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Them."""
        return self._families


class Metrics:
    """The metrics of a repository, and of calls by RPC and status. Belongs to their event loop."""

    def __init__(
        self, repository: Repository, calls: Mapping[tuple[str, str], int], cache: CacheEvents
    ):
        self._repository = repository
        self._calls = calls
        self._cache = cache

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics as they are now, in the form that `accept` asks for, and its content type."""
        registry = CollectorRegistry()
        registry.register(_Collected(await self._families()))
        prometheus_client.ProcessCollector(registry=registry)
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    async def _families(self) -> list[Metric]:
        ready = self._repository.ready()
        families: list[Metric] = []
        for name, (meaning, value) in _COUNTERS.items():
            counter = CounterMetricFamily(f"aqt_{name}", meaning, labels=_VERSION)
            for servable in ready:
                counter.add_metric(_labels(servable), value(servable.statistics))
            families.append(counter)
        for name, (meaning, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"aqt_{name}", meaning, labels=_VERSION)
            for servable in ready:
                gauge.add_metric(_labels(servable), value(servable))
            families.append(gauge)
        families += [
            _failures(ready),
            _batch_rows(ready),
            _modes(ready),
            await self._versions(),
            self._loads(),
            _latencies(ready),
            *_device_memory(),
            *_cache(self._repository.cache),
            self._by_status(),
        ]
        for event, count in self._cache.counts.items():
            families.append(
                CounterMetricFamily(
                    f"aqt_compilation_cache_{event}",
                    f"{event.capitalize()} of the compilation cache on disk",
                    value=count,
                )
            )
        return families

    def _by_status(self) -> Metric:
        family = CounterMetricFamily(
            "aqt_calls", "Calls of the service through any door", labels=["rpc", "status"]
        )
        for (rpc, status), count in sorted(self._calls.items()):
            family.add_metric([rpc, status], count)
        return family

    async def _versions(self) -> Metric:
        states = collections.Counter(listed.state for listed in await self._repository.index())
        family = GaugeMetricFamily("aqt_model_versions", "Versions by state", labels=["state"])
        for state in State:
            family.add_metric([state], states[state])
        return family

    def _loads(self) -> Metric:
        family = CounterMetricFamily(
            "aqt_model_loads", "Loads of versions by what came of them", labels=["model", "outcome"]
        )
        for (name, outcome), count in sorted(self._repository.loads.items()):
            family.add_metric([name, outcome], count)
        return family


def _failures(ready: Sequence[Servable]) -> Metric:
    family = CounterMetricFamily(
        "aqt_inference_request_failure", "Requests that failed", labels=(*_VERSION, "reason")
    )
    for servable in ready:
        for reason, failure in servable.statistics.failures.items():
            family.add_metric([*_labels(servable), reason], failure.count)
    return family


def _batch_rows(ready: Sequence[Servable]) -> Metric:
    family = HistogramMetricFamily(
        "aqt_inference_batch_rows",
        "Rows of the batches that were computed, by what an executable holds",
        labels=_VERSION,
    )
    for servable in ready:
        batches = [(rows, s.infer.count) for rows, s in servable.statistics.batches.items()]
        buckets = [
            (str(float(limit)), sum(count for rows, count in batches if rows <= limit))
            for limit in servable.bucket_rows
        ]
        buckets.append(("+Inf", sum(count for _, count in batches)))
        family.add_metric(
            _labels(servable), buckets, sum_value=sum(rows * count for rows, count in batches)
        )
    return family


def _latencies(ready: Sequence[Servable]) -> Metric:
    family = HistogramMetricFamily(
        "aqt_inference_request_seconds",
        "Time from arrival to answer, of the requests that were answered",
        labels=_VERSION,
    )
    for servable in ready:
        found = servable.statistics.latencies
        ends = [*map(str, found.SECONDS), "+Inf"]
        buckets = list(zip(ends, itertools.accumulate(found.counts), strict=True))
        total = servable.statistics.success.ns / 1e9
        family.add_metric(_labels(servable), buckets, sum_value=total)
    return family


def _device_memory() -> list[Metric]:
    """Of the devices that tell; those of a CPU do not."""
    families = {
        "bytes_in_use": GaugeMetricFamily(
            "aqt_device_memory_used_bytes", "Memory of the device in use", labels=["device"]
        ),
        "peak_bytes_in_use": GaugeMetricFamily(
            "aqt_device_memory_peak_bytes", "Most memory that was in use", labels=["device"]
        ),
        "bytes_limit": GaugeMetricFamily(
            "aqt_device_memory_total_bytes", "Memory of the device for JAX", labels=["device"]
        ),
    }
    for device in jax.local_devices():
        told = device.memory_stats() or {}
        for name, family in families.items():
            if name in told:
                family.add_metric([f"{device.platform}:{device.id}"], told[name])
    return list(families.values())


def _cache(cache: ResponseCache | None) -> list[Metric]:
    if cache is None:
        return []
    evictions = CounterMetricFamily(
        "aqt_cache_num_evictions",
        "Answers that left the response cache for others",
        value=cache.evictions,
    )
    told = {
        "num_entries": ("Answers in the response cache", len(cache)),
        "used_bytes": ("Bytes that the response cache takes", cache.nbytes),
        "limit_bytes": ("Bytes that it may take", cache.limit_nbytes),
    }
    return [
        evictions,
        *(GaugeMetricFamily(f"aqt_cache_{n}", said, value=v) for n, (said, v) in told.items()),
    ]


def _modes(ready: Sequence[Servable]) -> Metric:
    family = GaugeMetricFamily(
        "aqt_model_mode", "1 for the mode that the version is served in", labels=(*_VERSION, "mode")
    )
    for servable in ready:
        for mode in Mode:
            family.add_metric([*_labels(servable), mode], servable.mode is mode)
    return family


def _labels(servable: Servable) -> list[str]:
    return [servable.name, str(servable.version)]
