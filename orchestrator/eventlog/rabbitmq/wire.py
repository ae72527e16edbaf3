"""AMQP 0-9-1 frames as they come and go, past aiormq where it would cost too much.

aiormq opens connections, keeps them alive, and declares; but it takes 60 µs for each message read (a task a delivery,
whose order is lost) and more for each published. So the messages of one channel go by here: `Wire` is the stream that
aiormq reads, takes the content frames out of it and leaves the rest; what is written goes to the transport in whole
frames. The frames are those of the AMQP 0-9-1 specification, chapters 2.3 and 4.2.
"""

from __future__ import annotations

import asyncio
from struct import Struct
from typing import Any, NamedTuple

import aiormq
from pamqp import commands, encode, frame

# The largest body that is taken; of a larger one the beginning is kept, for whoever looks at dead letters.
MAX_BODY = 1 << 20
_KEPT_OF_LARGER = 64 << 10

_FRAME = Struct(">BHL")
_METHOD = Struct(">L")
_DELIVER, _RETURN, _ACK, _NACK, _CANCEL = 0x3C003C, 0x3C0032, 0x3C0050, 0x3C0078, 0x3C001E
_EXCHANGE_OK, _CHANNEL_CLOSE = 0x28000B, 0x140028
_CONNECTION_CLOSE, _BLOCKED, _UNBLOCKED = 0x0A0032, 0x0A003C, 0x0A003D
_HEARTBEAT = bytes((8, 0, 0, 0, 0, 0, 0, 0xCE))
# Properties of what we publish: content type, headers, delivery mode, message id.
_FLAGS = 0x8000 | 0x2000 | 0x1000 | 0x0080
_OFFSET_KEY = b"\x0fx-stream-offsetl"
# Bytes of a header's value, by its kind; those of other kinds begin with their length.
_SIZES = {b"V": 0, b"D": 5} | dict.fromkeys((b"t", b"b", b"B"), 1) | dict.fromkeys((b"s", b"u", b"U"), 2)
_SIZES |= dict.fromkeys((b"I", b"i", b"f"), 4) | dict.fromkeys((b"l", b"L", b"d", b"T"), 8)
_U16, _U32, _U64, _I64 = Struct(">H"), Struct(">L"), Struct(">Q"), Struct(">q")
_HEADER = Struct(">HHQ")


