"""One client after the handshake: the protocol of its transport, which reads frames and hands them on in order.

There is no task for a connection. What an action has to wait for runs in a short one; what the client sends meanwhile
waits unread, and when that is much, the transport stops reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from gateway.context import Context
from gateway.realtime import actions, frames, liveness, protocol
from gateway.realtime.connection import Connection
from gateway.realtime.frames import FrameError, Message, Reader
from gateway.realtime.protocol import CloseCode

log = structlog.get_logger("gateway.websocket")


class Stream(asyncio.Protocol):
    """Set as the protocol of a transport that is connected already; from then on it owns the reading of it."""

    __slots__ = ("_action", "_connection", "_context", "_reader", "_reading", "_unreadable")

    def __init__(self, context: Context, connection: Connection) -> None:
        self._context = context
        self._connection = connection
        self._reader = Reader(context.hub.settings.frame_bytes)
        self._action: asyncio.Task[None] | None = None
        self._reading = True
        # Nothing that still comes can mean anything: a frame could not be read, or the client has closed.
        self._unreadable = False

    def data_received(self, data: bytes) -> None:
        """Read what can be read now."""
        if self._unreadable:
            return
        self._reader.feed(data)
        if self._action is None:
            self._read()
        elif self._reading and self._reader.waiting > self._context.hub.settings.frame_bytes:
            self._reading = False
            self._connection.transport.pause_reading()

    def pause_writing(self) -> None:
        """More waits to be sent than should."""
        self._connection.paused = True
        self._context.hub.stalled(self._connection)

    def resume_writing(self) -> None:
        """What waited was sent."""
        self._connection.resume()

    def connection_lost(self, error: Exception | None) -> None:
        """The transport is gone. An action under way ends by itself: there is nobody to tell."""
        self._unreadable = True
        self._connection.lost()
        self._context.hub.end(self._connection)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this before anything else that the client asks for. None may be under way."""
        self._connection.handling = True
        self._action = asyncio.create_task(work, name="websocket action")
        self._context.hub.actions.add(self._action)
        self._action.add_done_callback(self._done)

    def _done(self, action: asyncio.Task[None]) -> None:
        self._context.hub.actions.discard(action)
        self._action = None
        self._connection.handling = False
        if not action.cancelled() and (error := action.exception()) is not None:
            self._failed(error)
        if self._unreadable:
            return
        self._read()
        if not self._reading and self._action is None:
            self._reading = True
            self._connection.transport.resume_reading()

    def _read(self) -> None:
        """Take messages until one has to wait, or there is none."""
        try:
            while self._action is None and not self._unreadable and (message := self._reader.next()) is not None:
                self._take(message)
        except FrameError as error:
            self._end(error.code)
        except Exception as error:  # noqa: BLE001  Nobody above could answer the client.
            self._failed(error)

    def _take(self, message: Message) -> None:
        hub, connection = self._context.hub, self._connection
        if message.kind == frames.CLOSE:
            self._answer_close(message.code)
        elif connection.closed is not None:
            # Only its close frame is waited for.
            return
        elif message.kind == frames.TEXT:
            if (work := actions.handle(self._context, connection, message.payload)) is not None:
                self.begin(work)
        elif message.kind == frames.PING:
            hub.send(connection, protocol.pong_frame(message.payload))
        else:
            liveness.ponged(connection)

    def _answer_close(self, code: int) -> None:
        """End the closing handshake that the client has begun, or that we have."""
        hub, connection = self._context.hub, self._connection
        self._unreadable = True
        if connection.closed is None:
            # Codes are the client's to choose; only these are told apart, so that it cannot fill our counters.
            hub.drop(connection, code if code in (CloseCode.NORMAL, CloseCode.GOING_AWAY) else CloseCode.NO_STATUS)
            connection.write(protocol.close_frame(CloseCode.NORMAL))
        # The transport sends what waits in it before it closes, for as long as the peer likes: that has an end.
        hub.linger(connection)
        connection.transport.close()

    def _end(self, code: int) -> None:
        """Nothing more can be read: say so, and that nothing more comes from here.

        The transport stays open until the client closes it: closed over unread bytes, it would be reset, and the close
        frame be lost.
        """
        self._unreadable = True
        self._context.hub.close(self._connection, code)
        if self._connection.transport.can_write_eof() and not self._connection.transport.is_closing():
            self._connection.transport.write_eof()

    def _failed(self, error: BaseException) -> None:
        """Something of ours is wrong. The client comes back, and loses nothing."""
        connection = self._connection
        log.error("a connection failed", connection_id=connection.id, user_id=connection.user_id, exc_info=error)
        self._context.hub.close(connection, CloseCode.RECONNECT)
