"""A version that answers requests."""

import dataclasses

from aqt_engine.bundle import Manifest
from aqt_engine.execution import Mode
from aqt_server.batcher import Batcher, Company
from aqt_server.directory import Key
from aqt_server.executor import Loaded
from aqt_server.policies import Policy
from aqt_server.statistics import Statistics


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Servable:
    """A version that answers requests.

    `exact` is whether it was proved here, in mode exact, and `verdict` the proof in a sentence.
    `bucket_rows` are the rows that it computes at once, in `workspace_nbytes` beside the weights.
    """

    name: str
    version: int
    manifest: Manifest
    exact: bool
    mode: Mode
    verdict: str
    bucket_rows: tuple[int, ...]
    workspace_nbytes: int
    batcher: Batcher
    statistics: Statistics

    @property
    def nbytes(self) -> int:
        """Bytes that it holds: weights and workspace."""
        return self.manifest.nbytes + self.workspace_nbytes


def serve(key: Key, loaded: Loaded, policy: Policy, *, queue_rows: int) -> Servable:
    """The version `key`, loaded, with a queue in the running event loop.

    It holds `queue_rows` rows, unless `policy` says otherwise.
    """
    statistics = Statistics()
    return Servable(
        name=key[0],
        version=key[1],
        manifest=loaded.manifest,
        exact=loaded.exact,
        mode=loaded.mode,
        verdict=loaded.verdict,
        bucket_rows=loaded.executor.bucket_rows,
        workspace_nbytes=loaded.executor.workspace_nbytes,
        batcher=Batcher(
            loaded.executor,
            max_batch_rows=loaded.executor.bucket_rows[-1],
            queue_rows=policy.queue_rows or queue_rows,
            statistics=statistics,
            company=Company(delay_s=policy.max_delay_ms / 1e3, rows=policy.preferred_rows),
        ),
        statistics=statistics,
    )
