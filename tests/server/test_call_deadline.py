"""A call whose deadline has passed is not computed, even if gRPC has not cancelled it yet."""

import asyncio

import pytest

from aqt_engine.execution import Mode
from aqt_server.batcher import Batcher
from aqt_server.call import Call
from aqt_server.errors import DeadlineExceeded
from aqt_server.logs import LogSettings
from aqt_server.security.authentication import ANONYMOUS
from aqt_server.security.authorization import Guard
from aqt_server.servable import Servable
from aqt_server.service import Service
from aqt_server.settings import Access, Limits, Tls
from aqt_server.spans import Spans
from aqt_server.statistics import Statistics
from aqt_server.tracing import Tracer
from bundles import write_linear
from server.messages import MODEL, request_of, x_of


def call(remaining_s):
    return Call(principal=ANONYMOUS, peer="", remaining_s=remaining_s, headers={})


class OneModel:
    """A repository of one version, with a program that records the rows that it is given."""

    def __init__(self, path):
        self.computed = []
        statistics = Statistics()
        self.servable = Servable(
            name=MODEL,
            version=1,
            manifest=write_linear(path),
            exact=True,
            mode=Mode.EXACT,
            verdict="",
            bucket_rows=(4,),
            workspace_nbytes=0,
            weights_nbytes=0,
            batcher=Batcher(self._compute, max_batch_rows=4, queue_rows=8, statistics=statistics),
            cache=None,
            statistics=statistics,
        )

    def get(self, name, version, **_):
        return self.servable

    def _compute(self, inputs):
        self.computed.append(len(inputs["x"]))
        return {"y": inputs["x"][:, :4]}


def test_the_deadline_of_the_call_reaches_the_queue(tmp_path):
    async def main():
        model = OneModel(tmp_path / "1")
        guard = Guard(Access(), Tls())
        service = Service(
            repository=model,
            guard=guard,
            tracer=Tracer(),
            logs=LogSettings(),
            limits=Limits(),
            spans=Spans(),
        )
        with pytest.raises(DeadlineExceeded):
            await service.answer("ModelInfer", request_of(x_of(3)), call(0.0))
        for remaining_s in (60.0, None):
            response = await service.answer("ModelInfer", request_of(x_of(2)), call(remaining_s))
            assert list(response.outputs[0].shape) == [2, 4]
        assert model.computed == [2, 2]
        assert await model.servable.batcher.close(60)

    asyncio.run(asyncio.wait_for(main(), 60))
