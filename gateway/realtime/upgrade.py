"""The seam to aiohttp: it makes the handshake and parses what clients send; all writing and closing is ours.

aiohttp's own `close` waits without bound on a stuck peer, and a send cancelled in its drain poisons the connection, so
neither is ever used: frames go to the transport, and the hub's sweep aborts what does not end.
"""

from __future__ import annotations

import asyncio

from aiohttp import WebSocketError, WSMessage, WSMsgType, web

from gateway.problems import Problem
from gateway.realtime.protocol import SUBPROTOCOL, CloseCode

# RFC 6455, section 7.4.1.
_MESSAGE_TOO_BIG = 1009


class FrameError(Exception):
    """What the client sent is no WebSocket frame that we take; nothing more can be read. `code` is to be sent."""

    def __init__(self, code: int) -> None:
        super().__init__(f"unreadable frame, closing with {code}")
        self.code = code


class Upgrade(web.WebSocketResponse):
    """The answer to a handshake, then the client's frames."""

    def __init__(self, *, frame_bytes: int) -> None:
        super().__init__(
            protocols=(SUBPROTOCOL,),
            # compress=True costs 105 KiB a connection.
            compress=False,
            autoping=False,
            autoclose=False,
            # aiohttp refuses a frame of this size; ours is the largest that is taken.
            max_msg_size=frame_bytes + 1,
            # orjson reads bytes, and refuses wrong UTF-8 itself.
            decode_text=False,
        )

    async def next_message(self) -> WSMessage | None:
        """The next text, binary, ping, pong or close frame; None when the connection is lost. Raises FrameError."""
        message = await self.receive()
        if message.type is WSMsgType.ERROR:
            if not isinstance(message.data, WebSocketError):
                return None
            code = message.data.code
            raise FrameError(CloseCode.BAD_REQUEST if code == _MESSAGE_TOO_BIG else code)
        return None if message.type in (WSMsgType.CLOSED, WSMsgType.CLOSING) else message

    async def drained(self) -> None:
        """Return once the transport's buffer has room again or the connection is lost."""
        try:
            if self._payload_writer is not None:
                await self._payload_writer.drain()
        except ConnectionError:
            # Lost: the caller looks at the transport, as it does anyway.
            return

    async def close(self, *, code: int = 1000, message: bytes = b"", drain: bool = True) -> bool:
        """Do nothing: aiohttp calls this on whatever ends the reading, and the hub closes."""
        return False

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: aiohttp calls this after the handler, and closes the transport by itself then."""
        self._eof_sent = True


async def accept(request: web.Request, *, frame_bytes: int) -> tuple[Upgrade, asyncio.Transport]:
    """Answer the handshake with 101. Raises Problem when it is none, ConnectionError when the client has gone."""
    upgrade = Upgrade(frame_bytes=frame_bytes)
    await upgrade.prepare(request)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has gone during the handshake")
    return upgrade, transport


def require_handshake(request: web.Request) -> None:
    """Raise Problem (400) unless this is a WebSocket handshake that `accept` will take."""
    offered = request.headers.get("Sec-WebSocket-Protocol")
    # aiohttp logs the subprotocols of which it selects none: a token may be among them.
    if offered is not None and SUBPROTOCOL not in [name.strip() for name in offered.split(",")]:
        raise Problem(400, f"The subprotocols offered must begin with {SUBPROTOCOL}.")
    if not web.WebSocketResponse(protocols=(SUBPROTOCOL,), compress=False).can_prepare(request):
        raise Problem(400, "This address takes WebSocket handshakes (RFC 6455, version 13) only.")
