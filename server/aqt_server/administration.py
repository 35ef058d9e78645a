"""The RPCs that say how the server is doing and change what it does, beside inference itself."""

import collections

from aqt_protos import open_inference_pb2 as pb
from aqt_server.call import Call
from aqt_server.entry import State
from aqt_server.errors import InvalidRequest, NotSupported
from aqt_server.logs import LogSettings
from aqt_server.model_config import model_config, model_statistics
from aqt_server.rate_limit import RateLimiter
from aqt_server.repository import Repository
from aqt_server.security.authentication import Principal
from aqt_server.security.authorization import Action, Guard
from aqt_server.settings import Limits
from aqt_server.shared_memory import Regions
from aqt_server.spans import Spans
from aqt_server.tracing import Tracer

_NO_CUDA = (
    "this server has no CUDA shared memory: use system shared memory, or send tensors in the "
    "messages"
)


class Administration:
    """Model control, configuration, statistics, shared memory, trace and log settings."""

    def __init__(
        self,
        *,
        repository: Repository,
        guard: Guard,
        tracer: Tracer,
        logs: LogSettings,
        limits: Limits,
        spans: Spans,
    ):
        self._repository = repository
        self._guard = guard
        # Each has regions of its own: nobody reads what another has registered.
        self._regions = collections.defaultdict[Principal, Regions](
            lambda: Regions(limits.max_tensor_bytes)
        )
        self._rates = RateLimiter(limits.rate_per_s, limits.rate_burst)
        self._tracer = tracer
        self._logs = logs
        self._spans = spans
        self.calls = collections.Counter[tuple[str, str]]()
        """Calls by RPC and status."""

    async def ModelConfig(self, request: pb.ModelConfigRequest, call: Call):
        """How a version is served."""
        servable = self._repository.get(request.name, request.version)
        return pb.ModelConfigResponse(
            config=model_config(servable, self._repository.policy(servable.name).versions)
        )

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, call: Call):
        """Counts and durations of a version, of all of a model's, or of all."""
        number = None
        if request.name:
            # Also for its error, if there is none of that name or number.
            servable = self._repository.get(request.name, request.version)
            number = servable.version if request.version else None
        return pb.ModelStatisticsResponse(
            model_stats=[
                model_statistics(servable)
                for servable in self._repository.ready()
                if request.name in ("", servable.name)
                and self._guard.allows(call.principal, Action.READ, servable.name)
                and number in (None, servable.version)
            ]
        )

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, call: Call):
        """Every version and its state."""
        _check_repository(request.repository_name)
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=listed.name,
                    version=str(listed.version),
                    state=listed.state,
                    reason=listed.reason,
                )
                for listed in await self._repository.index()
                if (listed.state is State.READY or not request.ready)
                and self._guard.allows(call.principal, Action.READ, listed.name)
            ]
        )

    async def RepositoryModelLoad(self, request: pb.RepositoryModelLoadRequest, call: Call):
        """Loads a model's versions, and answers when they are ready or refused."""
        _check_repository(request.repository_name)
        overrides = [p for p in request.parameters if p == "config" or p.startswith("file:")]
        if overrides:
            raise NotSupported(
                f"a bundle is served as it was converted, and {overrides[0]!r} would change it: "
                f"convert it again, and load it without"
            )
        await self._repository.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: pb.RepositoryModelUnloadRequest, call: Call):
        """Unloads a model, and answers when its accepted requests are answered."""
        _check_repository(request.repository_name)
        await self._repository.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, call: Call
    ):
        """The registered regions, or one of them."""
        status = pb.SystemSharedMemoryStatusResponse.RegionStatus
        return pb.SystemSharedMemoryStatusResponse(
            regions={
                region.name: status(
                    name=region.name,
                    key=region.key,
                    offset=region.offset,
                    byte_size=region.nbytes,
                )
                for region in self._regions[call.principal].registered(request.name)
            }
        )

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, call: Call
    ):
        """Makes part of a shared memory object known under a name."""
        self._regions[call.principal].register(
            name=request.name, key=request.key, offset=request.offset, nbytes=request.byte_size
        )
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, call: Call
    ):
        """Forgets a region, or all of them; requests that use it now may finish."""
        self._regions[call.principal].unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, call: Call
    ) -> pb.CudaSharedMemoryStatusResponse:
        """UNIMPLEMENTED."""
        raise NotSupported(_NO_CUDA)

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, call: Call
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """UNIMPLEMENTED."""
        raise NotSupported(_NO_CUDA)

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, call: Call
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """UNIMPLEMENTED."""
        raise NotSupported(_NO_CUDA)

    async def TraceSetting(self, request: pb.TraceSettingRequest, call: Call):
        """Changes which requests are traced, and answers what holds then."""
        if request.model_name:
            self._repository.get(request.model_name, "")
        settings = {name: list(value.value) for name, value in request.settings.items()}
        if settings:
            self._tracer.update(request.model_name, settings)
        rules = self._tracer.rules(request.model_name)
        response = pb.TraceSettingResponse()
        for name in ("trace_level", "trace_rate", "trace_count"):
            response.settings[name].value.append(getattr(rules, name))
        return response

    async def LogSettings(self, request: pb.LogSettingsRequest, call: Call):
        """Changes what is logged, and answers what holds then."""
        self._logs.update(request)
        return self._logs.describe()


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest(
            f"this server has one model repository, and {name!r} names one: leave its name empty"
        )
