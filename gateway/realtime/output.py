"""A session's output as it is written: `GET /api/v1/sessions/{id}/logs?follow=true`.

The table is the truth, since a line is stored before it is published; the session's events only say that it is time to
look. So nothing is lost with an event, and nothing comes twice. To everything behind it a follower is a connection like
any other, of which the hub, the sweep and the re-checks of permissions take care; one short task for each reads from
the table no faster than its client reads from the socket, and has no database connection while it waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

import orjson
import structlog
from aiohttp import HttpVersion11, web

from auth.tokens import ShortGrant
from gateway.context import CONTEXT, Context
from gateway.operation import lease
from gateway.problems import Problem
from gateway.realtime import admission, frames, protocol, upgrade
from gateway.realtime.connection import Connection
from gateway.realtime.protocol import CloseCode
from gateway.realtime.stream import Stream
from orchestrator.database import UNAVAILABLE, Wakeup, backoff
from orchestrator.events import session_channel
from orchestrator.sessions import store
from orchestrator.sessions.record import moment
from orchestrator.sessions.state import Status

log = structlog.get_logger("gateway.output")

# Lines read at once: at most 1.6 MB, mostly some 20 KB.
_BATCH = 200
# Seconds between two looks without an event: for lines whose writer died before it could publish them.
_POLL = 10.0
_MISSING = "Lines are missing here: they were dropped before they could be read."
_DELETED = "session deleted"
# From here on a close code says: do not come back.
_FINAL = 4500

Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """How lines are written. `heartbeat`: what passes over a connection that has nothing to say."""

    content_type: str
    line: Callable[[Item], bytes]
    heartbeat: bytes

    def render(self, items: Iterable[Item]) -> bytes:
        """Lines as they are sent."""
        return b"".join(map(self.line, items))


def _as_text(item: Item) -> bytes:
    return f"{moment(item['at'])} {item['service'] or item['stream']} | {item['line']}\n".encode()


JSON_LINES = Format(
    "application/x-ndjson",
    lambda item: orjson.dumps(item, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE),
    b"\n",
)
# People would see a heartbeat; here the kernel's own must do.
TEXT = Format("text/plain", _as_text, b"")


def format_for(accept: str) -> Format:
    """What a client with this `Accept` gets: text when it names that, and no kind of JSON before it."""
    for name in (media.partition(";")[0].strip().lower() for media in accept.split(",")):
        if name == TEXT.content_type:
            return TEXT
        if "json" in name:
            break
    return JSON_LINES


def item_of(record: store.LogRecord) -> Item:
    """A line as REST answers it."""
    return {
        "id": record.id,
        "at": record.at,
        "service": record.service,
        "stream": record.stream,
        "line": record.line,
    }


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be followed: a session's lines after the id `after`, of one service or all, from a moment on or ever.

    `resumed`: the client has read the line `after`, so that whatever was pruned behind it is missing.
    """

    session_id: int
    after: int
    service: str | None
    since: datetime | None
    resumed: bool


@dataclass(slots=True, eq=False)
class Follower(Connection):
    """A connection that is written a session's lines. Events only wake it, and of frames it takes pings and the end."""

    kind: ClassVar[str] = "logs"

    wish: Wish = field(kw_only=True)
    format: Format = field(kw_only=True)
    # HTTP/1.1 has a mark for the end of an answer without a length; before, it is the end of the connection.
    chunked: bool = field(kw_only=True)
    wakeup: Wakeup = field(default_factory=Wakeup, kw_only=True)
    # The last line read, whether or not it was wanted.
    after: int = field(init=False)

    def __post_init__(self) -> None:
        # Not by `super`, which a class with slots made by `dataclass` has none of.
        Connection.__post_init__(self)
        self.after = self.wish.after
        self.send = self._wake

    def _wake(self, data: bytes) -> int:
        self.wakeup.set()
        return len(data)

    def write(self, data: bytes) -> None:
        """Take a frame of the hub's."""
        if data[0] & 0x0F == frames.CLOSE:
            code = int.from_bytes(data[2:4], "big")
            if code == CloseCode.POSITION_LOST:
                # That of events, which nobody here has.
                code = CloseCode.RECONNECT
            self.finish(code, protocol.REASONS.get(code, _DELETED))
        elif data == protocol.PING:
            # Nobody answers a heartbeat. TCP does, and gives up by itself: see `upgrade.expect_life`.
            self.pong_due = None
            self.put(self.format.heartbeat)

    def put(self, data: bytes) -> None:
        """Send, unless there is nothing to send."""
        if data:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    def tell(self, line: str, **more: Any) -> None:
        """A line of ours. Its id is the last that was read, so that a client resumes from whichever it saw last."""
        item = {"id": self.after, "at": datetime.now(UTC), "service": "", "stream": "system", "line": line}
        self.put(self.format.line(item | more))

    def finish(self, code: int, reason: str) -> None:
        """Say why this is the end, and end."""
        again = CloseCode.DRAINING <= code < _FINAL
        self.tell(f"The stream ends: {reason}.", end={"code": code, "reason": reason, "reconnect": again})
        if self.chunked:
            self.transport.write(b"0\r\n\r\n")
        self.transport.close()
        self.wakeup.set()

    def lost(self) -> None:
        """The transport is gone."""
        Connection.lost(self)
        self.wakeup.set()


