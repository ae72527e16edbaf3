"""What clients send, taken apart: WebSocket frames (RFC 6455) from whatever pieces the network makes of them. No I/O.

Bytes are judged in the order in which they come and as soon as they are there, so that the same stream ends in the same
code however it is cut, and a frame that is too large is refused by its header.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from gateway.realtime.protocol import CloseCode

TEXT: Final = 0x1
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA
_CONTINUATION: Final = 0x0
_BINARY: Final = 0x2
_KNOWN: Final = frozenset({_CONTINUATION, TEXT, _BINARY, CLOSE, PING, PONG})

# RFC 6455, section 5.5: the largest payload of a control frame, in bytes.
_LARGEST_CONTROL: Final = 125
_NO_MASK: Final = bytes(4)


class FrameError(Exception):
    """What the client sent is no frame that is taken; nothing after it can be read. `code` is to be sent."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Message(NamedTuple):
    """A whole text message, or a control frame. `code` is that of a close frame."""

    kind: int
    payload: bytes
    code: int = 0


class Reader:
    """One client's frames. `limit` is the size of the largest message, in bytes; a little more is ever kept."""

    __slots__ = ("_data", "_limit", "_place", "_text")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # What has come and is not read: `_data` from `_place` on.
        self._data: bytes | bytearray = b""
        self._place = 0
        # The fragments so far of a text message, or None. Joined at once: a list of empty ones would grow without end.
        self._text: bytearray | None = None

    @property
    def waiting(self) -> int:
        """Bytes that are not read yet."""
        return len(self._data) - self._place

    def feed(self, data: bytes) -> None:
        """Take what has come. Read it by `next`."""
        if self._place == len(self._data):
            self._data, self._place = data, 0
            return
        if not isinstance(self._data, bytearray):
            self._data = bytearray(self._data)
        if self._place:
            del self._data[: self._place]
            self._place = 0
        self._data += data

    def next(self) -> Message | None:
        """The next message or control frame; None when more bytes are needed.

        Raises FrameError, after which nothing more may be asked: 1002, 1007, or 4501 for what is binary or too large.
        """
        while (frame := self._frame()) is not None:
            final, opcode, payload = frame
            if opcode >= CLOSE:
                return _close(payload) if opcode == CLOSE else Message(opcode, payload)
            if self._text is not None:
                self._text += payload
                payload = b""
            elif not final:
                self._text = bytearray(payload)
            if final:
                if self._text is not None:
                    payload, self._text = bytes(self._text), None
                _require_utf8(payload)
                return Message(TEXT, payload)
        if self._place == len(self._data):
            # Nothing is kept of what is read: the connection may be idle for hours.
            self._data, self._place = b"", 0
        return None

    def _frame(self) -> tuple[bool, int, bytes] | None:
        """Whether it is final, the opcode, and the payload, unmasked."""
        data, place = self._data, self._place
        left = len(data) - place
        if left < 1:
            return None
        final, opcode = bool(data[place] & 0x80), data[place] & 0x0F
        self._check_kind(data[place], final, opcode)
        if left < 2:
            return None
        if not data[place + 1] & 0x80:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "a client must mask its frames")
        length = data[place + 1] & 0x7F
        if opcode >= CLOSE and length > _LARGEST_CONTROL:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "a control frame is too large")
        header = 2
        if length > _LARGEST_CONTROL:
            width, least = (2, 126) if length == 126 else (8, 1 << 16)
            header += width
            if left < header:
                return None
            length = int.from_bytes(data[place + 2 : place + header], "big")
            # The first bit of eight bytes must be 0; such a length would be too large in any case.
            if length < least or length >> 63:
                raise FrameError(CloseCode.PROTOCOL_ERROR, "a length is not written in its shortest form")
        if opcode < CLOSE and length + len(self._text or b"") > self._limit:
            raise FrameError(CloseCode.BAD_REQUEST, "a message is too large")
        end = header + 4 + length
        if left < end:
            return None
        mask = bytes(data[place + header : place + header + 4])
        payload = unmask(bytes(data[place + header + 4 : place + end]), mask)
        self._place = place + end
        return final, opcode, payload

    def _check_kind(self, first: int, final: bool, opcode: int) -> None:
        if first & 0x70:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "a reserved bit is set")
        if opcode not in _KNOWN:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "an unknown opcode")
        if opcode >= CLOSE:
            if not final:
                raise FrameError(CloseCode.PROTOCOL_ERROR, "a control frame is fragmented")
        elif (opcode == _CONTINUATION) == (self._text is None):
            raise FrameError(CloseCode.PROTOCOL_ERROR, "fragments are out of order")
        elif opcode == _BINARY:
            raise FrameError(CloseCode.BAD_REQUEST, "binary frames are not taken")


def unmask(payload: bytes, mask: bytes) -> bytes:
    """The payload without its mask, or with it (RFC 6455, section 5.3): one exclusive or of two large numbers."""
    size = len(payload)
    if not size or mask == _NO_MASK:
        return payload
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")


def _require_utf8(payload: bytes) -> None:
    if payload.isascii():
        return
    try:
        payload.decode()
    except UnicodeDecodeError:
        raise FrameError(CloseCode.BAD_DATA, "text is not UTF-8") from None


def _close(payload: bytes) -> Message:
    """RFC 6455, sections 5.5.1 and 7.4."""
    if not payload:
        return Message(CLOSE, b"", CloseCode.NO_STATUS)
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not (
        3000 <= code < 5000 or (1000 <= code <= 1014 and code not in (1004, CloseCode.NO_STATUS, CloseCode.LOST))
    ):
        raise FrameError(CloseCode.PROTOCOL_ERROR, "a close frame without a code that may be sent")
    _require_utf8(payload[2:])
    return Message(CLOSE, payload[2:], code)
