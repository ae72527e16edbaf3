"""Who may open a connection, whichever way it comes; and its beginning, once its transport is ours."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from auth.errors import Forbidden
from auth.permissions import Identity, Scope, has_scope
from auth.tokens import ShortGrant
from gateway.context import CONTEXT, Context
from gateway.operation import ADDRESS, bearer
from gateway.problems import Problem
from gateway.realtime import authorization, liveness, recovery
from gateway.realtime.connection import Connection
from gateway.realtime.protocol import CloseCode
from gateway.realtime.stream import Stream
from orchestrator.database import Connection as Sql
from orchestrator.events import user_channel

# Seconds.
_RETRY_DRAINING = "1"
_RETRY_LIMIT = "10"

# Believes the token that was shown, by a connection to the database.
Redeem = Callable[[Sql], Awaitable[ShortGrant]]


@dataclass(frozen=True, slots=True)
class Admission:
    """What a connection was admitted with. `generation`: the hub's, when that was read."""

    grant: ShortGrant
    channels: tuple[str, ...]
    generation: int

    def fields(self, request: web.Request) -> dict[str, Any]:
        """What a `Connection` is made with."""
        return {
            "identity": self.grant.identity,
            "narrowed": self.grant.channels,
            "expires_at": self.grant.expires_at,
            "valid_from": self.grant.valid_from,
            "address": address_of(request),
            "channels": self.channels,
        }


def require_way_in(request: web.Request) -> None:
    """Raise Problem while nobody is served (503), or when the page that asks is none of ours (403)."""
    context = request.app[CONTEXT]
    require_service(context)
    require_origin(request.headers.get("Origin"), request.host, context.settings.cors_origins)


async def admit(request: web.Request, redeem: Redeem) -> Admission:
    """Believe the token, then as `admit_bearer`."""
    context = request.app[CONTEXT]
    generation = context.hub.generation
    async with context.pool.acquire(timeout=context.database_timeout) as sql:
        grant = await redeem(sql)
    return await admit_bearer(request, grant, generation)


async def admit_bearer(request: web.Request, grant: ShortGrant, generation: int) -> Admission:
    """Check the channels, and count the connection: what is admitted is to be begun or given back (`hub.leave`).

    `generation` is the hub's before the token was redeemed. Raises Problem, auth.errors or what is in
    `orchestrator.database.UNAVAILABLE` for one that is refused.
    """
    context = request.app[CONTEXT]
    identity = grant.identity
    if not has_scope(identity, Scope.READ):
        raise Forbidden(f"This token lacks the scope {Scope.READ.value!r} that connecting takes.")
    channels = _channels(request, identity, context.settings.realtime.channels_per_connection)
    refused, asked = authorization.decide_all_alone(identity, channels, grant.channels)
    if asked:
        async with context.pool.acquire(timeout=context.database_timeout) as sql:
            refused |= await authorization.refusals(sql, identity, asked, grant.channels)
    if refused:
        name, error = next(iter(refused.items()))
        raise Problem(403, f"Subscribing to {name[:200]!r} is refused: {error}", errors={"channels": [str(error)]})
    count(context, identity.user_id)
    return Admission(grant, channels, generation)


def count(context: Context, user_id: int) -> None:
    """Count one more connection of this user: it is to be begun, or given back by `hub.leave`. Raises Problem."""
    # Draining may have begun since the request came.
    require_service(context)
    if not context.hub.admit(user_id):
        raise Problem(
            429,
            f"This user has {context.settings.realtime.connections_per_user} connections already: close one.",
            headers={"Retry-After": _RETRY_LIMIT},
        )


async def grant_of_bearer(request: web.Request, sql: Sql) -> ShortGrant:
    """What the main or API token of the request's `Authorization` grants a connection. Raises Unauthenticated."""
    tokens, main = request.app[CONTEXT].tokens, bearer(request)
    standing = await authorization.standing(sql, (await tokens.authenticate(sql, main)).user_id)
    # Again: voided between the two, it would be taken for a token of after that.
    identity = await tokens.authenticate(sql, main)
    return ShortGrant(identity, None, identity.expires_at, standing.valid_from if standing else 0.0)


def begin(context: Context, connection: Connection, stream: Stream, generation: int, since: str | None) -> None:
    """Take the connection in, and send it `connected`, what it has missed since `since`, and what comes."""
    hub = context.hub
    connection.transport.set_protocol(stream)
    hub.add(connection)
    if hub.draining:
        hub.close(connection, CloseCode.DRAINING)
    if hub.generation != generation:
        # Whatever has changed since the permissions were read was told before this connection could be found.
        hub.recheck(connection.user_id)
    liveness.start(hub, connection, asyncio.get_running_loop().time())
    if since is None:
        recovery.connect(hub, context.history, connection)
    else:
        stream.begin(recovery.resume(hub, context.history, context.archive, connection, since))


def address_of(request: web.Request) -> str:
    """The client's address: one string for all connections that it has."""
    return sys.intern(request.get(ADDRESS) or request.remote or "")


def require_service(context: Context) -> None:
    """Raise Problem (503) while nobody is served."""
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


def _channels(request: web.Request, identity: Identity, most: int) -> tuple[str, ...]:
    """The user's own channel and those of the query, each once. Raises Problem (403) when they are too many."""
    asked = [name for name in ",".join(request.query.getall("channels", ())).split(",") if name]
    channels = tuple(dict.fromkeys([user_channel(identity.user_id), *asked]))
    if len(channels) > most:
        raise Problem(403, f"One connection may have {most} channels, not {len(channels)}.")
    return channels