class _Following(Stream):
    """The protocol of its transport. Whatever the client still sends means nothing; its end is the connection's."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """Pass over it."""

    def pause_writing(self) -> None:
        """As much waits to be sent as should: no more is read until it has gone."""
        self._connection.paused = True


async def follow(
    request: web.Request, grant: ShortGrant, generation: int, wish: Wish, form: Format
) -> web.StreamResponse:
    """Answer with the beginning of the stream, which goes on without the caller, who has checked the permission.

    `generation` is the hub's before that. Raises Problem: there are too many connections, or the client has gone.
    """
    context = request.app[CONTEXT]
    admission.count(context, grant.identity.user_id)
    chunked = request.version >= HttpVersion11
    answer = upgrade.Written(
        headers={
            "Content-Type": f"{form.content_type}; charset=utf-8",
            "Cache-Control": "no-store",
            # nginx would keep lines back until its buffer is full.
            "X-Accel-Buffering": "no",
            "Connection": "close",
            **({"Transfer-Encoding": "chunked"} if chunked else {}),
        }
    )
    try:
        await request.app.on_response_prepare.send(request, answer)
        transport, _ = upgrade.take_over(request)
    except ConnectionError:
        context.hub.leave(grant.identity.user_id)
        raise Problem(400, "The connection was lost.") from None
    except BaseException:
        context.hub.leave(grant.identity.user_id)
        raise
    settings = context.settings.realtime
    upgrade.expect_life(transport, settings.ping_interval, settings.ping_interval + settings.pong_timeout)
    transport.write(upgrade.head(answer))
    admitted = admission.Admission(grant, (session_channel(wish.session_id),), generation)
    follower = Follower(transport=transport, wish=wish, format=form, chunked=chunked, **admitted.fields(request))
    admission.begin(context, follower, _Following(context, follower), generation, None)
    task = asyncio.create_task(_run(context, follower), name="follower of a session's output")
    context.hub.actions.add(task)
    task.add_done_callback(context.hub.actions.discard)
    return answer


async def _run(context: Context, follower: Follower) -> None:
    """Write lines until the connection ends, or the session does."""
    failures = 0
    while not follower.ended:
        try:
            if await _read(context, follower):
                await follower.wakeup.wait(_POLL)
            await follower.drained()
            failures = 0
        except UNAVAILABLE as error:
            failures += 1
            log.warning("output cannot be read", error=str(error) or type(error).__name__, failures=failures)
            await follower.wakeup.wait(backoff(failures, cap=5.0))
        except Exception as error:
            log.error("a follower failed", session=follower.wish.session_id, exc_info=error)
            context.hub.close(follower, CloseCode.RECONNECT)


async def _read(context: Context, follower: Follower) -> bool:
    """Read some lines and write those that are wanted; whether these were all that there are."""
    wish = follower.wish
    async with lease(context) as connection:
        found = await store.logs_after(connection, wish.session_id, follower.after, _BATCH)
    if follower.ended:
        return True
    if found is not None and found.records:
        if not found.kept and (wish.resumed or follower.after != wish.after):
            follower.tell(_MISSING)
        follower.after = found.records[-1].id
        wanted = (record for record in found.records if _is_wanted(record, wish))
        follower.put(follower.format.render(map(item_of, wanted)))
    if found is not None and len(found.records) == _BATCH:
        return False
    if found is None or found.status == Status.DELETED:
        # All is sent before it is closed: then the hub waits a few seconds only.
        follower.transport.set_write_buffer_limits(0)
        await follower.drained()
        context.hub.close(follower, CloseCode.NORMAL)
    return True


def _is_wanted(record: store.LogRecord, wish: Wish) -> bool:
    return wish.service in (None, record.service) and (wish.since is None or record.at >= wish.since)
