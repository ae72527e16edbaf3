"""The pages: a landing page, live events, the OpenAPI document, and Swagger UI from the package that brings it.

Nothing comes from a CDN. And the JavaScript client, which pages of other origins import too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import swagger_ui_bundle
from aiohttp import web

from gateway import openapi

_STATIC = Path(__file__).parent.parent / "static"
_SWAGGER = Path(str(swagger_ui_bundle.swagger_ui_path))
# All that the pages load: nothing else can be reached through them.
_ASSETS: dict[str, Path] = {
    "style.css": _STATIC / "style.css",
    "docs.js": _STATIC / "docs.js",
    "swagger-ui-bundle.js": _SWAGGER / "swagger-ui-bundle.js",
    "swagger-ui.css": _SWAGGER / "swagger-ui.css",
    "favicon.png": _SWAGGER / "favicon-32x32.png",
}
# The client, with its types, and the page that shows what it does.
_CLIENT: dict[str, tuple[Path, str]] = {
    "cluster-code.js": (_STATIC / "cluster-code.js", "text/javascript"),
    "cluster-code.d.ts": (_STATIC / "cluster-code.d.ts", "text/plain"),
    "events.js": (_STATIC / "events.js", "text/javascript"),
    "pods.js": (_STATIC / "pods.js", "text/javascript"),
    "events.css": (_STATIC / "events.css", "text/css"),
}
# Swagger UI shows its icons as data: images; the rest comes from here, and nothing may frame or be framed.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def home(request: web.Request) -> web.StreamResponse:
    """What this is, and where to go on."""
    return web.FileResponse(_STATIC / "index.html", headers=_PAGE_HEADERS)


async def docs(request: web.Request) -> web.StreamResponse:
    """Swagger UI on the OpenAPI document."""
    return web.FileResponse(_STATIC / "docs.html", headers=_PAGE_HEADERS)


async def events(request: web.Request) -> web.StreamResponse:
    """Events as they happen, for people."""
    return web.FileResponse(_STATIC / "events.html", headers=_PAGE_HEADERS)


async def client(request: web.Request) -> web.StreamResponse:
    """The JavaScript client. Asked for again each time (by ETag), so that it is never older than the gateway."""
    path, content_type = _CLIENT.get(request.match_info["name"], (None, ""))
    if path is None:
        raise web.HTTPNotFound
    headers = {"Content-Type": f"{content_type}; charset=utf-8", "Cache-Control": "no-cache"}
    return web.FileResponse(path, headers=headers)


async def asset(request: web.Request) -> web.StreamResponse:
    """One of the files that the pages load."""
    path = _ASSETS.get(request.match_info["name"])
    if path is None:
        raise web.HTTPNotFound
    return web.FileResponse(path, headers={"Cache-Control": "public, max-age=3600"})


async def asyncapi(request: web.Request) -> web.StreamResponse:
    """The AsyncAPI document: the WebSocket, server-sent events, and publishing from other services."""
    headers = {"Content-Type": "application/yaml", "Cache-Control": "no-cache"}
    return web.FileResponse(_STATIC / "asyncapi.yaml", headers=headers)


def document(routes: Iterable[web.RouteDef], version: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler that answers the OpenAPI document, which is made at the first request."""
    made: list[bytes] = []

    async def openapi_document(request: web.Request) -> web.Response:
        if not made:
            made.append(openapi.document(routes, version))
        return web.Response(body=made[0], content_type="application/json", headers={"Cache-Control": "no-cache"})

    return openapi_document
