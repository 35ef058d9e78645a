"""What the page shows, as JSON."""

import importlib.metadata
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from aqt_engine.bundle import BATCH, TensorSpec
from aqt_engine.layers import Layer, layers
from aqt_server import codec
from aqt_server.distributions import Distribution
from aqt_server.entry import Listed
from aqt_server.servable import Servable
from aqt_server.statistics import Latencies


def status(known: Iterable[Listed], ready: Iterable[Servable]) -> dict[str, Any]:
    """The server, and each of the versions `known` with what it did, where it is `ready`.

    `at_s` is a clock that only goes on: what happened between two of these, over how long.
    """
    servables = {(s.name, s.version): s for s in ready}
    return {
        "server": {
            "version": importlib.metadata.version("aqt-engine"),
            "platform": jax.default_backend(),
            "devices": jax.local_device_count(),
        },
        "at_s": time.monotonic(),
        "latency_ends_s": Latencies.SECONDS,
        "versions": [
            _version(listed, servables.get((listed.name, listed.version))) for listed in known
        ],
    }


def weights(servable: Servable) -> list[dict[str, Any]]:
    """What `servable` stores, a layer each, with histograms."""
    return [_layer(layer, servable.distributions) for layer in layers(servable.manifest)]


def _version(listed: Listed, servable: Servable | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": listed.name,
        "version": listed.version,
        "state": listed.state,
        "reason": listed.reason,
        "serving": None,
    }
    if servable:
        told["serving"] = _served(servable) | {"done": _done(servable)}
    return told


def _served(servable: Servable) -> dict[str, Any]:
    manifest = servable.manifest
    # A request that the form begins with has the lengths of the shortest bucket.
    sizes = manifest.sizes(manifest.length_buckets[0]) | {BATCH: 1}
    return {
        "exact": servable.exact,
        "mode": servable.mode,
        "verdict": servable.verdict,
        "kernel": servable.kernel,
        "loaded_at": servable.loaded_at,
        "tile": manifest.tile,
        "bucket_rows": servable.bucket_rows,
        "lengths": dict(manifest.lengths),
        "weight_bytes": manifest.nbytes,
        "float_bytes": manifest.float_nbytes,
        "workspace_bytes": servable.workspace_nbytes,
        "fingerprint": manifest.provenance.fingerprint,
        "inputs": [
            _tensor(spec)
            | {"first": [] if spec.name in manifest.per_request else _sized(spec, sizes)}
            for spec in manifest.inputs
        ],
        "outputs": [_tensor(spec) for spec in manifest.outputs],
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": codec.describe(spec)[0], "shape": spec.shape}


def _sized(spec: TensorSpec, sizes: Mapping[str, int]) -> list[int]:
    return [sizes[d] if isinstance(d, str) else d for d in spec.shape]


def _done(servable: Servable) -> dict[str, Any]:
    found = servable.statistics
    return {
        "requests": found.success.count,
        "failed": {reason: failure.count for reason, failure in found.failures.items()},
        "rows": found.rows,
        "batches": found.executions,
        "request_s": found.success.ns / 1e9,
        "queue_s": found.queue.ns / 1e9,
        "compute_s": found.requests.infer.ns / 1e9,
        "pending": servable.batcher.pending_requests,
        "latencies": tuple(found.latencies.counts),
    }


def _layer(layer: Layer, found: Mapping[str, Distribution]) -> dict[str, Any]:
    values, scale = layer.values, layer.scale
    return {
        "name": layer.name,
        "dtype": values.dtype,
        "bits": values.bits,
        "shape": values.shape,
        "scale_shape": scale and scale.shape,
        "bytes": layer.nbytes,
        "quantized": layer.quantized,
        "numerics": layer.numerics,
        "calibration": layer.calibration,
        "values": _histogram(found.get(values.name)),
        "scales": _histogram(found.get(scale.name)) if scale else None,
    }


def _histogram(found: Distribution | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"low": found.low, "high": found.high, "counts": found.counts}
