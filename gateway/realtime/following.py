"""Output that is sent as it is written: of a session (`output`), of a deployment (`build_log`).

The table is the truth, since output is stored before it is published; events only say that it is time to look. So
nothing is lost with an event, and nothing comes twice. To everything behind it a follower is a connection like any
other, of which the hub, the sweep and the re-checks of permissions take care; one short task for each reads from the
table no faster than its client reads from the socket, and has no database connection while it waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

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
from orchestrator.database import Connection as Sql

log = structlog.get_logger("gateway.following")

# Seconds between two looks without an event: for what its writer died over before it could publish it.
_POLL = 10.0


class Progress(Enum):
    """How far a follower has come."""

    MORE = "there is more to be read"
    CAUGHT_UP = "nothing more yet"
    OVER = "nothing more ever"


@dataclass(slots=True, eq=False)
class Follower(Connection):
    """A connection that is written output. Events only wake it, and of frames it takes pings and the end."""

    kind: ClassVar[str] = "logs"
    # Why it ends when there is nothing more to come.
    complete: ClassVar[str]

    # HTTP/1.1 has a mark for the end of an answer without a length; before, it is the end of the connection.
    chunked: bool = field(kw_only=True)
    # What passes over a connection that has nothing to say.
    heartbeat: bytes = field(default=b"", kw_only=True)
    wakeup: Wakeup = field(default_factory=Wakeup, kw_only=True)

    def __post_init__(self) -> None:
        # Not by `super`, which a class with slots made by `dataclass` has none of.
        Connection.__post_init__(self)
        self.send = self._wake

    async def look(self, sql: Sql) -> Any:
        """Some of what comes after what was read, for `take`."""
        raise NotImplementedError

    def take(self, found: Any) -> Progress:
        """Write what `look` has found."""
        raise NotImplementedError

    def say_end(self, code: int, reason: str) -> bool:
        """Write why this is the end, where the client can tell that from output; whether the answer is a whole one."""
        raise NotImplementedError

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
            self.finish(code, protocol.REASONS.get(code, self.complete))
        elif data == protocol.PING:
            # Nobody answers a heartbeat. TCP does, and gives up by itself: see `upgrade.expect_life`.
            self.pong_due = None
            self.put(self.heartbeat)

    def put(self, data: bytes) -> None:
        """Send, unless there is nothing to send."""
        if data:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    def finish(self, code: int, reason: str) -> None:
        """Say why this is the end, and end."""
        if self.say_end(code, reason) and self.chunked:
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
    request: web.Request,
    grant: ShortGrant,
    generation: int,
    make: Callable[..., Follower],
    *,
    channel: str,
    content_type: str,
) -> web.StreamResponse:
    """Answer with the beginning of the stream, which goes on without the caller, who has checked the permission.

    `generation` is the hub's before that; `make` takes what a Follower has as keywords; events on `channel` wake it.
    Raises Problem: there are too many connections, or the client has gone.
    """
    context = request.app[CONTEXT]
    admission.count(context, grant.identity.user_id)
    chunked = request.version >= HttpVersion11
    answer = upgrade.Written(
        headers={
            "Content-Type": f"{content_type}; charset=utf-8",
            "Cache-Control": "no-store",
            # nginx would keep output back until its buffer is full.
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
    admitted = admission.Admission(grant, (channel,), generation)
    follower = make(transport=transport, chunked=chunked, **admitted.fields(request))
    admission.begin(context, follower, _Following(context, follower), generation, None)
    task = asyncio.create_task(_run(context, follower), name=f"follower of {channel}")
    context.hub.actions.add(task)
    task.add_done_callback(context.hub.actions.discard)
    return answer


async def _run(context: Context, follower: Follower) -> None:
    """Write output until the connection ends, or nothing more can come."""
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
            log.error("a follower failed", channels=follower.channels, exc_info=error)
            context.hub.close(follower, CloseCode.RECONNECT)


async def _read(context: Context, follower: Follower) -> bool:
    """Read some output and write what is wanted of it; whether that was all that there is."""
    async with lease(context) as sql:
        found = await follower.look(sql)
    if follower.ended:
        return True
    progress = follower.take(found)
    if progress is Progress.OVER:
        # All is sent before it is closed: then the hub waits a few seconds only.
        follower.transport.set_write_buffer_limits(0)
        await follower.drained()
        context.hub.close(follower, CloseCode.NORMAL)
    return progress is not Progress.MORE
