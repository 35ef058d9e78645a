"""The HTTP door: the routes of the Open Inference Protocol, each a call of `Service.answer`."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

from aiohttp import web
from google.protobuf.message import Message

from aqt_protos import open_inference_pb2 as pb
from aqt_server.documents import document_of
from aqt_server.errors import InvalidRequest
from aqt_server.http import answer_in_json, body_of, call_of, errors_in_json
from aqt_server.profiling import Profiler
from aqt_server.rest_tensors import LENGTH_HEADER, read_document, read_request, write_response
from aqt_server.security.authorization import Action, Guard
from aqt_server.service import Service
from aqt_server.settings import Limits

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(
    service: Service, guard: Guard, limits: Limits, profiler: Profiler
) -> web.Application:
    """All routes, and one of our own: POST /aqt/profile with {"seconds": 2}."""
    made = web.Application(middlewares=[errors_in_json], client_max_size=limits.max_message_bytes)
    made.router.add_routes(_Routes(service, guard, limits).all())

    async def profile(request: web.Request) -> web.Response:
        guard.check(call_of(request, guard).principal, Action.ADMINISTER)
        given = read_document(await body_of(request), limits.max_json_bytes)
        seconds = given.get("seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise InvalidRequest('the body is {"seconds": 2}, for how long the profile is')
        return answer_in_json({"profile": str(await profiler.take(seconds))})

    made.router.add_post("/aqt/profile", profile)
    return made


class _Routes:
    def __init__(self, service: Service, guard: Guard, limits: Limits):
        self._service = service
        self._guard = guard
        self._limits = limits

    def all(self) -> Iterable[web.RouteDef]:
        model, control = "/v2/models/{name}", "/v2/repository/models/{name}"
        yield web.get("/v2", self._plain("ServerMetadata", pb.ServerMetadataRequest))
        yield web.get("/v2/health/live", self._yes("ServerLive", pb.ServerLiveRequest, "live"))
        yield web.get("/v2/health/ready", self._yes("ServerReady", pb.ServerReadyRequest, "ready"))
        # Before the models, of which none can have this name here.
        yield web.get("/v2/models/stats", self._plain("ModelStatistics", pb.ModelStatisticsRequest))
        for at in (model, f"{model}/versions/{{version}}"):
            yield web.get(at, self._plain("ModelMetadata", pb.ModelMetadataRequest))
            yield web.get(f"{at}/ready", self._yes("ModelReady", pb.ModelReadyRequest, "ready"))
            yield web.get(f"{at}/config", self._config)
            yield web.get(f"{at}/stats", self._plain("ModelStatistics", pb.ModelStatisticsRequest))
            yield web.post(f"{at}/infer", self._infer)
        yield web.post("/v2/repository/index", self._index)
        yield web.post(f"{control}/load", self._load)
        yield web.post(f"{control}/unload", self._unload)
        for kind in ("System", "Cuda"):
            yield from self._shared_memory(kind)
        for at in ("/v2/trace/setting", f"{model}/trace/setting"):
            yield web.get(at, self._trace)
            yield web.post(at, self._trace)
        yield web.get("/v2/logging", self._log)
        yield web.post("/v2/logging", self._log)

    def _shared_memory(self, kind: str) -> Iterable[web.RouteDef]:
        at = f"/v2/{kind.lower()}sharedmemory"

        def of(verb: str) -> tuple[str, type[Message]]:
            rpc = f"{kind}SharedMemory{verb}"
            return rpc, getattr(pb, f"{rpc}Request")

        async def status(request: web.Request) -> web.Response:
            rpc, kind = of("Status")
            answered = await self._answer(request, rpc, kind(**request.match_info))
            return answer_in_json(list(document_of(answered)["regions"].values()))

        async def register(request: web.Request) -> web.Response:
            rpc, kind = of("Register")
            given = await self._document(request)
            fields = {k: v for k, v in given.items() if k in ("key", "offset", "byte_size")}
            return await self._done(request, rpc, kind, {**fields, **request.match_info})

        async def unregister(request: web.Request) -> web.Response:
            rpc, kind = of("Unregister")
            return await self._done(request, rpc, kind, dict(request.match_info))

        for place in (at, f"{at}/region/{{name}}"):
            yield web.get(f"{place}/status", status)
            yield web.post(f"{place}/unregister", unregister)
        yield web.post(f"{at}/region/{{name}}/register", register)

    def _plain(self, rpc: str, kind: type[Message]) -> _Handler:
        """Answers with the message of `rpc` as it is."""

        async def handler(request: web.Request) -> web.Response:
            answered = await self._answer(request, rpc, kind(**request.match_info))
            return answer_in_json(document_of(answered))

        return handler

    def _yes(self, rpc: str, kind: type[Message], field: str) -> _Handler:
        """Answers with 200 where `field` of the message of `rpc` is true, else with 503."""

        async def handler(request: web.Request) -> web.Response:
            answered = await self._answer(request, rpc, kind(**request.match_info))
            return web.Response(status=200 if getattr(answered, field) else 503)

        return handler

    async def _config(self, request: web.Request) -> web.Response:
        asked = pb.ModelConfigRequest(**request.match_info)
        answered = cast(pb.ModelConfigResponse, await self._answer(request, "ModelConfig", asked))
        return answer_in_json(document_of(answered.config))

    async def _index(self, request: web.Request) -> web.Response:
        given = await self._document(request)
        asked = _made(pb.RepositoryIndexRequest, {"ready": given.get("ready", False)})
        answered = await self._answer(request, "RepositoryIndex", asked)
        return answer_in_json(document_of(answered)["models"])

    async def _load(self, request: web.Request) -> web.Response:
        asked = pb.RepositoryModelLoadRequest(model_name=request.match_info["name"])
        given = (await self._document(request)).get("parameters") or {}
        for name in given:
            asked.parameters[name].SetInParent()
        await self._answer(request, "RepositoryModelLoad", asked)
        return web.Response()

    async def _unload(self, request: web.Request) -> web.Response:
        asked = pb.RepositoryModelUnloadRequest(model_name=request.match_info["name"])
        await self._document(request)
        await self._answer(request, "RepositoryModelUnload", asked)
        return web.Response()

    async def _trace(self, request: web.Request) -> web.Response:
        asked = pb.TraceSettingRequest(model_name=request.match_info.get("name", ""))
        for name, value in (await self._document(request)).items():
            values = cast(list[Any], value if isinstance(value, list) else [value])
            asked.settings[name].value.extend(str(v) for v in values if v is not None)
        answered = await self._answer(request, "TraceSetting", asked)
        settings = cast(pb.TraceSettingResponse, answered).settings
        # A level can be of several values in the protocol, and alone is a list.
        return answer_in_json(
            {n: list(v.value) if n == "trace_level" else v.value[0] for n, v in settings.items()}
        )

    async def _log(self, request: web.Request) -> web.Response:
        asked = pb.LogSettingsRequest()
        fields = {bool: "bool_param", int: "uint32_param", str: "string_param"}
        for name, value in (await self._document(request)).items():
            if type(value) not in fields:
                raise InvalidRequest(f"log setting {name!r} is no text, number or boolean")
            asked.settings[name].CopyFrom(
                _made(pb.LogSettingsRequest.SettingValue, {fields[type(value)]: value})
            )
        answered = await self._answer(request, "LogSettings", asked)
        settings = cast(pb.LogSettingsResponse, answered).settings
        return answer_in_json(
            {n: getattr(v, v.WhichOneof("parameter_choice") or "") for n, v in settings.items()}
        )

    async def _infer(self, request: web.Request) -> web.Response:
        message, in_binary = read_request(
            await body_of(request),
            request.headers.get(LENGTH_HEADER),
            model=request.match_info["name"],
            version=request.match_info.get("version", ""),
            max_json_bytes=self._limits.max_json_bytes,
        )
        answered = await self._answer(request, "ModelInfer", message)
        body, length = write_response(cast(pb.ModelInferResponse, answered), in_binary)
        if length is None:
            return web.Response(body=body, content_type="application/json")
        return web.Response(
            body=body,
            content_type="application/octet-stream",
            headers={LENGTH_HEADER: str(length)},
        )

    async def _done(
        self, request: web.Request, rpc: str, kind: type[Message], fields: dict[str, Any]
    ) -> web.Response:
        await self._answer(request, rpc, _made(kind, fields))
        return web.Response()

    async def _answer(self, request: web.Request, rpc: str, message: Message) -> Message:
        return await self._service.answer(rpc, message, call_of(request, self._guard))

    async def _document(self, request: web.Request) -> dict[str, Any]:
        return read_document(await body_of(request), self._limits.max_json_bytes)


def _made(kind: type[Message], fields: dict[str, Any]) -> Any:
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the body has a field of a wrong type: {error}") from error
