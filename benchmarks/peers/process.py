"""A peer in a process of its own, told line by line what to prepare and how often to run it."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers import environments

WORKERS = Path(__file__).parent / "workers"


class Seconds(NamedTuple):
    """Of one call: elapsed, and of the processor, summed over the threads of the process."""

    elapsed: float
    processor: float


class PeerError(Exception):
    """A peer could not do what it was asked; its own words say why."""


class Peer(NamedTuple):
    """Who is measured: by a script of `workers/`, in an environment or, for None, in our own.

    `options` are those of the script's `prepare`.
    """

    name: str
    script: str
    environment: str | None = None
    options: Mapping[str, Any] = {}


class Worker:
    """Talks to a script of `workers/`; made by `started`."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", log: Any):
        self.name = name
        self._process = process
        self._log = log

    def prepare(self, key: str, what: str, arrays: Path, **options: Any) -> np.ndarray:
        """Makes a call ready under `key`, and gives what it answers.

        Args:
          key: by which it is timed.
          what: "layer", "product" or "encoder": what the script prepares.
          arrays: an npz file of inputs, weights and scales.
          options: what else the script takes.

        Raises:
          PeerError: the peer raised an error, or its process ended.
        """
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder, "answer.npy")
            request = {"key": key, "what": what, "arrays": str(arrays), "answer": str(answer)}
            self._ask({"op": "prepare", "options": options, **request})
            return np.load(answer)

    def time(self, key: str, calls: int) -> Seconds:
        """Runs what stands under `key` so often, and gives the seconds of one call."""
        told = self._ask({"op": "time", "key": key, "calls": calls})
        return Seconds(told["elapsed"] / calls, told["processor"] / calls)

    def drop(self, key: str) -> None:
        """Forgets what stands under `key`."""
        self._ask({"op": "drop", "key": key})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        told = json.loads(line) if line else {"error": "its process ended"}
        if "error" in told:
            self._log.seek(0)
            raise PeerError(f"{self.name}: {told['error']}; its log: {self._log.read()[-2000:]}")
        return told


@contextlib.contextmanager
def started(peers: Sequence[Peer]) -> Iterator[dict[str, Worker]]:
    """The workers of `peers` by the peers' names; those of one script share its process.

    A peer that cannot be installed here is left out, and the reason printed.
    """
    with contextlib.ExitStack() as stack:
        by_script: dict[str, Worker | None] = {}
        for peer in peers:
            if peer.script not in by_script:
                by_script[peer.script] = None
                try:
                    environment = peer.environment
                    interpreter = environments.python(environment) if environment else None
                except environments.NotInstalled as error:
                    print(f"{environment} is left out: {error}", file=sys.stderr, flush=True)
                else:
                    running = _running(peer.script, interpreter or Path(sys.executable))
                    by_script[peer.script] = stack.enter_context(running)
        workers = ((peer.name, by_script[peer.script]) for peer in peers)
        yield {name: worker for name, worker in workers if worker}


@contextlib.contextmanager
def _running(script: str, interpreter: Path) -> Iterator[Worker]:
    """The script `workers/SCRIPT.py` in a process, with as many threads as there are cores."""
    threads = str(len(os.sched_getaffinity(0)))
    ours = {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    alone = {"PYTHONPATH": ""}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [interpreter, WORKERS / f"{script}.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={
                **os.environ,
                **(ours if interpreter == Path(sys.executable) else alone),
                "OMP_NUM_THREADS": threads,
                "HF_HUB_OFFLINE": "1",
            },
        )
        try:
            yield Worker(script, process, log)
        finally:
            process.kill()
            process.communicate()
