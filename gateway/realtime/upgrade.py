"""The seam to aiohttp: it routes and answers the handshake; then the transport is taken from it, and it forgets it.

Of aiohttp only what has no underscore is used: the request's protocol is told by its own `connection_lost` that the
connection is over, so that it cancels its timers and leaves the server's list. Nothing of it stays but the transport.
`tests/integration/realtime/test_upgrade.py` holds this for the version that is installed.
"""

from __future__ import annotations

import asyncio
import binascii
import socket
from base64 import b64decode, b64encode
from email.utils import formatdate
from hashlib import sha1

from aiohttp import HttpVersion11, web

from gateway.problems import Problem
from gateway.realtime.protocol import SUBPROTOCOL

# RFC 6455, section 1.3.
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_VERSION = "13"


class Answer(web.StreamResponse):
    """The answer to a handshake. aiohttp must end nothing after it: the connection goes on without aiohttp."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: aiohttp calls this after the handler."""


class Written(Answer):
    """An answer that aiohttp is told of, and does not write: its head is `head`."""

    async def prepare(self, request: web.BaseRequest) -> None:
        """Do nothing: it was written."""


def head(answer: web.StreamResponse) -> bytes:
    """The head of an answer with status 200, as it is sent."""
    headers = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
    return f"HTTP/1.1 200 OK\r\n{headers}Date: {formatdate(usegmt=True)}\r\n\r\n".encode()


def expect_life(transport: asyncio.Transport, interval: float, patience: float) -> None:
    """Have the kernel probe a client that is sent nothing every `interval` seconds, and give up one that acknowledges
    nothing for `patience`."""
    own = transport.get_extra_info("socket")
    if own is None or own.family not in (socket.AF_INET, socket.AF_INET6):
        return
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # tcp(7); not all of it is there on all systems.
    for name, value in (
        ("TCP_KEEPIDLE", max(1, int(interval))),
        ("TCP_KEEPINTVL", max(1, int(patience - interval))),
        ("TCP_USER_TIMEOUT", int(patience * 1000)),
    ):
        if hasattr(socket, name):
            own.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Early:
    """What aiohttp hands over of the bytes that came behind the handshake, in the way it feeds its own parser."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        """There is nobody to tell: the transport's next owner hears of it itself."""


def require_handshake(request: web.Request) -> None:
    """Raise Problem (400) unless this is a WebSocket handshake that `accept` will take (RFC 6455, section 4.2.1)."""
    headers = request.headers
    offered = headers.get("Sec-WebSocket-Protocol")
    # A token may be among the subprotocols: it must not be the one that is selected, and so sent back.
    if offered is not None and SUBPROTOCOL not in _names(offered):
        raise Problem(400, f"The subprotocols offered must begin with {SUBPROTOCOL}.")
    if (
        request.version < HttpVersion11
        or headers.get("Upgrade", "").strip().lower() != "websocket"
        or "upgrade" not in _names(headers.get("Connection", "").lower())
        or headers.get("Sec-WebSocket-Version", "").strip() != _VERSION
        or not _is_key(headers.get("Sec-WebSocket-Key", ""))
        or request.body_exists
    ):
        raise Problem(
            400,
            f"This address takes WebSocket handshakes (RFC 6455, version {_VERSION}) only.",
            headers={"Sec-WebSocket-Version": _VERSION},
        )


async def accept(request: web.Request) -> Answer:
    """Answer a handshake that `require_handshake` has passed with 101. Raises ConnectionError when the client has gone.

    Call `take_over` next, in the same turn of the loop.
    """
    key = request.headers["Sec-WebSocket-Key"].strip().encode()
    answer = Answer(
        status=101,
        headers={
            "Upgrade": "websocket",
            "Connection": "upgrade",
            "Sec-WebSocket-Accept": b64encode(sha1(key + _GUID, usedforsecurity=False).digest()).decode(),
        },
    )
    if "Sec-WebSocket-Protocol" in request.headers:
        answer.headers["Sec-WebSocket-Protocol"] = SUBPROTOCOL
    await answer.prepare(request)
    return answer


def take_over(request: web.Request) -> tuple[asyncio.Transport, bytes]:
    """Take the transport from aiohttp; set another protocol at once. Also the bytes that came behind the handshake.

    Raises ConnectionError when the client has gone.
    """
    theirs, early = request.protocol, _Early()
    transport = theirs.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client has gone during the handshake")
    theirs.set_parser(early)  # type: ignore[arg-type]
    # Without the transport, which it would close.
    theirs.transport = None
    theirs.connection_lost(None)
    return transport, early.data


def _names(header: str) -> list[str]:
    return [name.strip() for name in header.split(",")]


def _is_key(key: str) -> bool:
    try:
        return len(b64decode(key.strip(), validate=True)) == 16
    except (binascii.Error, ValueError):
        return False
