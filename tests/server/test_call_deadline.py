"""A call whose deadline has passed is not computed, even if gRPC has not cancelled it yet."""

import asyncio

import grpc
import pytest

from aqt_engine import bundle
from aqt_server.batcher import Batcher
from aqt_server.logs import LogSettings
from aqt_server.repository import Servable
from aqt_server.service import InferenceService
from aqt_server.shared_memory import Regions
from aqt_server.statistics import Statistics
from aqt_server.tracing import Tracer
from bundles import SPECS
from server.messages import MODEL, request_of, x_of


class Aborted(Exception):
    pass


class Context:
    """A call with so many seconds left."""

    def __init__(self, remaining_s):
        self._remaining_s = remaining_s

    def time_remaining(self):
        return self._remaining_s

    async def abort(self, code, sentence):
        raise Aborted(code)


class OneModel:
    """A repository of one version, with a program that records the rows that it is given."""

    def __init__(self):
        self.computed = []
        statistics = Statistics()
        self.servable = Servable(
            name=MODEL,
            version=1,
            manifest=bundle.Manifest(
                **SPECS,
                **{"tile": 4, "weights": (), "float_nbytes": 0, "platforms": ()},
                **{"tools": {}, "files": {}},
            ),
            exact=True,
            bucket_rows=(4,),
            batcher=Batcher(self._compute, max_batch_rows=4, queue_rows=8, statistics=statistics),
            statistics=statistics,
        )

    def get(self, name, version):
        return self.servable

    def _compute(self, inputs):
        self.computed.append(len(inputs["x"]))
        return {"y": inputs["x"][:, :4]}


def test_the_deadline_of_the_call_reaches_the_queue():
    async def main():
        model = OneModel()
        service = InferenceService(
            repository=model, regions=Regions(), tracer=Tracer(), logs=LogSettings()
        )
        with pytest.raises(Aborted) as raised:
            await service.ModelInfer(request_of(x_of(3)), Context(0.0))
        assert raised.value.args == (grpc.StatusCode.DEADLINE_EXCEEDED,)
        for remaining_s in (60.0, None):
            response = await service.ModelInfer(request_of(x_of(2)), Context(remaining_s))
            assert list(response.outputs[0].shape) == [2, 4]
        assert model.computed == [2, 2]
        assert await model.servable.batcher.close(60)

    asyncio.run(asyncio.wait_for(main(), 60))
