"""A transport that only remembers, and the reading of what was written to it. Staged: a peer that does not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from auth.permissions import Identity
from gateway.realtime.connection import Connection
from gateway.realtime.hub import Hub
from gateway.settings import RealtimeSettings
from orchestrator.eventlog.contract import Entry
from orchestrator.events import Event

SETTINGS = RealtimeSettings()


class Wire:
    """What the hub needs of an asyncio.Transport."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.unsent = 0
        self.reads = True
        self.aborted = False
        self.closing = False
        self.limit = 64 << 10
        self.on_write: Callable[[], None] = lambda: None
        # As a stream does it: told when more waits than the limit, until it waits no more.
        self.on_pause: Callable[[], None] = lambda: None
        self.on_resume: Callable[[], None] = lambda: None
        self.on_abort: Callable[[], None] = lambda: None
        self.paused = False

    def write(self, data: bytes) -> None:
        assert not self.aborted, "written after the abort"
        self.written.append(data)
        if not self.reads:
            self.unsent += len(data)
        self._pause()
        self.on_write()

    def set_write_buffer_limits(self, high: int) -> None:
        self.limit = high
        self._pause()

    def _pause(self) -> None:
        if self.unsent > self.limit and not self.paused:
            self.paused = True
            self.on_pause()

    def read_all(self) -> None:
        """The peer reads what waits."""
        self.unsent = 0
        if self.paused:
            self.paused = False
            self.on_resume()

    def get_extra_info(self, name: str) -> None:
        """There is no socket."""

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.closing or self.aborted

    def abort(self) -> None:
        self.aborted = True
        self.on_abort()

    @property
    def frames(self) -> list[tuple[int, bytes]]:
        """Every frame written: its first byte and its payload."""
        return list(frames(b"".join(self.written)))

    @property
    def messages(self) -> list[Any]:
        """The JSON of every text frame, arrays taken apart."""
        read = [orjson.loads(payload) for first, payload in self.frames if first == 0x81]
        return [one for message in read for one in (message if isinstance(message, list) else [message])]

    @property
    def offsets(self) -> list[int]:
        return [message["offset"] for message in self.messages if "offset" in message]

    @property
    def close_code(self) -> int | None:
        codes = [int.from_bytes(payload[:2], "big") for first, payload in self.frames if first == 0x88]
        assert len(codes) <= 1
        return codes[0] if codes else None


def frames(data: bytes):
    """Take unmasked frames apart, from RFC 6455, section 5.2."""
    place = 0
    while place < len(data):
        first, length = data[place], data[place + 1]
        assert length < 128, "a server masks nothing"
        place += 2
        if length == 126:
            length = int.from_bytes(data[place : place + 2], "big")
            place += 2
        elif length == 127:
            length = int.from_bytes(data[place : place + 8], "big")
            place += 8
        yield first, data[place : place + length]
        place += length
    assert place == len(data)


class Paced(Connection):
    """A connection whose client reads when the test lets it."""

    __slots__ = ("drained",)


def connection(*channels: str, user_id: int = 7, wire: Wire | None = None, **fields: Any) -> Connection:
    """A connection on a Wire, with channels, not added to any hub."""
    drained = fields.pop("drained", None)
    one = (Paced if drained else Connection)(
        transport=wire or Wire(),  # type: ignore[arg-type]
        identity=fields.pop("identity", Identity(user_id, f"{user_id}@example.org", is_admin=False)),
        narrowed=None,
        expires_at=fields.pop("expires_at", None),
        valid_from=0.0,
        channels=channels,
        **fields,
    )
    if drained:
        one.drained = drained
    return one


def join(hub: Hub, one: Connection) -> Connection:
    """Add the connection to the hub, and have its Wire tell of unsent bytes as a stream does."""
    wire = wire_of(one)

    def pause() -> None:
        one.paused = True
        hub.stalled(one)

    wire.on_pause, wire.on_resume = pause, one.resume
    hub.admit(one.user_id)
    hub.add(one)
    return one


def wire_of(one: Connection) -> Wire:
    return one.transport  # type: ignore[return-value]


def entry(offset: int, channel: str = "session:1", *, event_id: str | None = None, **data: Any) -> Entry:
    """A log entry."""
    event = Event("test.event", channel, data)
    return Entry(offset, event_id or event.id, event.event_type, channel, event.body())
