"""`GET /ws`: the checks before the handshake, and the handing over of the connection after it."""

from __future__ import annotations

import asyncio
import sys
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from auth.errors import Forbidden, Unauthenticated
from auth.permissions import Identity, Scope, has_scope
from gateway.context import CONTEXT, Context
from gateway.operation import ADDRESS
from gateway.problems import Problem
from gateway.realtime import authorization, liveness, protocol, recovery, upgrade
from gateway.realtime.connection import Connection
from gateway.realtime.protocol import CloseCode
from gateway.realtime.stream import Stream
from orchestrator.events import user_channel

log = structlog.get_logger("gateway.websocket")

# Seconds.
_RETRY_DRAINING = "1"
_RETRY_LIMIT = "10"


async def handle(request: web.Request) -> web.StreamResponse:
    """Answer a handshake; the connection goes on without this handler.

    Raises Problem, auth.errors or what is in `orchestrator.database.UNAVAILABLE` on a handshake that is refused.
    """
    context = request.app[CONTEXT]
    hub = context.hub
    _require_service(context)
    require_origin(request.headers.get("Origin"), request.host, context.settings.cors_origins)
    upgrade.require_handshake(request)
    token = _token(request)
    generation = hub.generation
    async with context.pool.acquire(timeout=context.database_timeout) as sql:
        grant = await context.tokens.redeem_short(sql, token)
        if not has_scope(grant.identity, Scope.READ):
            raise Forbidden(f"This token lacks the scope {Scope.READ.value!r} that connecting takes.")
        standing = await authorization.standing(sql, grant.identity.user_id)
        if standing is None:
            raise Unauthenticated("The account of this token is gone or disabled.")
        channels = _channels(request, grant.identity, context.settings.realtime.channels_per_connection)
        refused = await authorization.refusals(sql, grant.identity, channels, grant.channels)
    if refused:
        name, error = next(iter(refused.items()))
        raise Problem(403, f"Subscribing to {name[:200]!r} is refused: {error}", errors={"channels": [str(error)]})
    user_id = grant.identity.user_id
    # Draining may have begun meanwhile.
    _require_service(context)
    if not hub.admit(user_id):
        raise Problem(
            429,
            f"This user has {context.settings.realtime.connections_per_user} connections already: close one.",
            headers={"Retry-After": _RETRY_LIMIT},
        )
    try:
        answer = await upgrade.accept(request)
        transport, early = upgrade.take_over(request)
    except ConnectionError:
        hub.leave(user_id)
        raise Problem(400, "The connection was lost during the handshake.") from None
    except BaseException:
        hub.leave(user_id)
        raise
    connection = Connection(
        transport=transport,
        identity=grant.identity,
        narrowed=grant.channels,
        expires_at=grant.expires_at,
        valid_from=standing.valid_from,
        batch=request.query.get("batch") == "1",
        address=address_of(request),
        channels=channels,
    )
    stream = Stream(context, connection)
    transport.set_protocol(stream)
    hub.add(connection)
    if hub.draining:
        hub.close(connection, CloseCode.DRAINING)
    if hub.generation != generation:
        # Whatever has changed since the permissions were read was told before this connection could be found.
        hub.recheck(user_id)
    liveness.start(hub, connection, asyncio.get_running_loop().time())
    since = request.query.get("since")
    if since is None:
        recovery.connect(hub, context.history, connection)
    else:
        stream.begin(recovery.resume(hub, context.history, context.archive, connection, since))
    if early:
        stream.data_received(early)
    return answer


def address_of(request: web.Request) -> str:
    """The client's address: one string for all connections that it has."""
    return sys.intern(request.get(ADDRESS) or request.remote or "")


def _require_service(context: Context) -> None:
    if context.hub.draining:
        raise Problem(503, "The server is shutting down: try another.", headers={"Retry-After": _RETRY_DRAINING})
    if not context.feed.ready:
        raise Problem(503, "The server is starting: try again.", headers={"Retry-After": _RETRY_DRAINING})


def require_origin(origin: str | None, host: str, allowed: list[str]) -> None:
    """Raise Problem (403) when a browser connects from a page that is neither ours nor allowed.

    Handshakes are exempt from the browser's same-origin policy: the server must look (RFC 6455, section 10.2).
    """
    if origin is None or "*" in allowed or origin in allowed:
        return
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    name = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname
    same = {f"{name}:{port or usual}"} | ({name} if port in (None, usual) else set())
    if usual is None or host.lower() not in same:
        raise Problem(403, "Pages of this origin may not connect here. CORS_ORIGINS allows origins.")


def _token(request: web.Request) -> str:
    """The short token, from the subprotocols or the query."""
    offered = ",".join(request.headers.getall("Sec-WebSocket-Protocol", ()))
    names = (name.strip() for name in offered.split(","))
    bearer = next((name.removeprefix(protocol.BEARER) for name in names if name.startswith(protocol.BEARER)), None)
    token = bearer or request.query.get("token")
    if not token:
        raise Unauthenticated("The short token is missing: pass ?token= or the subprotocol bearer.{short_token}.")
    return token


def _channels(request: web.Request, identity: Identity, most: int) -> tuple[str, ...]:
    """The user's own channel and those of the query, each once. Raises Problem (403) when they are too many."""
    asked = [name for name in ",".join(request.query.getall("channels", ())).split(",") if name]
    channels = tuple(dict.fromkeys([user_channel(identity.user_id), *asked]))
    if len(channels) > most:
        raise Problem(403, f"One connection may have {most} channels, not {len(channels)}.")
    return channels
