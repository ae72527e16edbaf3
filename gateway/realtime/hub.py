"""Who listens to which channel, and the fan-out: each event is one buffer, written to every subscriber once.

Events published in one turn of the loop are joined per channel and handed over at its end. On one connection offsets
only grow, across channels too, since a client resumes from the last one it has seen: where several of its channels have
something in the same turn, they are merged. There is no task, no queue and no await for a connection in here.

No write looks whether the client keeps up: the transport says so itself, by `pause_writing`, when more than the limit
of unsent bytes waits in it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from itertools import islice
from typing import TypeAlias

import structlog

from gateway.realtime.connection import Connection
from gateway.realtime.history import Stored
from gateway.realtime.protocol import CloseCode, array_frame, close_frame, payload_of
from gateway.settings import RealtimeSettings
from orchestrator.database import Wakeup

log = structlog.get_logger("gateway.hub")

# Bytes of pending events that are not left waiting for the end of the turn, so that no burst alone makes a client slow.
_FLUSH_AT = 256 << 10
# Bytes that may wait in the transport of a connection that catches up; then its replay waits for the client.
_REPLAY_UNSENT = 64 << 10
# Seconds for the client to answer a close frame, and for unsent bytes to go, until the transport is aborted.
CLOSE_TIMEOUT = 5.0

# A channel's subscribers, and what they are to get at the end of this turn.
_Pending: TypeAlias = tuple[set[Connection], list[Stored]]


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
        # What clients have asked for and has to wait: at most one task a connection.
        self.actions: set[asyncio.Task[None]] = set()
        self._ended = Wakeup()
        self._subscribers: dict[str, set[Connection]] = {}
        # Whoever joins or leaves a channel has what is pending written before: the sets are those of the flush, too.
        self._pending: dict[str, _Pending] = {}
        self._pending_bytes = 0
        # Live connections whose transport holds more than the limit, each with the bytes that it may hold nevertheless.
        self._slow: dict[Connection, int] = {}
        # The size of the buffer that is being written.
        self._writing = 0

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
        """Let live events of all its channels flow, from now on.

        The caller has sent all that came before, and the transport has room (`connection.paused` is false). Does
        nothing for a connection that has ended.
        """
        if connection.ended:
            return
        self.flush()
        connection.live = True
        connection.transport.set_write_buffer_limits(self.settings.unsent_bytes)
        for channel in connection.channels:
            self._subscribers.setdefault(channel, set()).add(connection)

    def detach(self, connection: Connection) -> None:
        """Let no live events flow until it is attached again. What is pending goes out before."""
        if connection.live:
            self.flush()
            connection.live = False
            for channel in connection.channels:
                self._unlist(connection, channel)
            if not connection.ended:
                connection.transport.set_write_buffer_limits(_REPLAY_UNSENT)

    def subscribe(self, connection: Connection, channel: str) -> None:
        """Add a channel; when live events flow, this one's do from now on."""
        if channel not in connection.channels:
            connection.channels += (channel,)
        if connection.live:
            self.flush()
            self._subscribers.setdefault(channel, set()).add(connection)

    def unsubscribe(self, connection: Connection, channel: str) -> None:
        """Take a channel away. What is pending goes out before. Idempotent."""
        if channel in connection.channels:
            self.flush()
            self._unlist(connection, channel)
            connection.channels = tuple(name for name in connection.channels if name != channel)

    def _unlist(self, connection: Connection, channel: str) -> None:
        listed = self._subscribers.get(channel)
        if listed is not None:
            listed.discard(connection)
            if not listed:
                del self._subscribers[channel]

    def publish(self, stored: Stored) -> None:
        """Hand an event to its channel's subscribers at the end of this turn of the loop. Offsets must grow."""
        pending = self._pending.get(stored.channel)
        if pending is not None:
            pending[1].append(stored)
        else:
            listed = self._subscribers.get(stored.channel)
            if listed is None:
                return
            if not self._pending:
                asyncio.get_running_loop().call_soon(self.flush)
            self._pending[stored.channel] = (listed, [stored])
        self._pending_bytes += len(stored.frame)
        if self._pending_bytes >= _FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        """Write out what is pending. Does nothing when nothing is."""
        if not self._pending:
            return
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        if len(pending) == 1:
            ((listed, events),) = pending.values()
            self._deliver(listed, events)
        else:
            self._deliver_many(pending.values())
        if self._slow:
            self._drop_slow()

    def _deliver_many(self, pending: Collection[_Pending]) -> None:
        """Write several channels' events. Connections that get from more than one of them get those merged."""
        several: dict[Connection, list[list[Stored]]] = {}
        single = 0
        for listed, events in pending:
            for connection in listed:
                if connection.busy is None:
                    connection.busy = events
                elif connection in several:
                    several[connection].append(events)
                else:
                    several[connection] = [connection.busy, events]
        for listed, events in pending:
            theirs = [one for one in listed if one not in several] if several else listed
            if len(events) == 1:
                single += self._write(theirs, events[0].frame)
            else:
                self._deliver(theirs, events)
            for connection in listed:
                connection.busy = None
        self.deliveries += single
        self.frames += single
        groups: dict[tuple[int, ...], list[Connection]] = {}
        for connection, lists in several.items():
            groups.setdefault(tuple(map(id, lists)), []).append(connection)
        for connections in groups.values():
            lists = several[connections[0]]
            merged = sorted((stored for events in lists for stored in events), key=lambda stored: stored.offset)
            self._deliver(connections, merged)

    def _deliver(self, connections: Collection[Connection], events: list[Stored]) -> None:
        """Write the same events to each connection, in one write."""
        number = len(events)
        if number == 1:
            frames = self._write(connections, events[0].frame)
        else:
            arrays = [connection for connection in connections if connection.batch]
            if arrays:
                connections = [connection for connection in connections if not connection.batch]
                self.deliveries += len(arrays) * number
                self.frames += self._write(arrays, array_frame(payload_of(stored.frame) for stored in events))
            frames = self._write(connections, b"".join([stored.frame for stored in events])) * number
        self.deliveries += frames
        self.frames += frames

    def _write(self, connections: Collection[Connection], data: bytes) -> int:
        """Write the same bytes to each connection; how many those are. Nothing in here ends a connection."""
        self._writing = size = len(data)
        held: list[tuple[Connection, int]] | None = None
        for connection in connections:
            try:
                sent = connection.send(data)
            except OSError:
                # Full, or lost: its transport knows what to do in either case.
                sent = 0
            if sent != size:
                if held is None:
                    held = []
                held.append((connection, sent))
        if held is not None:
            for connection, sent in held:
                connection.hold(data, sent)
        number = len(connections)
        self.bytes += number * size
        return number

    def stalled(self, connection: Connection, written: int | None = None) -> None:
        """The transport holds more than it should: called from within the write that was too much.

        `written` is the size of that write where it is not the hub's own buffer. While the connection catches up, that
        is the replay's affair.
        """
        if connection.live:
            held = connection.transport.get_write_buffer_size()
            # A buffer that holds nothing older than this very write says nothing about the client's speed.
            self._slow[connection] = held if held <= (self._writing if written is None else written) else 0

    def _drop_slow(self) -> None:
        for connection, allowed in tuple(self._slow.items()):
            if not connection.paused or connection.closed is not None:
                del self._slow[connection]
            elif connection.transport.get_write_buffer_size() > allowed:
                del self._slow[connection]
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
        connection.write(buffer)
        self.deliveries += len(events)
        self.bytes += len(buffer)

    def send(self, connection: Connection, frame: bytes) -> None:
        """Write a control frame now. A client that piles up answers without reading them is dropped like a slow one."""
        if connection.ended:
            return
        self._writing = len(frame)
        connection.write(frame)
        if self._slow:
            self._drop_slow()

    def close(self, connection: Connection, code: int) -> None:
        """Begin the closing handshake and forget the connection; its transport is aborted if that takes too long."""
        if self._forget(connection, code) and not connection.transport.is_closing():
            connection.write(close_frame(code))
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
        """Note that the transport is gone. Ends what `admit` allowed, too."""
        self.drop(connection, CloseCode.LOST)
        self.lingering.pop(connection.transport, None)
        self._slow.pop(connection, None)
        self.leave(connection.user_id)
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

    def of_channel(self, channel: str) -> Collection[Connection]:
        """The connections here that a channel's events go to. Look only: it changes with them."""
        return self._subscribers.get(channel, ())

    def permissions_changed(self, user_id: int) -> None:
        """Have this user's connections looked at again."""
        self.generation += 1
        if user_id in self.by_user:
            self.recheck(user_id)

    def recheck(self, user_id: int) -> None:
        """Have the connections of one user looked at again."""
        self.changed_users.add(user_id)
        self.changes.set()

    @property
    def drain_seconds(self) -> float:
        """How long a drain takes that begins now: it grows with the connections."""
        return len(self.connections) / self.settings.drain_rate + CLOSE_TIMEOUT

    async def drain(self) -> None:
        """Refuse new connections and close all with 4001, at most `drain_rate` a second, spread evenly.

        Returns when no transport is left. Cancelling leaves the rest open. Call it before the server stops reading.
        """
        self.draining = True
        log.info("draining", connections=len(self.connections), seconds=self.drain_seconds)
        # Small steps are even enough; each at least one connection.
        step = max(1, self.settings.drain_rate // 20)
        loop = asyncio.get_running_loop()
        due = loop.time()
        while self.connections:
            for connection in list(islice(self.connections.values(), step)):
                self.close(connection, CloseCode.DRAINING)
            # What a busy machine is late by is made up for, unless it is much: then that would be a rush.
            due = max(due + step / self.settings.drain_rate, loop.time() - 1.0)
            await asyncio.sleep(max(0.0, due - loop.time()))
        deadline = asyncio.get_running_loop().time() + CLOSE_TIMEOUT
        while self.lingering and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await self._ended.wait(left)
        for transport in tuple(self.lingering):
            transport.abort()
        self.lingering.clear()
        for action in self.actions:
            action.cancel()
        if self.actions:
            await asyncio.wait(self.actions)
