"""A wall clock that jumps: no queue, deadline, rate or batch follows it."""

import asyncio
import time

import numpy as np
import pytest

from bundles import FEATURES, write_linear
from faults.inside import inside
from server.messages import MODEL, request_of

pytestmark = pytest.mark.slow

DAY_S = 86400.0


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_jump_of_the_wall_clock_ends_no_request(tmp_path, monkeypatch, jump_s):
    write_linear(tmp_path / MODEL / "1")
    request = request_of(np.ones((3, FEATURES), np.float32))
    request.parameters["timeout"].int64_param = 5_000_000
    sent = request.SerializeToString()
    now, now_ns = time.time, time.time_ns

    async def check():
        async with inside(tmp_path) as door:
            assert await door.send(sent) == "OK"
            monkeypatch.setattr(time, "time", lambda: now() + jump_s)
            monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(jump_s * 1e9))
            statuses = await asyncio.gather(*(door.send(sent) for _ in range(50)))
            assert set(statuses) == {"OK"}
            monkeypatch.undo()
            assert await door.send(sent) == "OK"

    asyncio.run(check())
