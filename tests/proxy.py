"""A TCP proxy that stages what networks do: delays, silence without an end, and cuts."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress

_CHUNK = 64 << 10


class TcpProxy:
    """Forwards connections to `host:port`, for as long as it is told to.

    - `freeze`: nothing passes any more, in either direction, and nobody is told; new connections are taken and hear
      nothing. What was sent meanwhile arrives after `resume`.
    - `cut`: every connection is reset (RST); new ones are forwarded as before.
    - `refuse`: nobody listens any more; `cut` what there is, too, if that is to end. `resume` listens again.
    - `delay`: seconds that every piece of data waits before it is passed on.

        async with TcpProxy(server.host, server.port) as proxy:
            url = server.amqp_url(vhost, port=proxy.port)
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self.port = 0
        self.delay = 0.0
        # Connections taken so far.
        self.accepted = 0
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> TcpProxy:
        await self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._unlisten()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self.cut()

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._tasks)

    def freeze(self) -> None:
        """Pass nothing more on, and say nothing."""
        self._open.clear()

    async def resume(self) -> None:
        """Pass on what waits, and listen."""
        self._open.set()
        if self._server is None:
            await self._listen()

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            if sock := writer.get_extra_info("socket"):
                # To linger for no time makes the kernel send RST.
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def refuse(self) -> None:
        """Take no new connections: who tries is refused at once."""
        await self._unlisten()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._taken, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _unlisten(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            # The sockets are closed in the loop's next round.
            await asyncio.sleep(0)

    def _taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        task = asyncio.create_task(self._forward(reader, writer), name="proxy")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = [writer]
        try:
            await self._open.wait()
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            pair.append(far_writer)
            self._writers.add(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer))
                group.create_task(self._pump(far_reader, writer))
        except* OSError:
            # One side is gone: the other is to see the same.
            pass
        finally:
            for each in pair:
                each.transport.abort()
                self._writers.discard(each)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            if self.delay:
                await asyncio.sleep(self.delay)
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        await self._open.wait()
        with suppress(OSError):
            writer.write_eof()
