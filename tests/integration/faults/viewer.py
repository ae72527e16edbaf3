"""Clients of `/ws` by the thousand, written from docs/protocol.md alone, and what proves that they missed nothing.

One viewer is one browser: it keeps its position, comes back at whichever gateway there is, and notes what it got. A
connection costs a socket and a protocol, so that one test can have thousands. Every event has `data.n`, its number on
its channel, from 1 on, and `data.t`, the time it was published at.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any
from urllib.parse import quote

import orjson

# Seconds: a machine that is busy with other tests is slow, not broken.
PATIENCE = 60.0
# Codes of 4500 and more say: do not come back.
FINAL = 4500
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class Refused(Exception):
    """The handshake was answered with an HTTP status that is not 101; 0: not at all."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the handshake was answered {status}")
        self.status = status


@dataclass(slots=True)
class Segment:
    """What one channel brought without a break: the events after the offset `start`, as (offset, number)."""

    epoch: str
    start: int
    events: list[tuple[int, int]] = field(default_factory=list)


def handshake(port: int, token: str, query: str = "") -> bytes:
    """The request that opens `/ws`."""
    key = base64.b64encode(os.urandom(16)).decode()
    return (
        f"GET /ws?token={token}{query} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\n"
        f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    ).encode()


def masked(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """A frame as clients send it. The mask is zero, which is a mask like any other."""
    size = len(payload)
    if size < 126:
        length = bytes((0x80 | size,))
    elif size < 1 << 16:
        length = b"\xfe" + struct.pack(">H", size)
    else:
        length = b"\xff" + struct.pack(">Q", size)
    return bytes((0x80 * fin | opcode,)) + length + bytes(4) + payload


class Link(asyncio.Protocol):
    """One connection. `on_message` gets every envelope; `ended` is done with the close code, 1006 without one."""

    def __init__(self, on_message: Callable[[dict[str, Any]], None], request: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[int] = loop.create_future()
        self.transport: asyncio.Transport | None = None
        self._on_message = on_message
        self._request = request
        self._buffer = b""
        self._code = 1006
        self._is_open = False

    @classmethod
    async def open(cls, port: int, request: bytes, on_message: Callable[[dict[str, Any]], None]) -> Link:
        """Connect and shake hands. Raises Refused."""
        try:
            _, link = await asyncio.get_running_loop().create_connection(
                lambda: cls(on_message, request), "127.0.0.1", port
            )
        except OSError:
            raise Refused(0) from None
        try:
            await link.opened
        except BaseException:
            link.abort()
            raise
        return link

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer = data = self._buffer + data if self._buffer else data
        if not self._is_open:
            head, separator, rest = data.partition(b"\r\n\r\n")
            if not separator:
                return
            status = int(head.split(b" ", 2)[1])
            if status != 101:
                self._open(Refused(status))
                self.transport.abort()
                return
            self._is_open = True
            self._buffer = data = rest
            self._open(None)
        place, size = 0, len(data)
        while size - place >= 2:
            first, length = data[place], data[place + 1]
            start = place + 2
            if length == 126:
                start += 2
                length = int.from_bytes(data[place + 2 : start], "big") if size >= start else size
            elif length == 127:
                start += 8
                length = int.from_bytes(data[place + 2 : start], "big") if size >= start else size
            if size < start + length:
                break
            place = start + length
            self._take(first & 15, data[start:place])
        self._buffer = data[place:]

    def connection_lost(self, _: Exception | None) -> None:
        self._open(Refused(0))
        if not self.ended.done():
            self.ended.set_result(self._code)

    def send(self, message: dict[str, Any]) -> None:
        """Send an action."""
        self.transport.write(masked(TEXT, orjson.dumps(message)))

    def abort(self) -> None:
        """Cut the connection, without a word. What lies unread is lost."""
        self._on_message = lambda _: None
        if self.transport is not None:
            self.transport.abort()

    def _open(self, failure: Refused | None) -> None:
        if not self.opened.done():
            if failure is None:
                self.opened.set_result(None)
            else:
                self.opened.set_exception(failure)

    def _take(self, opcode: int, payload: bytes) -> None:
        if opcode == TEXT:
            read = orjson.loads(payload)
            for message in read if isinstance(read, list) else [read]:
                self._on_message(message)
        elif opcode == PING:
            self.transport.write(masked(PONG, payload))
        elif opcode == CLOSE:
            self._code = int.from_bytes(payload[:2], "big") if payload else 1005
            self.transport.write(masked(CLOSE, payload[:2]))
            self.transport.close()


class Viewer:
    """One client, through any number of connections.

    `ports` gives the gateways to choose from, `token` a new short token. `segments` are what each channel brought; a
    new one begins with each `recovered: false`.
    """

    def __init__(
        self,
        ports: Callable[[], Sequence[int]],
        token: Callable[[], str],
        channels: Iterable[str],
        *,
        batch: bool = False,
        cap: float = 1.0,
    ) -> None:
        self.segments: dict[str, list[Segment]] = {}
        self.position = ""
        self.connections = 0
        self.losses = 0
        self.codes: Counter[int] = Counter()
        self.refusals: Counter[int] = Counter()
        self.errors: list[dict[str, Any]] = []
        # Events of others than the tests.
        self.others: list[dict[str, Any]] = []
        # How often it was told that something may be missing.
        self.unrecovered = 0
        # (when it came, seconds since it was published) of events that came live.
        self.latencies: list[tuple[float, float]] | None = None
        self.final: int | None = None
        self.connected = asyncio.Event()
        # Channels to come back with; and those whose replay is not complete, with where each goes on.
        self.channels = list(channels)
        self.replaying: dict[str, str] = {}
        # Where a channel was left.
        self.left: dict[str, str] = {}
        self._leaving: set[str] = set()
        self._ports = ports
        self._token = token
        self._batch = batch
        self._cap = cap
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None
        self._turn = random.randrange(1 << 16)
        self._changed = asyncio.Event()
        self._live_from = 0.0

    def start(self) -> None:
        """Connect, and come back whenever the connection is lost, until `stop`."""
        self._task = asyncio.create_task(self._run(), name="viewer")

    async def stop(self) -> None:
        """End, by cutting what is there."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def cut(self) -> None:
        """Lose the connection, and what was not read."""
        if self._link is not None:
            self._link.abort()

    def subscribe(self, channel: str) -> None:
        """Ask for a channel, from where it was left, if it was."""
        if self._link is None or not self.connected.is_set() or channel in self.channels:
            return
        since = self.left.pop(channel, None)
        if since is None:
            # What comes from now on; its replay begins at what is known to be before.
            since = self.position
            self._begin(channel, since)
        self.channels.append(channel)
        self.replaying[channel] = since
        self._link.send({"action": "subscribe", "channel": channel, "since": since})

    def unsubscribe(self, channel: str) -> None:
        """Leave a channel; the place is kept."""
        if self._link is None or not self.connected.is_set() or channel not in self.channels:
            return
        if channel not in self.replaying and channel not in self._leaving:
            self._leaving.add(channel)
            self._link.send({"action": "unsubscribe", "channel": channel})

    def last(self, channel: str) -> int:
        """The number of the last event there; 0 before the first."""
        segments = self.segments.get(channel)
        return segments[-1].events[-1][1] if segments and segments[-1].events else 0

    async def until(self, condition: Callable[[], object], within: float = PATIENCE) -> None:
        """Return once a condition on what has come holds."""
        async with asyncio.timeout(within):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def _run(self) -> None:
        failures = 0
        while self.final is None:
            try:
                code = await self._connection()
            except Refused as refused:
                self.refusals[refused.status] += 1
            else:
                if self.connected.is_set():
                    failures = 0
                self.codes[code] += 1
                self.losses += 1
                if code >= FINAL:
                    self.final = code
                    self._changed.set()
                    return
            finally:
                self.connected.clear()
                self._leaving.clear()
                self._changed.set()
            # As the protocol asks, only faster.
            await asyncio.sleep(random.uniform(0, min(self._cap, 0.05 * 2**failures)))
            failures = min(failures + 1, 10)

    async def _connection(self) -> int:
        settled = [channel for channel in self.channels if channel not in self.replaying]
        query = f"&channels={quote(','.join(settled))}" if settled else ""
        if self.position:
            query += f"&since={self.position}"
        if self._batch:
            query += "&batch=1"
        ports = self._ports()
        if not ports:
            raise Refused(0)
        self._turn += 1
        port = ports[self._turn % len(ports)]
        async with asyncio.timeout(PATIENCE):
            self._link = link = await Link.open(port, handshake(port, self._token(), query), self._note)
        try:
            return await link.ended
        finally:
            link.abort()
            # Until then the socket is open.
            await asyncio.wait([link.ended])
            self._link = None

    def _note(self, message: dict[str, Any]) -> None:
        channel, data = message["channel"], message["data"]
        offset = message.get("offset")
        if offset is None:
            self._control(message["event_type"], channel, data)
        elif "n" not in data:
            self.others.append(message)
            if channel not in self.replaying:
                self.position = f"{self.position.split(':')[0]}:{offset}"
        else:
            segment = self.segments[channel][-1]
            segment.events.append((offset, data["n"]))
            if channel in self.replaying:
                self.replaying[channel] = f"{segment.epoch}:{offset}"
            else:
                self.position = f"{segment.epoch}:{offset}"
                if self.latencies is not None and data["t"] >= self._live_from:
                    now = monotonic()
                    self.latencies.append((now, now - data["t"]))
        self._changed.set()

    def _control(self, event_type: str, channel: str, data: dict[str, Any]) -> None:
        if event_type == "connected":
            settled = [name for name in self.channels if name not in self.replaying]
            self.unrecovered += not data["recovered"]
            for name in settled:
                if not data["recovered"] or name not in self.segments:
                    self._begin(name, data["position"])
            self.position = data["position"]
            self.connections += 1
            self._live_from = monotonic()
            self.connected.set()
            for name, since in self.replaying.items():
                self._link.send({"action": "subscribe", "channel": name, "since": since})
        elif event_type == "subscribed":
            self.unrecovered += not data["recovered"]
            if self.replaying.pop(channel, None) is not None and not data["recovered"]:
                self._begin(channel, data["position"])
            self.position = data["position"]
        elif event_type == "unsubscribed":
            self._leaving.discard(channel)
            if channel in self.channels:
                self.channels.remove(channel)
                self.left[channel] = self.position
        elif event_type == "error":
            self.errors.append(data)

    def _begin(self, channel: str, position: str) -> None:
        epoch, offset = position.split(":")
        self.segments.setdefault(channel, []).append(Segment(epoch, int(offset)))


def prove(viewers: Iterable[Viewer], sent: dict[str, int]) -> int:
    """Fail unless each viewer has each event of its channels exactly once and in order, or was told that it has not.

    `sent` is the number of the last event of each channel. Within a segment the numbers have no gap; a segment holds
    all that any viewer saw after its beginning; the first of a channel begins with the event that followed the
    subscription; the last reaches the last event. Returns how many events were counted.
    """
    viewers = list(viewers)
    known: dict[tuple[str, str], dict[int, int]] = {}
    for viewer in viewers:
        for channel, segments in viewer.segments.items():
            for segment in segments:
                there = known.setdefault((segment.epoch, channel), {})
                for offset, number in segment.events:
                    # An offset means the same to all gateways.
                    assert there.setdefault(offset, number) == number, (channel, offset, number)
    counted = 0
    orders = {key: sorted(there.items()) for key, there in known.items()}
    for viewer in viewers:
        assert viewer.final is None, viewer.final
        for channel, segments in viewer.segments.items():
            for segment in segments:
                _prove(channel, segment, orders.get((segment.epoch, channel), []))
                counted += len(segment.events)
            if channel in viewer.channels and channel in sent:
                assert viewer.last(channel) == sent[channel], (channel, viewer.last(channel), sent[channel])
    return counted


def _prove(channel: str, segment: Segment, order: list[tuple[int, int]]) -> None:
    got = segment.events
    for (before, one), (after, next_one) in itertools.pairwise(got):
        assert after > before, (channel, before, after)
        assert next_one == one + 1, (channel, f"{next_one} follows {one}", before, after)
    if got:
        first = next(each for each in order if each[0] > segment.start)
        assert got[0] == first, (channel, f"begins with {got[0]}, not {first}", segment.start)


def p99(latencies: Iterable[tuple[float, float]], since: float = 0.0) -> float:
    """Seconds within which 99 of 100 events came, of those that came after `since`. Fails when there are none."""
    seconds = sorted(latency for at, latency in latencies if at >= since)
    assert seconds, "nothing was measured"
    return seconds[len(seconds) * 99 // 100]
