"""Who listens to which channel, and the fan-out: each event is one buffer, written to every subscriber once.

Events published in one turn of the loop are joined per channel and handed over at its end. On one connection offsets
only grow, across channels too, since a client resumes from the last one it has seen: where several of its channels have
something in the same turn, they are merged. There is no task, no queue and no await for a connection in here.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

import structlog

from gateway.realtime.connection import Connection
from gateway.realtime.history import Stored
from gateway.realtime.protocol import CloseCode, array_frame, close_frame, payload_of
from gateway.settings import RealtimeSettings
from orchestrator.database import Wakeup

log = structlog.get_logger("gateway.hub")

# Bytes of pending events that are not left waiting for the end of the turn, so that no burst alone makes a client slow.
_FLUSH_AT = 256 << 10
# Seconds for the client to answer a close frame, and for unsent bytes to go, until the transport is aborted.
CLOSE_TIMEOUT = 5.0


class Hub:
    """All connections of this process. Everything here is called from its event loop, and nothing in it blocks."""

    def __init__(self, settings: RealtimeSettings) -> None:
        self.settings = settings
        self.connections: dict[str, Connection] = {}
        # Connections and handshakes under way, by user.
        self.by_user: Counter[int] = Counter()
        self.draining = False
        # Grows with each change of permissions that the log told of; those users' connections are to be looked at.
        self.generation = 0
        self.changed_users: set[int] = set()
        self.changes = Wakeup()
        # Transports that were told to close, and the loop time at which they are aborted.
        self.lingering: dict[asyncio.Transport, float] = {}
        self._ended = Wakeup()
        self._subscribers: dict[str, set[Connection]] = {}
        self._pending: dict[str, list[Stored]] = {}
        self._pending_bytes = 0

        # For the metrics: events handed to connections, frames and bytes written for them, ends by code, resumptions.
        self.deliveries = 0
        self.frames = 0
        self.bytes = 0
        self.closes: Counter[int] = Counter()
        self.recoveries: Counter[str] = Counter()

    def admit(self, user_id: int) -> bool:
        """Count one more connection of this user, unless there are too many; give it back with `leave`."""
        if self.by_user[user_id] >= self.settings.connections_per_user:
            return False
        self.by_user[user_id] += 1
        return True

    def leave(self, user_id: int) -> None:
        """The end of what `admit` allowed."""
        self.by_user[user_id] -= 1
        if self.by_user[user_id] <= 0:
            del self.by_user[user_id]

    def add(self, connection: Connection) -> None:
        """Take a new connection in. Nothing is sent to it until `attach`."""
        self.connections[connection.id] = connection

    def attach(self, connection: Connection) -> None:
        """Let live events of all its channels flow, from now on. The caller has sent all that came before."""
        self.flush()
        connection.live = True
        for channel in connection.channels:
            self._subscribers.setdefault(channel, set()).add(connection)

    def detach(self, connection: Connection) -> None:
        """Let no live events flow until it is attached again. What is pending goes out before."""
        if connection.live:
            self.flush()
            connection.live = False
            for channel in connection.channels:
                self._unlist(connection, channel)

    def subscribe(self, connection: Connection, channel: str) -> None:
        """Add a channel; when live events flow, this one's do from now on."""
        connection.channels[channel] = None
        if connection.live:
            self.flush()
            self._subscribers.setdefault(channel, set()).add(connection)

    def unsubscribe(self, connection: Connection, channel: str) -> None:
        """Take a channel away. What is pending goes out before. Idempotent."""
        if channel in connection.channels:
            self.flush()
            self._unlist(connection, channel)
            connection.channels.pop(channel, None)

    def _unlist(self, connection: Connection, channel: str) -> None:
        listed = self._subscribers.get(channel)
        if listed is not None:
            listed.discard(connection)
            if not listed:
                del self._subscribers[channel]

    def publish(self, stored: Stored) -> None:
        """Hand an event to its channel's subscribers at the end of this turn of the loop. Offsets must grow."""
        if stored.channel not in self._subscribers:
            return
        if not self._pending:
            asyncio.get_running_loop().call_soon(self.flush)
        self._pending.setdefault(stored.channel, []).append(stored)
        self._pending_bytes += len(stored.frame)
        if self._pending_bytes >= _FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        """Write out what is pending. Does nothing when nothing is."""
        if not self._pending:
            return
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        if len(pending) == 1:
            ((channel, events),) = pending.items()
            # A copy: a write may close a connection, which then leaves the set.
            self._deliver(tuple(self._subscribers.get(channel, ())), events)
            return
        groups: dict[tuple[str, ...], list[Connection]] = {}
        for connection in self._mark(pending):
            groups.setdefault(connection.busy, []).append(connection)
            connection.busy = ()
        for channels, connections in groups.items():
            self._deliver(connections, _merge([pending[channel] for channel in channels]))

    def _mark(self, pending: Iterable[str]) -> list[Connection]:
        """The connections that have something to get, each with its busy channels noted, always in the same order."""
        marked: list[Connection] = []
        for channel in pending:
            alone = (channel,)
            for connection in self._subscribers.get(channel, ()):
                if connection.busy:
                    connection.busy += alone
                else:
                    connection.busy = alone
                    marked.append(connection)
        return marked

    def _deliver(self, connections: Iterable[Connection], events: list[Stored]) -> None:
        """Write the same events to each connection, in one write."""
        limit = self.settings.unsent_bytes
        plain = events[0].frame if len(events) == 1 else b"".join([stored.frame for stored in events])
        array: bytes | None = None
        written = frames = size = 0
        slow: list[Connection] = []
        for connection in connections:
            transport = connection.transport
            if connection.closed is not None or transport.is_closing():
                continue
            buffer = plain
            if connection.batch and len(events) > 1:
                if array is None:
                    array = array_frame(payload_of(stored.frame) for stored in events)
                buffer = array
                frames += 1
            else:
                frames += len(events)
            transport.write(buffer)
            written += 1
            size += len(buffer)
            # A buffer that holds nothing older than this very write says nothing about the client's speed.
            if limit < transport.get_write_buffer_size() > len(buffer):
                slow.append(connection)
        self.deliveries += written * len(events)
        self.frames += frames
        self.bytes += size
        for connection in slow:
            self.abort(connection)

    def replay(self, connection: Connection, events: list[Stored]) -> None:
        """Write events from history to one connection. The caller paces: the limit of unsent bytes does not apply."""
        if not events or connection.ended:
            return
        if connection.batch and len(events) > 1:
            buffer = array_frame(payload_of(stored.frame) for stored in events)
            self.frames += 1
        else:
            buffer = b"".join([stored.frame for stored in events])
            self.frames += len(events)
        connection.transport.write(buffer)
        self.deliveries += len(events)
        self.bytes += len(buffer)

    def send(self, connection: Connection, frame: bytes) -> None:
        """Write a control frame now. A client that piles up answers without reading them is dropped like a slow one."""
        if connection.ended:
            return
        connection.transport.write(frame)
        if connection.transport.get_write_buffer_size() > self.settings.unsent_bytes:
            self.abort(connection)

    def close(self, connection: Connection, code: int) -> None:
        """Begin the closing handshake and forget the connection; its transport is aborted if that takes too long."""
        if self._forget(connection, code) and not connection.transport.is_closing():
            connection.transport.write(close_frame(code))
            self.linger(connection)

    def abort(self, connection: Connection, code: int = CloseCode.TOO_SLOW) -> None:
        """End the connection without flushing: what it has not read is dropped; it resumes and loses nothing."""
        if self._forget(connection, code):
            connection.transport.abort()

    def drop(self, connection: Connection, code: int) -> None:
        """Note that the client has ended the connection. Idempotent, like `close` and `abort`: the first end counts."""
        self._forget(connection, code)

    def linger(self, connection: Connection) -> None:
        """Have the sweep abort the transport unless it is gone within CLOSE_TIMEOUT."""
        self.lingering[connection.transport] = asyncio.get_running_loop().time() + CLOSE_TIMEOUT

    def end(self, connection: Connection) -> None:
        """Note that nobody reads the connection any more; aiohttp closes its transport next."""
        self.drop(connection, CloseCode.LOST)
        if connection.transport.get_write_buffer_size() == 0:
            self.lingering.pop(connection.transport, None)
        else:
            # Closing waits for a peer that does not read as long as that likes.
            self.linger(connection)
        self._ended.set()

    def _forget(self, connection: Connection, code: int) -> bool:
        if connection.closed is not None:
            return False
        connection.closed = int(code)
        connection.live = False
        for channel in connection.channels:
            self._unlist(connection, channel)
        self.connections.pop(connection.id, None)
        self.closes[connection.closed] += 1
        return True

    def close_all(self, code: int) -> None:
        """Close every connection at once."""
        for connection in tuple(self.connections.values()):
            self.close(connection, code)

    def of_user(self, user_id: int) -> list[Connection]:
        """The connections that a user has here."""
        return [connection for connection in self.connections.values() if connection.user_id == user_id]

    def permissions_changed(self, user_id: int) -> None:
        """Have this user's connections looked at again."""
        self.generation += 1
        if user_id in self.by_user:
            self.recheck(user_id)

    def recheck(self, user_id: int) -> None:
        """Have the connections of one user looked at again."""
        self.changed_users.add(user_id)
        self.changes.set()

    async def drain(self) -> None:
        """Refuse new connections and close all with 4001, at most `drain_rate` a second, spread evenly.

        Returns when no transport is left. Cancelling leaves the rest open. Call it before the server stops reading.
        """
        self.draining = True
        log.info("draining", connections=len(self.connections))
        # Small steps are even enough; each at least one connection.
        step = max(1, self.settings.drain_rate // 20)
        while self.connections:
            for connection in tuple(self.connections.values())[:step]:
                self.close(connection, CloseCode.DRAINING)
            await asyncio.sleep(step / self.settings.drain_rate)
        deadline = asyncio.get_running_loop().time() + CLOSE_TIMEOUT
        while self.lingering and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await self._ended.wait(left)
        for transport in tuple(self.lingering):
            transport.abort()
        self.lingering.clear()


def _merge(lists: list[list[Stored]]) -> list[Stored]:
    """Several channels' events in the order of their offsets."""
    if len(lists) == 1:
        return lists[0]
    return sorted((stored for events in lists for stored in events), key=lambda stored: stored.offset)
