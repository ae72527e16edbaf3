"""What happens around every handler: request id, errors as problem documents, CORS, the address's limit, log, metrics.

One middleware, since each costs on every request; the headers of all answers are set in one signal, which the answer
to a WebSocket handshake passes too.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from random import getrandbits
from time import perf_counter

import asyncpg
import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware

from auth import errors as identity
from gateway.metrics import METRICS
from gateway.operation import ADDRESS, RATE_HEADERS, REQUEST_ID, USER_ID, Handler
from gateway.problems import Problem
from gateway.ratelimit import LIMITS, client_address, limited_address
from gateway.settings import GatewaySettings
from orchestrator import errors as domain
from orchestrator.database import UNAVAILABLE

log = structlog.get_logger("gateway.http")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_EXPOSED = "X-Request-ID, Location, Retry-After, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset"
_ALLOWED_METHODS = "GET, POST, PUT, DELETE"
_ALLOWED_HEADERS = "Authorization, Content-Type, Idempotency-Key, X-Request-ID"
# Seconds that a browser may remember the answer to a preflight.
_PREFLIGHT_AGE = "600"


def edge(settings: GatewaySettings) -> Middleware:
    """The middleware."""
    proxies = settings.trusted_proxies
    # Bound once: the logger of the module looks its configuration up at every call.
    bound = log.bind()

    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = perf_counter()
        given = request.headers.get("X-Request-ID", "")
        request[REQUEST_ID] = given if _REQUEST_ID.fullmatch(given) else f"{getrandbits(128):032x}"
        request[ADDRESS] = address = client_address(request, proxies)
        try:
            limits = request.app[LIMITS]
            if headers := limits.address.take(limited_address(address)):
                request[RATE_HEADERS] = headers
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                response: web.StreamResponse = web.Response(status=204)
            else:
                response = await handler(request)
        except Exception as error:  # noqa: BLE001  Whatever it is, the client gets a problem document.
            response = _problem(error, request).response(request[REQUEST_ID])
        _record(request, response, perf_counter() - began, bound)
        return response

    return around


def _record(
    request: web.Request, response: web.StreamResponse, seconds: float, log: structlog.typing.FilteringBoundLogger
) -> None:
    resource = request.match_info.route.resource
    template = resource.canonical if resource else "unmatched"
    request.app[METRICS].observe(template, request.method, response.status, seconds)
    tell = log.debug if response.status < 300 else log.info
    # Never the query: it may hold a short token.
    tell(
        "request",
        method=request.method,
        path=request.path,
        status=response.status,
        ms=round(seconds * 1000, 2),
        request_id=request[REQUEST_ID],
        address=request[ADDRESS],
        user_id=request.get(USER_ID),
    )


def _problem(error: Exception, request: web.Request) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, web.HTTPException):
        return _of_aiohttp(error)
    if isinstance(error, identity.AuthError):
        return _of_identity(error)
    if isinstance(error, domain.ClusterCodeError):
        return _of_domain(error)
    # asyncpg's complaints about a value that we passed are InterfaceErrors too, and no outage.
    if isinstance(error, (*UNAVAILABLE, asyncpg.DeadlockDetectedError)) and not isinstance(error, ValueError):
        log.warning(
            "database unavailable",
            error=str(error) or type(error).__name__,
            kind=type(error).__name__,
            path=request.path,
            request_id=request[REQUEST_ID],
        )
        return Problem(503, "The database does not answer now. Try again.", headers={"Retry-After": "1"})
    log.error(
        "a handler failed",
        method=request.method,
        path=request.path,
        request_id=request[REQUEST_ID],
        exc_info=error,
    )
    return Problem(500, "Something went wrong here. The request id finds it in the log.")


def _of_aiohttp(error: web.HTTPException) -> Problem:
    status = error.status
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return Problem(status, f"This address takes {allowed}, not {error.method}.", headers={"Allow": allowed})
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return Problem(status, "The body is too large.", headers={"Connection": "close"})
    if isinstance(error, web.HTTPNotFound):
        return Problem(status, "There is nothing at this address.")
    return Problem(status, error.reason)


def _of_identity(error: identity.AuthError) -> Problem:
    match error:
        case identity.Unauthenticated():
            return Problem(401, str(error), headers={"WWW-Authenticate": "Bearer"})
        case identity.Forbidden():
            return Problem(403, str(error))
        case identity.NotVisible():
            return Problem(404, str(error))
        case identity.Taken():
            return Problem(409, str(error), errors={error.field: [str(error)]})
        case identity.Unacceptable():
            return Problem(422, str(error), errors={error.field: [str(error)]})
        case _:
            return Problem(503, str(error), headers={"Retry-After": "5"})


def _of_domain(error: domain.ClusterCodeError) -> Problem:
    match error:
        case domain.NotFound():
            return Problem(404, str(error))
        case domain.InUse():
            return Problem(409, str(error), in_use_by=error.by)
        case domain.Conflict():
            wait = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
            return Problem(409, str(error), headers=wait)
        case domain.Invalid():
            return Problem(422, str(error), errors=error.errors)
        case _:
            return Problem(503, str(error), headers={"Retry-After": "1"})


def stamp(settings: GatewaySettings) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """The signal that sets the headers which every answer has, WebSocket handshakes too."""
    origins = frozenset(settings.cors_origins)

    async def set_headers(request: web.Request, response: web.StreamResponse) -> None:
        headers = response.headers
        headers["Server"] = "cluster-code"
        headers["X-Content-Type-Options"] = "nosniff"
        if REQUEST_ID in request:
            headers["X-Request-ID"] = request[REQUEST_ID]
        if RATE_HEADERS in request:
            headers.update(request[RATE_HEADERS])
        if origins:
            _allow(request, response, origins)

    return set_headers


def _allow(request: web.Request, response: web.StreamResponse, origins: frozenset[str]) -> None:
    """CORS (https://fetch.spec.whatwg.org/#http-cors-protocol). No cookies are used, so none are allowed."""
    headers = response.headers
    everyone = "*" in origins
    if not everyone:
        headers.add("Vary", "Origin")
    origin = request.headers.get("Origin")
    if origin is None or not (everyone or origin in origins):
        return
    headers["Access-Control-Allow-Origin"] = "*" if everyone else origin
    headers["Access-Control-Expose-Headers"] = _EXPOSED
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        headers["Access-Control-Allow-Methods"] = _ALLOWED_METHODS
        headers["Access-Control-Allow-Headers"] = _ALLOWED_HEADERS
        headers["Access-Control-Max-Age"] = _PREFLIGHT_AGE
