"""The routes of the page: its files, which say nothing of the server, and the data they ask for.

The files are for everyone, as a browser that opens an address shows no token; the data is for who
may see models, each what it may see. The page asks for it with the token that its reader gives it.

A request is from the page if its Origin is the host that it is sent to. Whoever owns a name can
make it lead here, and then a page of theirs would pass for ours: so the page answers under an
address or localhost only, which nobody else owns.
"""

import ipaddress
import urllib.parse
from pathlib import Path

from aiohttp import web

from aqt_server.errors import PermissionDenied
from aqt_server.http import OWN_PAGE, answer_in_json, call_of
from aqt_server.page import document
from aqt_server.repository import Repository
from aqt_server.security.authorization import Action, Guard

_ASSETS = Path(__file__).parent / "assets"
_FILES = {
    "/status": ("page.html", "text/html"),
    "/status/page.css": ("page.css", "text/css"),
    "/status/charts.js": ("charts.js", "text/javascript"),
    "/status/page.js": ("page.js", "text/javascript"),
    "/status/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def add_page(application: web.Application, repository: Repository, guard: Guard) -> None:
    """Serves the page, and takes requests of inference from it."""
    for path, (name, content_type) in _FILES.items():
        application.router.add_get(path, _file((_ASSETS / name).read_text(), content_type))

    async def status(request: web.Request) -> web.Response:
        _check_host(request)
        principal = call_of(request, guard).principal
        guard.check(principal, Action.READ)
        known, ready = repository.known(), repository.ready()
        return _data(
            document.status(
                [v for v in known if guard.allows(principal, Action.READ, v.name)],
                [s for s in ready if guard.allows(principal, Action.READ, s.name)],
            )
        )

    async def weights(request: web.Request) -> web.Response:
        _check_host(request)
        name, version = request.match_info["name"], request.match_info["version"]
        guard.check(call_of(request, guard).principal, Action.READ, name)
        return _data(document.weights(repository.get(name, version)))

    application.router.add_get("/status/data", status)
    application.router.add_get("/status/weights/{name}/{version}", weights)
    application[OWN_PAGE] = _from_page


def _file(text: str, content_type: str):
    async def answer(request: web.Request) -> web.Response:
        _check_host(request)
        return web.Response(text=text, content_type=content_type, headers=_HEADERS)

    return answer


def _data(found: object) -> web.Response:
    answer = answer_in_json(found)
    answer.headers.update(_HEADERS)
    return answer


def _from_page(request: web.Request) -> bool:
    """Whether a request with an Origin is one that the page makes: for its files, or its form."""
    origin = request.headers["Origin"].partition("://")[2]
    asked = request.path.startswith("/status/") or request.path.endswith("/infer")
    return asked and origin == request.host and _unowned(request.host)


def _check_host(request: web.Request) -> None:
    if not _unowned(request.host):
        raise PermissionDenied(
            f"the status page is shown under an address or localhost, and not as {request.host!r}, "
            f"as whoever owns a name can lead browsers here: forward the port to localhost"
        )


def _unowned(host: str) -> bool:
    """Whether the name in `host` is one that nobody can make lead elsewhere."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
