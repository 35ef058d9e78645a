"""A loaded version in the words of the protocol's ModelConfig and ModelStatistics."""

import jax

from aqt_engine.bundle import TensorSpec
from aqt_protos import open_inference_pb2 as pb
from aqt_server import codec
from aqt_server.policies import Versions
from aqt_server.queue import DEFAULT_PRIORITY, PRIORITY_LEVELS
from aqt_server.servable import Servable
from aqt_server.statistics import Duration, Stages

PLATFORM = "aqt_stablehlo"
"""What runs the models, in the protocol's metadata."""

_Group = pb.ModelInstanceGroup


def model_config(servable: Servable, versions: Versions) -> pb.ModelConfig:
    """How `servable` is served: its signature, batches, priorities and device.

    `versions` says which versions of its model are.

    Its `parameters` say whether it is exact, in which mode and by what proof; the tile at which it
    computes; the buckets of its symbolic dimensions; and the inputs that are one scalar for all
    rows of a request.
    """
    company = servable.batcher.company
    return pb.ModelConfig(
        name=servable.name,
        platform=PLATFORM,
        backend="aqt",
        version_policy=_version_policy(versions),
        max_batch_size=servable.bucket_rows[-1],
        input=[
            pb.ModelInput(name=spec.name, data_type=_data_type(spec), dims=_dims(spec))
            for spec in servable.manifest.inputs
        ],
        output=[
            pb.ModelOutput(name=spec.name, data_type=_data_type(spec), dims=_dims(spec))
            for spec in servable.manifest.outputs
        ],
        dynamic_batching=pb.ModelDynamicBatching(
            preferred_batch_size=company.rows or servable.bucket_rows,
            max_queue_delay_microseconds=round(company.delay_s * 1e6),
            priority_levels=PRIORITY_LEVELS,
            default_priority_level=DEFAULT_PRIORITY,
            default_queue_policy=pb.ModelQueuePolicy(
                timeout_action=pb.ModelQueuePolicy.REJECT, allow_timeout_override=True
            ),
        ),
        instance_group=[
            _Group(
                name=f"{servable.name}_0",
                kind={"cpu": _Group.KIND_CPU, "gpu": _Group.KIND_GPU}.get(
                    jax.default_backend(), _Group.KIND_MODEL
                ),
                count=1,
            )
        ],
        default_model_filename="graph.stablehlo",
        parameters={
            name: pb.ModelParameter(string_value=value)
            for name, value in _parameters(servable).items()
        },
        response_cache=pb.ModelResponseCache(enable=servable.cache is not None),
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
    )


def model_statistics(servable: Servable) -> pb.ModelStatistics:
    """What `servable` has done since it was loaded."""
    found = servable.statistics
    failed = Duration(
        count=sum(failure.count for failure in found.failures.values()),
        ns=sum(failure.ns for failure in found.failures.values()),
    )
    return pb.ModelStatistics(
        name=servable.name,
        version=str(servable.version),
        last_inference=found.last_ms,
        inference_count=found.rows,
        execution_count=found.executions,
        inference_stats=pb.InferStatistics(
            success=_duration(found.success),
            fail=_duration(failed),
            queue=_duration(found.queue),
            cache_hit=_duration(found.cache_hit),
            cache_miss=_duration(found.cache_miss),
            **_stages(found.requests),
        ),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=rows, **_stages(stages))
            for rows, stages in sorted(found.batches.items())
        ],
        memory_usage=[
            pb.MemoryUsage(type=jax.default_backend().upper(), byte_size=servable.weights_nbytes)
        ],
    )


def _version_policy(versions: Versions) -> pb.ModelVersionPolicy:
    form = pb.ModelVersionPolicy
    if versions.numbers is not None:
        return form(specific=form.Specific(versions=sorted(versions.numbers)))
    if versions.latest is not None:
        return form(latest=form.Latest(num_versions=versions.latest))
    return form(all=form.All())


def _parameters(servable: Servable) -> dict[str, str]:
    manifest = servable.manifest
    parameters = {
        "aqt_exact": str(servable.exact).lower(),
        "aqt_mode": str(servable.mode),
        "aqt_verdict": servable.verdict,
        "aqt_kernel": servable.kernel or "none",
        "aqt_tile": str(manifest.tile),
    }
    for name, sizes in manifest.lengths.items():
        parameters[f"aqt_lengths_{name}"] = ",".join(map(str, sizes))
    if manifest.per_request:
        parameters["aqt_per_request"] = ",".join(manifest.per_request)
    return parameters


def _data_type(spec: TensorSpec) -> pb.DataType.ValueType:
    return pb.DataType.Value(f"TYPE_{codec.describe(spec)[0]}")


def _dims(spec: TensorSpec) -> list[int]:
    # Without the rows, as `max_batch_size` says that there are some.
    return codec.describe(spec)[1][1:]


def _duration(found: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=found.count, ns=found.ns)


def _stages(found: Stages) -> dict[str, pb.StatisticDuration]:
    return {
        "compute_input": _duration(found.inputs),
        "compute_infer": _duration(found.infer),
        "compute_output": _duration(found.outputs),
    }
