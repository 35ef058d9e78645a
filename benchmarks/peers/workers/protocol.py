"""The worker's side: reads one request a line, and answers each with a line of JSON.

It needs nothing but Python and NumPy, since it runs in the environments of the peers.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np

THREADS = len(os.sched_getaffinity(0))
Call = Callable[[], np.ndarray]
Prepare = Callable[..., Call]
"""Takes the arrays and the options of `prepare`, and gives what is timed: inputs and answer are
NumPy's, and weights are where they stay."""


def work(kinds: Mapping[str, Prepare]) -> None:
    """Answers until there are no more requests; `kinds` has what can be prepared."""
    # What a library prints goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        try:
            told = _answer(kinds, calls, json.loads(line))
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def _answer(kinds: Mapping[str, Prepare], calls: dict[str, Call], request: dict) -> dict:
    key = request["key"]
    if request["op"] == "prepare":
        with np.load(request["arrays"]) as arrays:
            calls[key] = kinds[request["what"]](dict(arrays), **request["options"])
        np.save(request["answer"], calls[key]())
    elif request["op"] == "drop":
        del calls[key]
    else:
        return _time(calls[key], request["calls"])
    return {}


def _time(call: Call, calls: int) -> dict:
    # One that does not count: caches are warm, and threads awake, as in a busy server.
    call()
    before = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    after = time.perf_counter(), time.process_time()
    return {"elapsed": after[0] - before[0], "processor": after[1] - before[1]}
