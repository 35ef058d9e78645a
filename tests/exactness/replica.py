"""A server process with a repository of its own, and what may happen to it while it serves."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from aqt_client import AsyncClient, Client, NotFound, RetryPolicy
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from server_process import WAIT_S, ServerProcess, eventually, serving

ONCE = RetryPolicy(max_attempts=1)


class Replica:
    """Serves copies of the bundles in `bundles`; a context manager.

    Every method blocks until the replica is ready again, and may be called in any thread.
    """

    def __init__(self, bundles: Path, root: Path, *flags: str):
        self._repository = root / "repository"
        shutil.copytree(bundles, self._repository)
        self.models = sorted(path.name for path in bundles.iterdir())
        self._flags = ("--max-batch-rows", "64", "--proof-s", "0", *flags)
        self._logs = Path(tempfile.mkdtemp(dir=root, prefix="logs-"))
        self._process = contextlib.ExitStack()
        self._server: ServerProcess
        self._starts = 0

    def __enter__(self) -> "Replica":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def _start(self) -> None:
        self._starts += 1
        log = self._logs / str(self._starts)
        self._server = self._process.enter_context(serving(self._repository, *self._flags, log=log))

    @property
    def address(self) -> str:
        """Where it listens now; while it is down, where it did."""
        return self._server.address

    def restart(self) -> None:
        """SIGTERM, after which it answers what it has accepted, and a new start."""
        code = self._server.terminate()
        assert code == 0, self._server.log()
        self._process.close()
        self._start()

    def kill(self) -> None:
        """SIGKILL in the middle of everything, and a new start."""
        self._server.kill()
        self._process.close()
        self._start()

    def new_version(self) -> None:
        """The same bundle of every model under a higher number; then the old one is deleted.

        The replica has to poll its repository.
        """
        with Client(self.address) as client:
            for model in self.models:
                directory = self._repository / model
                old = max(int(path.name) for path in directory.iterdir())
                new = directory / str(old + 1)
                hidden = self._repository.parent / f"{model}-{new.name}"
                shutil.copytree(directory / str(old), hidden)
                hidden.rename(new)
                eventually(_is_ready(client, model, new.name))
                shutil.rmtree(directory / str(old))

    def reload(self) -> None:
        """Each model unloaded and loaded by RPC; the replica has to be under explicit control."""
        with self._server.channel(None) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            for model in self.models:
                stub.RepositoryModelUnload(
                    pb.RepositoryModelUnloadRequest(model_name=model), timeout=WAIT_S
                )
                stub.RepositoryModelLoad(
                    pb.RepositoryModelLoadRequest(model_name=model), timeout=WAIT_S
                )


@contextlib.contextmanager
def two_replicas(bundles: Path, root: Path) -> Iterator[tuple[Replica, Replica]]:
    """One that polls its repository, and one whose models are loaded by RPC."""
    explicit = ("--model-control", "explicit", "--load-model", "*")
    with (
        Replica(bundles, root / "polling", "--poll-s", "0.2") as polling,
        Replica(bundles, root / "explicit", *explicit) as by_rpc,
    ):
        yield polling, by_rpc


def _is_ready(client: Client, model: str, version: str) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            return client.is_model_ready(model, version)
        except NotFound:
            return False

    return ready


class Connection:
    """A client of one replica, which follows it to the address of its next start."""

    def __init__(self, replica: Replica):
        self._replica = replica
        self._clients: dict[str, AsyncClient] = {}

    @property
    def client(self) -> AsyncClient:
        address = self._replica.address
        if address not in self._clients:
            self._clients[address] = AsyncClient(address, timeout_s=WAIT_S, retry=ONCE)
        return self._clients[address]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
