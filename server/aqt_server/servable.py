"""A version that answers requests."""

import dataclasses
import functools
import time
from collections.abc import Mapping

from aqt_engine.bundle import Arrays, Manifest
from aqt_engine.execution import Mode
from aqt_server.batcher import Batcher, Company
from aqt_server.directory import Key
from aqt_server.distributions import Distribution
from aqt_server.errors import OutOfMemory
from aqt_server.executor import Executor, Loaded
from aqt_server.memory import NoMemoryError
from aqt_server.policies import Policy
from aqt_server.queue import Outputs
from aqt_server.response_cache import ResponseCache, VersionCache
from aqt_server.settings import Batching
from aqt_server.statistics import Statistics


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Servable:
    """A version that answers requests.

    `exact` is whether it was proved here, in mode exact, and `verdict` the proof in a sentence.
    `bucket_rows` are the rows that it computes at once, in `workspace_nbytes` beside the weights,
    of which a device has `weights_nbytes`.
    `kernel` is the instruction set of the int8 kernel that computes it, if one does.
    `cache` is None where answers are not kept. `distributions` are those of the weights by name;
    there are none unless the settings ask for them. It answers since `loaded_at`, a Unix time.
    """

    name: str
    version: int
    manifest: Manifest
    exact: bool
    mode: Mode
    verdict: str
    bucket_rows: tuple[int, ...]
    workspace_nbytes: int
    weights_nbytes: int
    batcher: Batcher
    cache: VersionCache | None
    statistics: Statistics
    kernel: str | None = None
    distributions: Mapping[str, Distribution] = dataclasses.field(
        default_factory=dict[str, Distribution]
    )
    loaded_at: float = dataclasses.field(default_factory=time.time)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds of the memory of a device: weights and workspace."""
        return self.weights_nbytes + self.workspace_nbytes

    async def close(self, grace_s: float) -> bool:
        """Forgets answers and closes the queue; see `Batcher.close`."""
        if self.cache:
            self.cache.close()
        return await self.batcher.close(grace_s)


def serve(
    key: Key, loaded: Loaded, policy: Policy, batching: Batching, *, cache: ResponseCache | None
) -> Servable:
    """The version `key`, loaded, with a queue in the running event loop.

    If it is exact, its answers are kept in `cache`, unless `policy` says otherwise.
    """
    statistics = Statistics()
    cache = cache if loaded.exact and policy.response_cache else None
    return Servable(
        name=key[0],
        version=key[1],
        manifest=loaded.manifest,
        exact=loaded.exact,
        mode=loaded.mode,
        verdict=loaded.verdict,
        bucket_rows=loaded.executor.bucket_rows,
        workspace_nbytes=loaded.executor.workspace_nbytes,
        weights_nbytes=loaded.executor.weights_nbytes,
        distributions=loaded.distributions,
        kernel=loaded.executor.kernel,
        batcher=Batcher(
            functools.partial(_computed, loaded.executor),
            max_batch_rows=loaded.executor.bucket_rows[-1],
            queue_rows=policy.queue_rows or batching.queue_rows,
            statistics=statistics,
            company=Company(delay_s=policy.max_delay_ms / 1e3, rows=policy.preferred_rows),
            name=f"{key[0]} version {key[1]}",
            hung_s=batching.hung_s,
        ),
        cache=VersionCache(cache, statistics) if cache is not None else None,
        statistics=statistics,
    )


def _computed(executor: Executor, inputs: Arrays) -> Outputs:
    try:
        return executor(inputs)
    except NoMemoryError as error:
        raise OutOfMemory(
            f"there was no memory to compute the batch that the request was in ({error}): send it "
            f"again later, or fewer rows at once"
        ) from error
