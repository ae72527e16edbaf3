"""Another way to an engine's socket, which can be cut."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path


class Forwarding:
    """Takes connections and passes what comes to and from the Unix socket `target`."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        """Break all connections; new ones are taken."""
        for writer in self._writers:
            writer.transport.abort()

    async def taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until one side ends it."""
        far_reader, far_writer = await asyncio.open_unix_connection(self._target)
        for pair in ((reader, far_writer), (far_reader, writer)):
            self._writers.add(pair[1])
            task = asyncio.create_task(self._pump(*pair))
            self._tasks.add(task)

    async def close(self) -> None:
        """End all."""
        self.cut()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@asynccontextmanager
async def over_socket(target: str, path: Path) -> AsyncIterator[tuple[str, Forwarding]]:
    """A host that leads to the target over a socket at `path`."""
    forwarding = Forwarding(target)
    server = await asyncio.start_unix_server(forwarding.taken, path)
    try:
        yield f"unix://{path}", forwarding
    finally:
        server.close()
        await forwarding.close()


@asynccontextmanager
async def over_tls(target: str, context: ssl.SSLContext) -> AsyncIterator[str]:
    """A host that leads to the target over TLS."""
    forwarding = Forwarding(target)
    server = await asyncio.start_server(forwarding.taken, "127.0.0.1", 0, ssl=context)
    try:
        yield "tcp://{}:{}".format(*server.sockets[0].getsockname())
    finally:
        server.close()
        await forwarding.close()
