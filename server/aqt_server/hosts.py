"""Several hosts that compute versions together: one leads, the others follow.

JAX runs a program over the devices of several processes if each of them runs it, in one order. The
host that leads has the doors, the repository and the queues. It tells the others, over a connection
that each of them opened, what to load and what to compute, and does the same itself:

    load     number, name, version, digest, rows    answered when it is there, or why it is not
    compute  number, and the inputs
    gather   number, and the inputs; the same, of whole weights
    drop     number
    end

An order is a line of JSON; inputs follow as they lie in memory. Whoever reaches the port sees them,
as with the connections of JAX's own between hosts: both belong in a network of the hosts alone. A
host that is lost ends the others, since none can compute without it.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np

from aqt_engine import bundle
from aqt_engine.bundle import Arrays, Bundle, Manifest
from aqt_engine.execution import Program
from aqt_engine.layout import Layout
from aqt_server.directory import Key
from aqt_server.executor import Executor
from aqt_server.settings import Devices
from aqt_server.source import Source

_log = logging.getLogger(__name__)
_TOGETHER_S = 300.0
_LOADED_S = 600.0
_GREETING_S = 10.0
_AGAIN_S = 0.2


class HostsError(Exception):
    """The hosts did not come together, or do not have the same bundles."""


class Leader:
    """The host that leads, when all others are connected and JAX knows the devices of all.

    Raises:
      HostsError: the others did not come in time, or others came.
    """

    def __init__(self, devices: Devices):
        host, port = _address(devices.coordinator)
        self._followers = _together(host, port, devices.hosts)
        address = f"{host}:{_free_port(host)}"
        for connection in self._followers.values():
            _send(connection, {"jax": address})
        jax.distributed.initialize(address, num_processes=devices.hosts, process_id=0)
        self._order = threading.RLock()
        self.turn: AbstractContextManager[Any] = threading.Lock()
        """In which versions are compiled and proved, one after the other, as other hosts do too."""
        self._loads = 0
        self._answers: dict[tuple[int, int], str] = {}
        self._answered = threading.Condition()
        self._ending = False
        for index, connection in self._followers.items():
            threading.Thread(target=self._listen, args=(index, connection), daemon=True).start()

    def programs(self, key: Key) -> Callable[..., Program]:
        """What makes the program of the version `key` on all hosts, called as `Program` is."""
        return functools.partial(_Led, self, key)

    def load(self, key: Key, manifest: Manifest, max_rows: int) -> int:
        """Has the others load a version, and returns the number by which they know it."""
        with self._order:
            self._loads += 1
            digest = _digest(manifest)
            self._tell("load", self._loads, key=list(key), digest=digest, rows=max_rows)
            return self._loads

    def loaded(self, number: int) -> None:
        """Returns when the others have loaded it.

        Raises:
          HostsError: one could not, or takes too long.
        """
        with self._answered:
            there = self._answered.wait_for(
                lambda: all((number, host) in self._answers for host in self._followers), _LOADED_S
            )
            errors = {h: self._answers[number, h] for h in self._followers if there}
        if not there:
            raise HostsError(f"a host did not load it in {_LOADED_S:g} s: look at its log")
        for host, error in errors.items():
            if error:
                raise HostsError(f"host {host} could not load it: {error}")

    @contextlib.contextmanager
    def computing(self, do: str, number: int, inputs: Arrays) -> Generator[None]:
        """While the others do what the caller does in it with `inputs`: compute, or gather."""
        arrays = [np.ascontiguousarray(array) for array in inputs.values()]
        described = [
            [name, array.dtype.name, list(array.shape)]
            for name, array in zip(inputs, arrays, strict=True)
        ]
        with self._order:
            self._tell(do, number, arrays, inputs=described)
            yield

    def drop(self, number: int) -> None:
        """Has the others forget a version."""
        with self._order, contextlib.suppress(OSError):  # they may have gone, at the end
            self._tell("drop", number)

    def end(self) -> None:
        """Ends the others, and returns when they have left."""
        with self._order, contextlib.suppress(OSError):
            self._ending = True
            self._tell("end", 0)
        # Together: JAX ends a process at once that the one which leads has left.
        jax.distributed.shutdown()

    def _tell(self, do: str, number: int, arrays: Sequence[Any] = (), **more: Any) -> None:
        for connection in self._followers.values():
            _send(connection, {"do": do, "number": number, **more})
            for array in arrays:
                connection.send_bytes(array.reshape(-1).view(np.uint8).data)

    def _listen(self, host: int, connection: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                answer = _received(connection)
                with self._answered:
                    self._answers[answer["number"], host] = answer["error"]
                    self._answered.notify_all()
        if not self._ending:
            _end_at_once(f"host {host} is lost, and without it nothing can be computed")


class _Led(Program):
    """A program that every host makes, and calls when this one is called."""

    def __init__(self, leader: Leader, key: Key, loaded: Bundle, *, max_rows: int, **options: Any):
        self._leader = leader
        self._number = leader.load(key, loaded.manifest, max_rows)
        weakref.finalize(self, leader.drop, self._number)
        # The others make theirs meanwhile: on some devices, to compile is a thing of all hosts.
        super().__init__(loaded, max_rows=max_rows, **options)

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self._leader.loaded(self._number)
        with self._leader.computing("compute", self._number, inputs):
            return super().__call__(inputs)

    def gathered(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self._leader.loaded(self._number)
        with self._leader.computing("gather", self._number, inputs):
            return super().gathered(inputs)


def follow(devices: Devices, source: Source, layout: Layout) -> None:
    """Loads and computes what the host that leads says, and returns when that ends.

    Signals that end a server are left to that one, which answers what it has accepted first.

    Raises:
      HostsError: there is none that leads, or it does not take this host.
      ValueError: there are not as many devices as the settings say.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    host, port = _address(devices.coordinator)
    connection = _connected(host, port)
    _send(connection, {"host": devices.host_index, "jax": jax.__version__})
    try:
        address = _received(connection)["jax"]
    except (EOFError, OSError) as error:
        raise HostsError(
            f"the host at {devices.coordinator} does not take this one: see its log"
        ) from error
    jax.distributed.initialize(address, num_processes=devices.hosts, process_id=devices.host_index)
    layout.mesh()  # the hosts wait here for each other to tell which devices they have
    _log.info("host %d follows %s", devices.host_index, devices.coordinator)
    try:
        _Follower(connection, source, layout).obey()
        jax.distributed.shutdown()
    except (EOFError, OSError):
        _end_at_once("the host that leads is lost, and this one does nothing without it")


