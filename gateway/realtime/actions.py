"""What each action of a client does."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from auth.errors import AuthError, Forbidden, IssuerUnavailable, NotVisible, Unauthenticated
from auth.permissions import Scope, has_scope
from gateway.context import Context
from gateway.realtime import authorization, liveness, protocol, recovery
from gateway.realtime.connection import Connection
from gateway.realtime.protocol import CloseCode
from orchestrator.database import UNAVAILABLE

log = structlog.get_logger("gateway.actions")


def handle(context: Context, connection: Connection, data: bytes) -> Coroutine[Any, Any, None] | None:
    """Do what a text message asks for and answer it, or return what is to be awaited for that.

    Neither raises anything that a client can cause.
    """
    try:
        action = protocol.parse(data)
    except protocol.Rejected as rejected:
        _reject(context, connection, rejected)
        return None
    match action:
        case protocol.Subscribe():
            return _answered(context, connection, action, _subscribe(context, connection, action))
        case protocol.Refresh():
            return _answered(context, connection, action, _refresh(context, connection, action))
        case protocol.Unsubscribe():
            try:
                _unsubscribe(context, connection, action)
            except AuthError as error:
                _refuse(context, connection, action, error)
        case protocol.Ping():
            _send(context, connection, "pong", connection.own_channel, action.id)
    return None


async def _answered(
    context: Context, connection: Connection, action: protocol.Action, work: Coroutine[Any, Any, None]
) -> None:
    """Await the work; what it raises becomes an answer."""
    try:
        await work
    except AuthError as error:
        _refuse(context, connection, action, error)
    except UNAVAILABLE as error:
        log.warning("an action needs the database", error=str(error) or type(error).__name__)
        _refuse(context, connection, action, error)


def _unsubscribe(context: Context, connection: Connection, action: protocol.Unsubscribe) -> None:
    authorization.parse_channel(action.channel)
    if action.channel == connection.own_channel:
        raise Forbidden("Every connection keeps its user's own channel.")
    context.hub.unsubscribe(connection, action.channel)
    _send(context, connection, "unsubscribed", action.channel, action.id)


def _refuse(context: Context, connection: Connection, action: protocol.Action, error: BaseException) -> None:
    if isinstance(action, protocol.Subscribe | protocol.Unsubscribe):
        channel = action.channel
    else:
        channel = connection.own_channel
    code, message, temporary = _explain(error)
    frame = protocol.error(_named(connection, channel), code, message, temporary=temporary, echo=action.id)
    context.hub.send(connection, frame)


def _reject(context: Context, connection: Connection, rejected: protocol.Rejected) -> None:
    hub = context.hub
    hub.send(connection, protocol.error(connection.own_channel, rejected.code, str(rejected), echo=rejected.id))
    if rejected.malformed and liveness.malformed(hub, connection, asyncio.get_running_loop().time()):
        hub.close(connection, CloseCode.BAD_REQUEST)


async def _subscribe(context: Context, connection: Connection, action: protocol.Subscribe) -> None:
    hub, channel = context.hub, action.channel
    generation = hub.generation
    if authorization.decide_alone(connection.identity, channel, connection.narrowed) is not None:
        async with context.pool.acquire(timeout=context.database_timeout) as sql:
            await authorization.may_subscribe(sql, connection.identity, channel, connection.narrowed)
    if channel not in connection.channels:
        if len(connection.channels) >= hub.settings.channels_per_connection:
            hub.close(connection, CloseCode.CHANNEL_LIMIT)
            return
        # From now on a change of permissions finds it, however long it catches up.
        connection.channels += (channel,)
    if hub.generation != generation:
        # A change that was told since the check was begun has not.
        hub.recheck(connection.user_id)
    await recovery.subscribe(hub, context.history, context.archive, connection, action)


async def _refresh(context: Context, connection: Connection, action: protocol.Refresh) -> None:
    hub = context.hub
    async with context.pool.acquire(timeout=context.database_timeout) as sql:
        grant = await context.tokens.redeem_short(sql, action.token)
    if grant.identity.user_id != connection.user_id:
        raise Unauthenticated("The short token is another user's.")
    if not has_scope(grant.identity, Scope.READ):
        raise Forbidden(f"The short token lacks the scope {Scope.READ.value!r}.")
    connection.identity, connection.narrowed = grant.identity, grant.channels
    connection.expires_at, connection.valid_from = grant.expires_at, grant.valid_from
    connection.warned, connection.due = False, 0.0
    # The new token may allow less than the old one did.
    hub.recheck(connection.user_id)
    data = {"expires_at": protocol.timestamp(grant.expires_at)}
    hub.send(connection, protocol.control("pong", connection.own_channel, data, action.id))


def _send(context: Context, connection: Connection, event_type: str, channel: str, echo: str | None) -> None:
    context.hub.send(connection, protocol.control(event_type, channel, {}, echo))


def _named(connection: Connection, channel: str) -> str:
    """The channel that an answer names: the one asked for, unless none can be called so."""
    return channel if protocol.is_name(channel) else connection.own_channel


def _explain(error: BaseException) -> tuple[str, str, bool]:
    """The `code`, `message` and `temporary` of an `error`."""
    match error:
        case authorization.UnknownChannel():
            return "unknown_channel", str(error), False
        case NotVisible():
            return "not_found", str(error), False
        case Forbidden():
            return "forbidden", str(error), False
        case Unauthenticated():
            return "token_invalid", str(error), False
        case IssuerUnavailable():
            return "unavailable", str(error), True
        case AuthError():
            return "refused", str(error), False
        case _:
            return "unavailable", "The database does not answer now. Try again.", True