class Lost(Exception):
    """The connection or its channel is gone, for the reason given; `code` is AMQP's, 0 where there is none."""

    def __init__(self, reason: str, code: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


class Incoming(NamedTuple):
    """A message as it came: `properties` are those of its content header, not yet looked at; `size` is its body's."""

    tag: int
    routing_key: str
    properties: bytes
    body: bytes
    size: int


class Properties(NamedTuple):
    """What matters of a message's properties; `offset` is the stream's, -1 outside a stream."""

    encoding: str
    offset: int
    message_id: str


class Taker:
    """Who takes the messages of a channel. Nothing here may raise or block: the loop is reading."""

    def delivered(self, deliveries: list[Incoming]) -> None:
        """Messages of a consumer, in order."""

    def returned(self, message_id: str) -> None:
        """A mandatory message that no queue took."""

    def confirmed(self, tag: int, *, multiple: bool, taken: bool) -> None:
        """The broker has a message, and all before it if `multiple`; or, not `taken`, could not keep it."""

    def checked(self) -> bool:
        """An exchange exists; whether it was the taker that asked."""
        return False

    def unblocked(self) -> None:
        """The broker takes messages again."""

    def cancelled(self) -> None:
        """The broker has ended the consumer: its queue is gone, or has moved."""

    def lost(self, error: Lost) -> None:
        """Nothing more comes. Told once."""


class Lane:
    """The messages of one channel, put together from their frames, on their way to its taker."""

    __slots__ = ("_kept", "_lost", "_method", "_missing", "_parts", "_properties", "_size", "taker")

    def __init__(self, taker: Taker) -> None:
        self.taker = taker
        self._lost = False
        # The message whose frames are coming: its method's payload, its properties, its body's parts and what lacks.
        self._method = b""
        self._properties = b""
        self._parts: list[bytes] = []
        self._size = 0
        self._kept = 0
        self._missing = 0

    def lose(self, error: Lost) -> None:
        """Tell the taker, once, that nothing more comes."""
        if not self._lost:
            self._lost = True
            self.taker.lost(error)

    def takes(self, kind: int, payload: bytes, deliveries: list[Incoming]) -> bool:
        """Whether a frame of this channel is the taker's, and not aiormq's. A whole message goes to `deliveries`."""
        if kind == 1:
            return self._takes_method(payload)
        if not self._method:
            return False
        if kind == 2:
            _, _, self._size = _HEADER.unpack_from(payload)
            self._properties = payload[12:]
            self._missing = self._size
            self._kept = self._size if self._size <= MAX_BODY else _KEPT_OF_LARGER
        else:
            if self._kept > 0:
                self._parts.append(payload[: self._kept])
                self._kept -= len(payload)
            self._missing -= len(payload)
        if self._missing <= 0:
            self._whole(deliveries)
        return True

    def _takes_method(self, payload: bytes) -> bool:
        (method,) = _METHOD.unpack_from(payload)
        if method in (_DELIVER, _RETURN):
            self._method = payload
            return True
        if method in (_ACK, _NACK):
            (tag,) = _U64.unpack_from(payload, 4)
            self.taker.confirmed(tag, multiple=bool(payload[12] & 1), taken=method == _ACK)
            return True
        if method == _EXCHANGE_OK:
            return self.taker.checked()
        if method == _CANCEL:
            self.taker.cancelled()
        elif method == _CHANNEL_CLOSE:
            self.lose(_closed(payload))
        return False

    def _whole(self, deliveries: list[Incoming]) -> None:
        method, self._method = self._method, b""
        parts, self._parts = self._parts, []
        if _METHOD.unpack_from(method)[0] == _RETURN:
            self.taker.returned(properties(self._properties).message_id)
            return
        # Consumer tag, delivery tag, redelivered, exchange, routing key.
        at = 5 + method[4]
        (tag,) = _U64.unpack_from(method, at)
        at += 9
        at += 1 + method[at]
        key = method[at + 1 : at + 1 + method[at]].decode(errors="replace")
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        deliveries.append(Incoming(tag, key, self._properties, body, self._size))


class Wire(asyncio.StreamReader):
    """The bytes of one connection on their way to aiormq; what belongs to the channels in `lanes` leaves them here."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.lanes: dict[int, Lane] = {}
        self.transport: asyncio.Transport
        # Why the broker takes no messages; empty: it takes them.
        self.blocked = ""
        # What the broker said when it closed the connection; how the connection was lost.
        self.closed: Lost | None = None
        self.gone: Lost | None = None
        # The deadlines of those who wait for an answer: they end when none can come.
        self.deadlines: set[asyncio.Timeout] = set()
        # When something was last heard, by the loop's clock.
        self.heard = loop.time()
        self._clock = loop.time
        self._told = 0.0
        self._rest = b""
        self._foreign = False

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        """What the transport calls with every piece that comes."""
        self.heard = self._clock()
        if self._rest:
            data = self._rest + data
        if self._foreign or data.startswith(b"AMQP"):
            # Another version of the protocol: aiormq knows what to say.
            self._foreign = True
            super().feed_data(data)
            return
        at = self._divide(data)
        self._rest = data[at:]

    def _divide(self, data: bytes) -> int:
        """Give every whole frame to whom it belongs; where the rest begins."""
        end = len(data)
        at = passed = 0
        left: list[bytes] = []
        deliveries: list[Incoming] = []
        last: Lane | None = None
        while end - at >= 8:
            kind, channel, length = _FRAME.unpack_from(data, at)
            stop = at + 8 + length
            if stop > end:
                break
            if lane := self.lanes.get(channel):
                if deliveries and lane is not last and last:
                    last.taker.delivered(deliveries)
                    deliveries = []
                last = lane
                if lane.takes(kind, data[at + 7 : stop - 1], deliveries):
                    if at > passed:
                        left.append(data[passed:at])
                    passed = stop
            elif channel == 0 and kind == 1:
                self._watch(data[at + 7 : stop - 1])
            at = stop
        if at > passed:
            left.append(data[passed:at])
        if left:
            super().feed_data(b"".join(left))
        elif self.heard - self._told > 1:
            # aiormq counts as silence what it does not see.
            self._told = self.heard
            super().feed_data(_HEARTBEAT)
        if deliveries and last:
            last.taker.delivered(deliveries)
        return at

    def feed_eof(self) -> None:
        """What the transport calls when the peer sends no more."""
        super().feed_eof()
        self.lose("the connection was closed")

    def set_exception(self, exc: Exception) -> None:
        """What the transport calls when the connection is lost."""
        super().set_exception(exc)
        self.lose(f"the connection was lost: {exc or type(exc).__name__}")

    def lose(self, reason: str) -> None:
        """Tell everybody, once, that nothing more comes; the broker's own reason goes before the one given."""
        if self.gone is None:
            self.gone = self.closed or Lost(reason)
            for lane in list(self.lanes.values()):
                lane.lose(self.gone)
            for deadline in self.deadlines:
                # One that is over already, while its task does not know yet, may not be changed.
                if not deadline.expired():
                    deadline.reschedule(self._clock())

    def _watch(self, payload: bytes) -> None:
        (method,) = _METHOD.unpack_from(payload)
        if method == _CONNECTION_CLOSE:
            self.closed = _closed(payload)
        elif method == _BLOCKED:
            self.blocked = payload[5:].decode(errors="replace") or "it is blocked"
        elif method == _UNBLOCKED:
            self.blocked = ""
            for lane in self.lanes.values():
                lane.taker.unblocked()


def _closed(payload: bytes) -> Lost:
    (code,) = _U16.unpack_from(payload, 4)
    return Lost(payload[7 : 7 + payload[6]].decode(errors="replace"), code)


def properties(raw: bytes) -> Properties:
    """Look through the properties of a content header."""
    (flags,) = _U16.unpack_from(raw)
    at = 2
    encoding = message_id = ""
    offset = -1
    if flags & 0x8000:
        at += 1 + raw[at]
    if flags & 0x4000:
        encoding = raw[at + 1 : at + 1 + raw[at]].decode(errors="replace")
        at += 1 + raw[at]
    if flags & 0x2000:
        (length,) = _U32.unpack_from(raw, at)
        offset = _offset(raw[at : at + 4 + length])
        at += 4 + length
    if flags & 0x1000:
        at += 1
    if flags & 0x0800:
        at += 1
    for flag in (0x0400, 0x0200, 0x0100):
        if flags & flag:
            at += 1 + raw[at]
    if flags & 0x0080:
        message_id = raw[at + 1 : at + 1 + raw[at]].decode(errors="replace")
    return Properties(encoding, offset, message_id)


def _offset(table: bytes) -> int:
    # Nearly always it is the only header.
    if len(table) == 29 and table.startswith(_OFFSET_KEY, 4):
        return int(_I64.unpack_from(table, 21)[0])
    # The others' headers are passed over unread: what makes no sense in them is theirs.
    at, end = 4, len(table)
    while at < end:
        key = table[at + 1 : at + 1 + table[at]]
        at += 1 + len(key)
        kind = table[at : at + 1]
        size = _SIZES.get(kind)
        if key == b"x-stream-offset" and size is not None:
            return int.from_bytes(table[at + 1 : at + 1 + size])
        at += 1 + (4 + _U32.unpack_from(table, at + 1)[0] if size is None else size)
    return -1


class Publications:
    """Writes the frames of messages to one exchange, over one channel, each persistent and mandatory."""

    def __init__(self, channel: int, exchange: str, frame_max: int) -> None:
        name = exchange.encode()
        self._channel = channel
        self._method = _METHOD.pack(0x3C0028) + b"\0\0" + bytes((len(name),)) + name
        self._part = frame_max - 8

    def frames(self, routing_key: str, message_id: str, body: bytes, headers: dict[str, Any] | None = None) -> bytes:
        """The frames of one message. A routing key is cut at AMQP's 255 bytes. Raises ValueError for too long an id."""
        channel = self._channel
        key = routing_key.encode()[:255]
        name = message_id.encode()
        method = b"%b%c%b\x01" % (self._method, len(key), key)
        table = encode.field_table(headers) if headers else b"\0\0\0\0"
        header = b"%b%b\x10application/json%b\x02%c%b" % (
            _HEADER.pack(60, 0, len(body)),
            _U16.pack(_FLAGS),
            table,
            _short(name),
            name,
        )
        frames = [
            _FRAME.pack(1, channel, len(method)),
            method,
            b"\xce",
            _FRAME.pack(2, channel, len(header)),
            header,
            b"\xce",
        ]
        for at in range(0, len(body), self._part):
            part = body[at : at + self._part]
            frames += (_FRAME.pack(3, channel, len(part)), part, b"\xce")
        return b"".join(frames)


def _short(name: bytes) -> int:
    if len(name) > 255:
        raise ValueError("the id of an event may have at most 255 bytes")
    return len(name)


def acknowledgement(channel: int, tag: int) -> bytes:
    """The frame that acknowledges this delivery and all before it."""
    return b"\x01%b\x00\x00\x00\x0d\x00\x3c\x00\x50%b\x01\xce" % (_U16.pack(channel), _U64.pack(tag))


def exchange_check(channel: int, exchange: str) -> bytes:
    """The frame that asks whether an exchange exists; the broker closes the channel (404) if it does not."""
    return frame.marshal(commands.Exchange.Declare(exchange=exchange, passive=True), channel)


class Transport(aiormq.TransportFactory):
    """Opens connections for aiormq, through a `Wire`."""

    def __init__(self) -> None:
        self.wire: Wire | None = None

    async def create(self, url: Any, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As aiormq asks for it. Raises Lost, OSError (ssl.SSLError among them)."""
        context = None
        if url.scheme == "amqps":
            try:
                context = await kwargs["ssl_context_provider"].get_context()
            except (OSError, ValueError) as error:
                raise Lost(f"a certificate or key that its URL names cannot be read: {error}") from error
        loop = asyncio.get_running_loop()
        wire = Wire(loop)
        protocol = asyncio.StreamReaderProtocol(wire, loop=loop)
        transport, _ = await loop.create_connection(lambda: protocol, url.host, url.port, ssl=context)
        wire.transport = transport
        self.wire = wire
        return wire, asyncio.StreamWriter(transport, protocol, wire, loop)
