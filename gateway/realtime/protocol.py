"""The wire protocol of `/ws` without any I/O: what clients send, what we answer, as bytes. See `docs/protocol.md`.

Whatever a client sends ends in an action or in `Rejected`; nothing else is ever raised. orjson refuses lone surrogates,
wrong UTF-8 and nesting beyond 1,024 levels by itself, so every string that comes out of `parse` can be sent back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from struct import Struct
from typing import Any, NamedTuple, TypeAlias

import orjson

from orchestrator.events import MAX_NAME_LENGTH

SUBPROTOCOL = "cluster-code.v1"
# The prefix of the second subprotocol, which carries the short token out of sight of URLs and logs.
BEARER = "bearer."

# RFC 6455, section 5.2: FIN and the opcode; a server masks nothing.
_TEXT = 0x81
_CLOSE = 0x88
_PONG = 0x8A
PING = bytes((0x89, 0))
_MIDDLE = Struct(">BBH").pack
_LARGE = Struct(">BBQ").pack

_POSITION = re.compile(r"([a-z0-9]{1,32}):([0-9]{1,19})")


class CloseCode(IntEnum):
    """Why a connection ends. 4000-4499: come back, with `since`; 4500-4999: do not."""

    # RFC 6455, section 7.4.1; 1005 and 1006 are never sent.
    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    NO_STATUS = 1005
    LOST = 1006
    BAD_DATA = 1007
    DRAINING = 4001
    EXPIRED = 4005
    TOO_SLOW = 4008
    POSITION_LOST = 4010
    RECONNECT = 4011
    NO_PONG = 4012
    TOKEN_INVALID = 4500
    BAD_REQUEST = 4501
    DISCONNECTED = 4503
    CONNECTION_LIMIT = 4504
    CHANNEL_LIMIT = 4505
    PERMISSION_WITHDRAWN = 4507


REASONS: dict[int, str] = {
    CloseCode.DRAINING: "server is shutting down or draining",
    CloseCode.EXPIRED: "connection's authorisation expired",
    CloseCode.TOO_SLOW: "too slow: buffer full",
    CloseCode.POSITION_LOST: "position lost, subscribe anew",
    CloseCode.RECONNECT: "asked to reconnect",
    CloseCode.NO_PONG: "no pong",
    CloseCode.TOKEN_INVALID: "token invalid",
    CloseCode.BAD_REQUEST: "bad request",
    CloseCode.DISCONNECTED: "disconnected by an administrator",
    CloseCode.CONNECTION_LIMIT: "connection limit",
    CloseCode.CHANNEL_LIMIT: "channel limit",
    CloseCode.PERMISSION_WITHDRAWN: "permission withdrawn",
}


class Position(NamedTuple):
    """A place in one incarnation of the log; written `{epoch}:{offset}`."""

    epoch: str
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.offset}"


def parse_position(text: str) -> Position | None:
    """The position that `text` writes, or None when it writes none."""
    found = _POSITION.fullmatch(text)
    return Position(found[1], int(found[2])) if found else None


@dataclass(frozen=True, slots=True)
class Subscribe:
    """`since` is as sent: one that is no position cannot be honoured, and is answered so."""

    channel: str
    since: str | None
    id: str | None


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Stop receiving a channel."""

    channel: str
    id: str | None


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask for a `pong`: browsers cannot send WebSocket pings."""

    id: str | None


@dataclass(frozen=True, slots=True)
class Refresh:
    """Extend the connection by a new short token."""

    token: str
    id: str | None


Action: TypeAlias = Subscribe | Unsubscribe | Ping | Refresh


class Rejected(Exception):
    """A frame that is no action. `malformed`: counts towards the limit that closes the connection."""

    def __init__(self, code: str, message: str, *, malformed: bool, id: str | None = None) -> None:  # noqa: A002  The field's name on the wire.
        super().__init__(message)
        self.code = code
        self.malformed = malformed
        self.id = id


def parse(data: bytes | str) -> Action:
    """The action that a text frame holds. Raises Rejected; unknown keys are ignored."""
    try:
        frame = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise Rejected("malformed", "The frame is not JSON.", malformed=True) from None
    if not isinstance(frame, dict):
        raise Rejected("malformed", "The frame must be a JSON object.", malformed=True)
    given = frame.get("id")
    echo = given if isinstance(given, str) else None
    if given is not None and echo is None:
        raise Rejected("malformed", "'id' must be a string.", malformed=True)
    match frame.get("action"):
        case "subscribe":
            return Subscribe(_string(frame, "channel", echo), _optional(frame, "since", echo), echo)
        case "unsubscribe":
            return Unsubscribe(_string(frame, "channel", echo), echo)
        case "ping":
            return Ping(echo)
        case "refresh":
            return Refresh(_string(frame, "token", echo), echo)
        case str():
            known = "subscribe, unsubscribe, ping, refresh"
            raise Rejected("unknown_action", f"There is no such action. Known are {known}.", malformed=False, id=echo)
        case _:
            raise Rejected("malformed", "'action' must be a string.", malformed=True, id=echo)


def _string(frame: Mapping[str, Any], key: str, echo: str | None) -> str:
    value = frame.get(key)
    if not isinstance(value, str):
        raise Rejected("malformed", f"{key!r} must be a string.", malformed=True, id=echo)
    return value


def _optional(frame: Mapping[str, Any], key: str, echo: str | None) -> str | None:
    return None if frame.get(key) is None else _string(frame, key, echo)


def frame(payload: bytes) -> bytes:
    """One unmasked text frame (RFC 6455, section 5.2)."""
    return _header(_TEXT, len(payload)) + payload


def payload_of(framed: bytes) -> bytes:
    """What `frame` was given."""
    length = framed[1]
    return framed[2 if length < 126 else 4 if length == 126 else 10 :]


def frames_of(framed: bytes) -> Iterator[tuple[int, bytes]]:
    """The opcode and the payload of each frame that `frame`, `control` and the like have made, one behind the other."""
    place = 0
    while place < len(framed):
        length = framed[place + 1]
        begin = place + 2
        if length >= 126:
            begin += 2 if length == 126 else 8
            length = int.from_bytes(framed[place + 2 : begin], "big")
        yield framed[place] & 0x0F, framed[begin : begin + length]
        place = begin + length


def array_frame(payloads: Iterable[bytes]) -> bytes:
    """One text frame that holds several events, for clients that said `batch=1`."""
    return frame(b"[" + b",".join(payloads) + b"]")


def pong_frame(payload: bytes) -> bytes:
    """The answer to a WebSocket ping, whose payload (at most 125 bytes) it repeats."""
    return _header(_PONG, len(payload)) + payload


def close_frame(code: int) -> bytes:
    """The frame that begins or answers a closing handshake (RFC 6455, section 5.5.1)."""
    reason = REASONS.get(code, "").encode()
    return _header(_CLOSE, 2 + len(reason)) + code.to_bytes(2, "big") + reason


def _header(first: int, length: int) -> bytes:
    if length < 126:
        return bytes((first, length))
    if length < 1 << 16:
        return _MIDDLE(first, 126, length)
    return _LARGE(first, 127, length)


def event_frame(body: bytes, offset: int) -> bytes:
    """The frame of an envelope with its position in the log spliced in as the last key.

    Raises ValueError on what is no object.
    """
    if body[-1:] != b"}":
        body = body.rstrip()
    if body[:1] != b"{" or body[-1:] != b"}":
        raise ValueError("the body is not a JSON object")
    end = b',"offset":%d}' % offset
    return _header(_TEXT, len(body) - 1 + len(end)) + body[:-1] + end


def control(event_type: str, channel: str, data: Mapping[str, Any], echo: str | None = None) -> bytes:
    """The frame of a control message: the same envelope, without `offset`; `echo` is the `id` that the client sent."""
    if echo is not None:
        data = {**data, "id": echo}
    return frame(orjson.dumps({"event_type": event_type, "channel": channel, "data": data}))


def error(channel: str, code: str, message: str, *, temporary: bool = False, echo: str | None = None) -> bytes:
    """The frame of an `error`. `temporary`: the same request may succeed later."""
    return control("error", channel, {"code": code, "message": message, "temporary": temporary}, echo)


def timestamp(seconds: float | None) -> str | None:
    """Unix seconds as the protocol writes them: UTC, whole seconds (rounded down), `Z`."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_name(channel: str) -> bool:
    """Whether a channel may be named so at all."""
    return 0 < len(channel) <= MAX_NAME_LENGTH
