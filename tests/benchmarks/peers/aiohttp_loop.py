"""aiohttp as it is, under uvloop: `send_str` to one subscriber after the other.

python -m tests.benchmarks.peers.aiohttp_loop PORT CONTROL_PORT
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

import uvloop
from aiohttp import web

from tests.benchmarks import control

_subscribers: defaultdict[str, set[web.WebSocketResponse]] = defaultdict(set)
_waiting: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()


async def _handle(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(compress=False)
    await socket.prepare(request)
    channels = request.query["channels"].split(",")
    for channel in channels:
        _subscribers[channel].add(socket)
    try:
        async for _ in socket:
            pass
    finally:
        for channel in channels:
            _subscribers[channel].discard(socket)
    return socket


async def _send() -> None:
    while True:
        channel, body = await _waiting.get()
        text = body.decode()
        for socket in tuple(_subscribers[channel]):
            try:
                await socket.send_str(text)
            except ConnectionError:
                continue


async def _main() -> None:
    port, control_port = control.ports()
    app = web.Application()
    app.router.add_get("/ws", _handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    await control.listen(control_port, lambda channel, body: _waiting.put_nowait((channel, body)))
    await _send()


if __name__ == "__main__":
    uvloop.run(_main())
