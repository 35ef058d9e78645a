"""Many requests over one stream: computed at the same time, answered in the order they came in.

Responses carry no number of their own, and a client that sends no ids has only their order. A
stream holds at most `IN_FLIGHT` requests that are not answered. More are not read from it, so that
a client which sends faster than it is answered is held up by gRPC's flow control.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

IN_FLIGHT = 64

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


async def answer_in_order(
    requests: AsyncIterator[_Request],
    answer: Callable[[_Request], Awaitable[_Response]],
    write: Callable[[_Response], Awaitable[None]],
) -> None:
    """Writes the answer to each of `requests`; `answer` must not raise.

    Cancelled, it cancels every answer that is under way before it returns.
    """
    slots = asyncio.Semaphore(IN_FLIGHT)
    answers: asyncio.Queue[asyncio.Task[_Response] | None] = asyncio.Queue()

    async def answered(request: _Request) -> _Response:
        return await answer(request)

    async with asyncio.TaskGroup() as tasks:

        async def read() -> None:
            await slots.acquire()
            async for request in requests:
                answers.put_nowait(tasks.create_task(answered(request)))
                await slots.acquire()
            answers.put_nowait(None)

        tasks.create_task(read())
        while task := await answers.get():
            await write(await task)
            slots.release()
