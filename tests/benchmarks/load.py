"""A load generator that costs little: one request, repeated on keep-alive connections, counted by whole answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic


@dataclass(slots=True)
class Tally:
    """What came back: answers counted, the first body seen, and how many answers were not 2xx."""

    answers: int = 0
    failures: int = 0
    first: bytes = b""


class _Requester(asyncio.Protocol):
    """Sends the request, waits for the whole answer, sends it again until told to stop."""

    def __init__(self, request: bytes, tally: Tally, until: float, done: asyncio.Future[None]) -> None:
        self._request = request
        self._tally = tally
        self._until = until
        self._done = done
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator or len(body) < _content_length(head):
            return
        self._buffer = b""
        self._tally.answers += 1
        self._tally.failures += not head.startswith(b"HTTP/1.1 2")
        self._tally.first = self._tally.first or head + separator + body
        if monotonic() < self._until:
            self._transport.write(self._request)
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line[:15].lower() == b"content-length:":
            return int(line[15:])
    return 0


async def load(
    port: int, method: str, path: str, *, token: str, seconds: float, connections: int = 16, body: bytes = b""
) -> Tally:
    """Repeat one request for some seconds on 127.0.0.1:`port`."""
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\n"
        + (f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if method != "GET" else "")
        + "\r\n"
    ).encode() + body
    tally = Tally()
    loop = asyncio.get_running_loop()
    until = monotonic() + seconds
    ends = [loop.create_future() for _ in range(connections)]
    for end in ends:
        await loop.create_connection(lambda end=end: _Requester(request, tally, until, end), "127.0.0.1", port)
    async with asyncio.timeout(seconds + 30):
        await asyncio.gather(*ends)
    return tally
