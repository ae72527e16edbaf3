"""Python's `websockets`, under uvloop, with its `broadcast`.

python -m tests.benchmarks.peers.websockets_broadcast PORT CONTROL_PORT
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from urllib.parse import parse_qs, urlsplit

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve

from tests.benchmarks import control

_subscribers: defaultdict[str, set[ServerConnection]] = defaultdict(set)


async def _handle(connection: ServerConnection) -> None:
    assert connection.request is not None
    channels = parse_qs(urlsplit(connection.request.path).query)["channels"][0].split(",")
    for channel in channels:
        _subscribers[channel].add(connection)
    try:
        await connection.wait_closed()
    finally:
        for channel in channels:
            _subscribers[channel].discard(connection)


def _publish(channel: str, body: bytes) -> None:
    broadcast(_subscribers[channel], body.decode())


async def _main() -> None:
    port, control_port = control.ports()
    async with serve(_handle, "127.0.0.1", port, compression=None, ping_interval=None, backlog=4096):
        await control.listen(control_port, _publish)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_main())
