"""`GET /api/v1/events`: the same envelopes as `text/event-stream` (https://html.spec.whatwg.org/#server-sent-events).

To everything behind it a stream of events is a connection like any other: it is written WebSocket frames, as all are,
and writes them on as what its client reads. An event's frame is turned once, however many streams it goes to.

The browser's EventSource comes back by itself, with the same URL and `Last-Event-ID`. Its short token may do that (see
`Tokens.redeem_stream`), until the connection is closed with a code that says not to come back.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar
from uuid import UUID

import orjson
import structlog
from aiohttp import web

from auth.errors import Unauthenticated
from auth.tokens import ShortGrant
from gateway.context import CONTEXT, Context
from gateway.problems import Problem
from gateway.realtime import admission, frames, protocol, upgrade
from gateway.realtime.connection import Connection
from gateway.realtime.history import History
from gateway.realtime.stream import Stream
from orchestrator.database import UNAVAILABLE
from orchestrator.database import Connection as Sql

log = structlog.get_logger("gateway.sse")

# Milliseconds that a browser waits before it comes back: drawn, so that those of one gateway do not come together.
_RETRY = (1000, 5000)
# From here on a close code says: do not come back.
_FINAL = 4500

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    # nginx would keep events back until its buffer is full.
    "X-Accel-Buffering": "no",
    # What follows has no length: it ends with the connection.
    "Connection": "close",
}
_OFFSET = re.compile(rb',"offset":([0-9]+)\}\Z')
_CONNECTED = b'{"event_type":"connected"'
_NEWLINES = bytes.maketrans(b"\r\n", b"  ")
_HEARTBEAT = b":\n\n"


class Encoder:
    """Turns WebSocket frames into server-sent events: what it was given last, once."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._last: tuple[bytes, bytes] = (b"", b"")

    def encode(self, framed: bytes) -> bytes:
        """The events of whole text frames. Pings are comments."""
        last, encoded = self._last
        if framed is not last:
            encoded = b"".join(
                self._event(payload) if first == frames.TEXT else _HEARTBEAT
                for first, payload in protocol.frames_of(framed)
            )
            self._last = framed, encoded
        return encoded

    def _event(self, payload: bytes) -> bytes:
        if b"\n" in payload or b"\r" in payload:
            # Where JSON may have them, they are blanks; here they would end the line.
            payload = payload.translate(_NEWLINES)
        if found := _OFFSET.search(payload):
            return b"id: %b:%b\ndata: %b\n\n" % (self._history.epoch.encode(), found[1], payload)
        if payload.startswith(_CONNECTED):
            # So that who is cut off before the first event comes back to here.
            position = orjson.loads(payload)["data"]["position"]
            return b"id: %b\ndata: %b\n\n" % (position.encode(), payload)
        return b"data: %b\n\n" % payload


@dataclass(slots=True, eq=False)
class EventConnection(Connection):
    """A connection that is written server-sent events."""

    kind: ClassVar[str] = "sse"

    encoder: Encoder = field(kw_only=True)
    # Called when its client must not come back.
    refuse: Callable[[], None] = field(kw_only=True)
    # Bytes of the last write.
    written: int = 0

    def __post_init__(self) -> None:
        # Not by `super`, which a class with slots made by `dataclass` has none of.
        Connection.__post_init__(self)
        self.send = self._take

    def _take(self, data: bytes) -> int:
        self.write(data)
        return len(data)

    def write(self, data: bytes) -> None:
        """Write on what these frames say. A close frame ends the stream."""
        if data[0] & 0x0F == frames.CLOSE:
            self._end(int.from_bytes(data[2:4], "big"))
            return
        if data == protocol.PING:
            # Nobody answers a comment. TCP does, and gives up by itself: see `upgrade.expect_life`.
            self.pong_due = None
        self._put(data)

    def _put(self, data: bytes) -> None:
        encoded = self.encoder.encode(data)
        self.written = len(encoded)
        self.transport.write(encoded)

    def _end(self, code: int) -> None:
        data = {"code": code, "reason": protocol.REASONS.get(code, ""), "reconnect": code < _FINAL}
        self._put(protocol.control("closing", self.own_channel, data))
        self.transport.close()
        if code >= _FINAL:
            self.refuse()


class EventStream(Stream):
    """The protocol of its transport. Whatever the client still sends means nothing; its end is the connection's."""

    __slots__ = ("_events",)

    def __init__(self, context: Context, connection: EventConnection) -> None:
        super().__init__(context, connection)
        self._events = connection

    def data_received(self, data: bytes) -> None:
        """Pass over it."""

    def pause_writing(self) -> None:
        """More waits to be sent than should."""
        self._events.paused = True
        self._context.hub.stalled(self._events, self._events.written)


async def handle(request: web.Request) -> web.StreamResponse:
    """Answer with the beginning of the stream, which goes on without this handler.

    Raises Problem, auth.errors or what is in `orchestrator.database.UNAVAILABLE` for one that is refused.
    """
    context = request.app[CONTEXT]
    admission.require_way_in(request)
    last_id = request.headers.get("Last-Event-ID")
    admitted = await admission.admit(request, lambda sql: _redeem(request, sql, comes_back=bool(last_id)))
    answer = upgrade.Written(headers=_HEADERS)
    try:
        await request.app.on_response_prepare.send(request, answer)
        transport, _ = upgrade.take_over(request)
    except ConnectionError:
        context.hub.leave(admitted.grant.identity.user_id)
        raise Problem(400, "The connection was lost.") from None
    except BaseException:
        context.hub.leave(admitted.grant.identity.user_id)
        raise
    settings = context.settings.realtime
    upgrade.expect_life(transport, settings.ping_interval, settings.ping_interval + settings.pong_timeout)
    transport.write(upgrade.head(answer) + f"retry: {random.randint(*_RETRY)}\n\n".encode())
    connection = EventConnection(
        transport=transport,
        encoder=context.encoder,
        refuse=lambda: _refuse(context, admitted.grant.jti),
        **admitted.fields(request),
    )
    stream = EventStream(context, connection)
    since = last_id or request.query.get("since")
    admission.begin(context, connection, stream, admitted.generation, since)
    return answer


async def _redeem(request: web.Request, sql: Sql, *, comes_back: bool) -> ShortGrant:
    tokens = request.app[CONTEXT].tokens
    if "Authorization" in request.headers:
        return await admission.grant_of_bearer(request, sql)
    token = request.query.get("token")
    if not token:
        raise Unauthenticated("A token is missing: pass ?token={short_token}, or Authorization: Bearer {main token}.")
    return await tokens.redeem_stream(sql, token, admission.address_of(request), comes_back=comes_back)


def _refuse(context: Context, jti: UUID | None) -> None:
    """Have the short token open its stream never again."""
    if jti is not None:
        task = asyncio.create_task(_end_stream(context, jti), name="end of a stream")
        context.hub.actions.add(task)
        task.add_done_callback(context.hub.actions.discard)


async def _end_stream(context: Context, jti: UUID) -> None:
    try:
        async with context.pool.acquire(timeout=context.database_timeout) as sql:
            await context.tokens.end_stream(sql, jti)
    except UNAVAILABLE as error:
        log.warning("a stream may come back that should not", error=str(error) or type(error).__name__)