class _Follower:
    """Does what it is told. Loads take long, and are done beside the rest."""

    def __init__(self, connection: Connection, source: Source, layout: Layout):
        self._connection = connection
        self._source = source
        self._layout = layout
        self._executors: dict[int, Executor] = {}

    def obey(self) -> None:
        while True:
            match _received(self._connection):
                case {"do": "load"} as order:
                    threading.Thread(target=self._load, args=(order,), daemon=True).start()
                case {"do": "compute" | "gather" as do, "number": number, "inputs": described}:
                    inputs = {
                        name: np.frombuffer(self._connection.recv_bytes(), dtype).reshape(shape)
                        for name, dtype, shape in described
                    }
                    self._compute(do, number, inputs)
                case {"do": "drop", "number": number}:
                    self._executors.pop(number, None)
                case _:
                    return

    def _load(self, order: dict[str, Any]) -> None:
        error = ""
        name, version = order["key"]
        try:
            loaded = bundle.load(self._source.local((name, version)))
            if _digest(loaded.manifest) != order["digest"]:
                raise HostsError(f"its {name} version {version} is another: give all hosts one")
            self._executors[order["number"]] = Executor(
                loaded, max_batch_rows=order["rows"], layout=self._layout
            )
        except Exception as found:
            _log.exception("%s version %s cannot be loaded", name, version)
            error = str(found)
        _send(self._connection, {"number": order["number"], "error": error})

    def _compute(self, do: str, number: int, inputs: Arrays) -> None:
        executor = self._executors[number]
        try:
            (executor if do == "compute" else executor.gathered)(inputs)
        except ValueError as error:
            # The host that leads finds the same, before it computes anything.
            _log.warning("inputs are refused: %s", error)
        except Exception as error:
            _log.exception("a batch cannot be computed")
            _end_at_once(f"the other hosts wait for this one, which cannot go on: {error}")


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    return host, int(port)


def _together(host: str, port: int, hosts: int) -> dict[int, Connection]:
    """The connections of all hosts but this one, by their index."""
    there: dict[int, Connection] = {}
    end = time.monotonic() + _TOGETHER_S
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise HostsError(f"cannot listen on {host}:{port} ({error}): name another port") from error
    with listening:
        while len(there) < hosts - 1:
            listening.settimeout(max(0.01, end - time.monotonic()))
            try:
                accepted, _ = listening.accept()
            except TimeoutError:
                missing = sorted(set(range(1, hosts)) - there.keys())
                raise HostsError(
                    f"after {_TOGETHER_S:g} s host {missing[0]} of {hosts} is not there: start it, "
                    f"or all of them with the number that there is"
                ) from None
            connection, index = _greeted(accepted)
            if index is None or index in there or not 0 < index < hosts:
                _log.warning(
                    "what came as host %s is not taken: 1 to %d, each once, with JAX %s",
                    index,
                    hosts - 1,
                    jax.__version__,
                )
                connection.close()
            else:
                there[index] = connection
    return there


def _greeted(accepted: socket.socket) -> tuple[Connection, int | None]:
    """The connection, and which host says that it is there; None for one that is none."""
    accepted.settimeout(None)
    connection = Connection(accepted.detach())
    try:
        greeting = _received(connection) if connection.poll(_GREETING_S) else {}
    except (EOFError, OSError, ValueError):
        greeting = {}
    index = greeting.get("host") if greeting.get("jax") == jax.__version__ else None
    return connection, index


def _connected(host: str, port: int) -> Connection:
    end = time.monotonic() + _TOGETHER_S
    while True:
        try:
            made = socket.create_connection((host, port), timeout=_GREETING_S)
        except OSError as error:
            if time.monotonic() > end:
                raise HostsError(
                    f"nobody leads at {host}:{port} ({error}): start host 0 there"
                ) from error
            time.sleep(_AGAIN_S)
        else:
            made.settimeout(None)
            return Connection(made.detach())


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as free:
        return free.getsockname()[1]


def _digest(manifest: Manifest) -> str:
    """One string for all files of a bundle."""
    files = sorted((name, file.sha256) for name, file in manifest.files.items())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _send(connection: Connection, message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _received(connection: Connection) -> dict[str, Any]:
    return json.loads(connection.recv_bytes())


def _end_at_once(why: str) -> None:
    """Ends the process, whose threads may wait for a host that never answers."""
    _log.critical("%s", why)
    logging.shutdown()
    os._exit(1)
