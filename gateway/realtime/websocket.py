"""`GET /ws`: the checks before the handshake, and the reading of one connection after it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from urllib.parse import urlsplit

import structlog
from aiohttp import WSMessage, WSMsgType, web

from auth.errors import Forbidden, Unauthenticated
from auth.permissions import Identity, Scope, has_scope
from auth.tokens import ShortGrant
from gateway.context import CONTEXT, Context
from gateway.problems import Problem
from gateway.realtime import actions, authorization, liveness, protocol, recovery, upgrade
from gateway.realtime.connection import Connection
from gateway.realtime.protocol import CloseCode
from orchestrator.events import user_channel

log = structlog.get_logger("gateway.websocket")

# Seconds.
_RETRY_DRAINING = "1"
_RETRY_LIMIT = "10"
# Seconds that a client whose frames cannot be read any more gets to take the close frame.
_LAST_WORD = 1.0


@dataclass(frozen=True, slots=True)
class Admission:
    """A handshake that may be answered: who, until when, and which channels from the start."""

    grant: ShortGrant
    channels: tuple[str, ...]
    valid_from: float


async def handle(request: web.Request) -> web.StreamResponse:
    """Serve one connection, from the handshake to its end.

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
        admission = Admission(grant, channels, standing.valid_from)
        return await _serve(request, context, admission, generation)
    finally:
        hub.leave(user_id)


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


async def _serve(request: web.Request, context: Context, admission: Admission, generation: int) -> web.StreamResponse:
    hub, loop = context.hub, asyncio.get_running_loop()
    grant = admission.grant
    socket, transport = await upgrade.accept(request, frame_bytes=hub.settings.frame_bytes)
    connection = Connection(
        transport=transport,
        drained=socket.drained,
        identity=grant.identity,
        narrowed=grant.channels,
        expires_at=grant.expires_at,
        valid_from=admission.valid_from,
        batch=request.query.get("batch") == "1",
        channels=dict.fromkeys(admission.channels),
    )
    hub.add(connection)
    try:
        if hub.draining:
            hub.close(connection, CloseCode.DRAINING)
        if hub.generation != generation:
            # Whatever has changed since the permissions were read was told before this connection could be found.
            hub.recheck(connection.user_id)
        liveness.start(hub, connection, loop.time())
        connection.handling = True
        await recovery.begin(hub, context.history, context.archive, connection, request.query.get("since"))
        connection.handling = False
        await _read(socket, context, connection)
    except upgrade.FrameError as error:
        hub.close(connection, error.code)
        await _last_word(request)
    except Exception:
        # Nobody outside may answer this by HTTP any more. The client comes back, and loses nothing.
        log.exception("a connection failed", connection_id=connection.id, user_id=connection.user_id)
        hub.close(connection, CloseCode.RECONNECT)
    finally:
        hub.end(connection)
    return socket


async def _read(socket: upgrade.Upgrade, context: Context, connection: Connection) -> None:
    """Handle what the client sends until it closes or is lost. Raises FrameError."""
    hub = context.hub
    while (message := await socket.next_message()) is not None:
        if message.type is WSMsgType.CLOSE:
            _answer_close(context, connection, message)
            return
        if connection.closed is not None:
            # Only its close frame is waited for.
            continue
        if message.type is WSMsgType.TEXT:
            connection.handling = True
            await actions.handle(context, connection, message.data)
            connection.handling = False
        elif message.type is WSMsgType.PING:
            hub.send(connection, protocol.pong_frame(message.data))
        elif message.type is WSMsgType.PONG:
            liveness.ponged(connection)
        else:
            hub.close(connection, CloseCode.BAD_REQUEST)


def _answer_close(context: Context, connection: Connection, message: WSMessage) -> None:
    """End the closing handshake that the client has begun, or that we have."""
    if connection.closed is None:
        # Codes are the client's to choose; only these are told apart, so that it cannot fill our counters.
        code = message.data if message.data in (CloseCode.NORMAL, CloseCode.GOING_AWAY) else CloseCode.NO_STATUS
        if not connection.transport.is_closing():
            connection.transport.write(protocol.close_frame(CloseCode.NORMAL))
        context.hub.drop(connection, code)


async def _last_word(request: web.Request) -> None:
    """Leave the connection open a moment: closing it over unread bytes would reset it, and the close frame be lost."""
    deadline = asyncio.get_running_loop().time() + _LAST_WORD
    # aiohttp has no event for the loss of a connection whose frames it cannot read.
    while request.transport is not None and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
