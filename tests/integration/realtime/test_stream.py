"""One connection after the handshake, over sockets, on asyncio's loop and on uvloop's: hostile and slow clients."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import uvloop

from auth.permissions import Identity
from gateway.realtime import liveness, recovery
from gateway.realtime.connection import Connection
from gateway.realtime.history import History
from gateway.realtime.hub import Hub
from gateway.realtime.stream import Stream
from gateway.settings import RealtimeSettings
from tests.unit.realtime.wire import entry, frames

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Server:
    """A listening socket whose connections are past the handshake already."""

    def __init__(self, **limits: object) -> None:
        self.hub = Hub(replace(RealtimeSettings(), **limits))
        self.history = History("e", 600, 64 << 20)
        self.streams: list[Stream] = []
        self.port = 0

    def _accept(self) -> asyncio.Protocol:
        server = self

        class Accepted(asyncio.Protocol):
            def connection_made(self, transport: asyncio.Transport) -> None:
                transport.set_protocol(server.take(transport))

        return Accepted()

    def take(self, transport: asyncio.Transport) -> Stream:
        connection = Connection(
            transport=transport,
            identity=Identity(7, "ann@example.org", is_admin=False),
            narrowed=None,
            expires_at=None,
            valid_from=0.0,
            channels=("user:7", "session:1"),
        )
        context = SimpleNamespace(hub=self.hub, history=self.history)
        stream = Stream(context, connection)
        self.streams.append(stream)
        self.hub.admit(7)
        self.hub.add(connection)
        liveness.start(self.hub, connection, asyncio.get_running_loop().time())
        recovery.connect(self.hub, self.history, connection)
        return stream

    def publish(self, number: int, size: int = 0) -> None:
        stored = self.history.append(entry(number, "session:1", text="x" * size), 0)
        assert stored is not None
        self.hub.publish(stored)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.002)

    @asynccontextmanager
    async def client(self, receive_buffer: int = 0) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        own = socket.socket()
        if receive_buffer:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        own.setblocking(False)
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=own, limit=4096)
        before = len(self.streams)
        try:
            await self.until(lambda: len(self.streams) >= max(1, before))
            yield reader, writer
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


Body = Callable[[Server], Awaitable[None]]


def served(body: Body, loop: str, **limits: object) -> None:
    """Run the body with a server on that kind of loop; nothing may be left."""

    async def main() -> None:
        server = Server(**limits)
        listening = await asyncio.get_running_loop().create_server(server._accept, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        try:
            async with asyncio.timeout(40):
                await body(server)
                await server.hub.drain()
                await server.until(lambda: not server.hub.by_user)
        finally:
            listening.close()
            await listening.wait_closed()
        assert server.hub.connections == {}
        assert server.hub._subscribers == {}
        assert server.hub._slow == {}
        assert server.hub.actions == set()
        assert len(asyncio.all_tasks()) == 1

    with asyncio.Runner(debug=False, loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


def masked(payload: bytes, first: int = 0x81) -> bytes:
    length = len(payload)
    head = bytes((first, 0x80 | length)) if length < 126 else bytes((first, 0xFE)) + length.to_bytes(2, "big")
    mask = b"\x11\x22\x33\x44"
    return head + mask + bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))


def close_code(data: bytes) -> int | None:
    codes = [int.from_bytes(payload[:2], "big") for first, payload in frames(data) if first == 0x88]
    return codes[0] if codes else None


pytestmark = pytest.mark.parametrize("loop", LOOPS)


def test_order_holds_while_the_socket_is_full_and_empties_again(loop: str) -> None:
    async def body(server: Server) -> None:
        async with server.client(receive_buffer=4096) as (reader, _):
            (stream,) = server.streams
            connection = stream._connection
            received = bytearray()
            number = 0
            for burst in range(40):
                while number < (burst + 1) * 20:
                    number += 1
                    server.publish(number, 3000)
                    if number % 7 == 0:
                        server.hub.send(connection, b"\x8a\x00")
                await asyncio.sleep(0)
                if burst % 4 == 3:
                    # Everything is read, so that the socket is written to directly again.
                    while b'"offset":%d}' % number not in received[-4000:]:
                        received += await reader.read(65536)
                    await server.until(lambda: not connection.transport.get_write_buffer_size())
            last = [int(p.rsplit(b":", 1)[1][:-1]) for f, p in frames(bytes(received)) if f == 0x81 and b"offset" in p]
            assert last == list(range(1, number + 1))
            assert [first for first, _ in frames(bytes(received))].count(0x8A) == number // 7

    served(body, loop, unsent_bytes=64 << 20)


def test_the_socket_is_open_until_its_loss_is_told_and_nobody_elses_is_written_to_after(loop: str) -> None:
    async def body(server: Server) -> None:
        numbers: list[int] = []
        async with server.client() as (_, writer):
            (stream,) = server.streams
            connection = stream._connection
            await server.until(lambda: connection._socket is not None)
            number = connection._socket.fileno()
            end = server.hub.end

            def ended(one: Connection) -> None:
                # Not closed yet: a number that was given to another connection would be written to by this one.
                os.fstat(number)
                numbers.append(number)
                end(one)

            server.hub.end = ended
            writer.transport.abort()
            server.publish(1)
            await server.until(lambda: numbers)
            server.hub.end = end
        assert connection._socket is None
        assert connection.send(b"nothing") == 7
        assert server.hub.closes == {1006: 1}

    served(body, loop)


@pytest.mark.random
def test_garbage_is_answered_by_a_close_frame_and_forgotten(loop: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)

    async def body(server: Server) -> None:
        for _ in range(60):
            async with server.client() as (reader, writer):
                writer.write(draw.choice([b"", masked(b'{"action":"ping"}')]) + draw.randbytes(draw.randint(20, 5000)))
                # Then half a frame for ever; it is the garbage's fault when that is waited for.
                writer.write_eof()
                data = await reader.read(-1) if draw.random() < 0.5 else b""
                while chunk := await reader.read(65536):
                    data += chunk
                assert close_code(data) in (None, 1000, 1002, 1007, 4501)
        await server.until(lambda: not server.hub.connections)
        assert sum(server.hub.closes.values()) == 60
        assert set(server.hub.closes) <= {1002, 1007, 4501, 1005, 1000, 1001, 1006}

    served(body, loop)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"\x81\x02{}", 1002),
        (masked(b"x", 0x83), 1002),
        (masked(b"x", 0xC1), 1002),
        (masked(b"\xff"), 1007),
        (masked(b"x", 0x01) + masked(b"y", 0x01), 1002),
        (masked(b"\xc3", 0x01) + masked(b"p", 0x89) + masked(b"(", 0x80), 1007),
        (masked(b"x", 0x82), 4501),
        (b"\x81\xff" + (1 << 20).to_bytes(8, "big"), 4501),
        (masked((999).to_bytes(2, "big"), 0x88), 1002),
        (masked((1005).to_bytes(2, "big"), 0x88), 1002),
        (masked(b"\x03", 0x88), 1002),
        (masked((1000).to_bytes(2, "big") + b"\xff", 0x88), 1007),
        (masked((4999).to_bytes(2, "big"), 0x88), 1000),
        (masked(b"", 0x88), 1000),
    ],
)
def test_the_close_frame_reaches_a_client_that_goes_on_sending(loop: str, sent: bytes, code: int) -> None:
    async def body(server: Server) -> None:
        async with server.client() as (reader, writer):
            # Who closes sends nothing more (RFC 6455, section 5.5.1); who breaks the rules may.
            behind = 0 if code == 1000 else 1000
            writer.write(sent + masked(b'{"action":"ping"}') * behind)
            data = await reader.read()
            assert close_code(data) == code

    served(body, loop)


def test_a_client_that_sends_one_byte_at_a_time_is_served(loop: str) -> None:
    async def body(server: Server) -> None:
        async with server.client() as (reader, writer):
            for byte in masked(b'{"action":"ping","id":"slow"}') + masked(b"hm", 0x89):
                writer.write(bytes([byte]))
                await asyncio.sleep(0.001)
            data = b""
            while b"hm" not in data:
                data += await reader.read(4096)
            assert [first for first, _ in frames(data)] == [0x81, 0x81, 0x8A]
            # Half a frame is no reason to end it, and costs nobody else anything.
            writer.write(masked(b"x" * 1000)[:500])
            server.publish(1)
            while b"offset" not in data:
                data += await reader.read(4096)

    served(body, loop)


def test_pings_without_end_whose_pongs_are_not_read_end_the_connection_within_its_limit(loop: str) -> None:
    async def body(server: Server) -> None:
        async with server.client(receive_buffer=4096) as (_, writer):
            (stream,) = server.streams
            many, most = masked(b"p" * 125, 0x89) * 200, 0
            with suppress(ConnectionError):
                while not server.hub.closes:
                    writer.write(many)
                    await writer.drain()
                    most = max(most, stream._connection.transport.get_write_buffer_size())
                    await asyncio.sleep(0)
            await server.until(lambda: server.hub.closes)
            assert server.hub.closes == {4008: 1}
            assert most < 1 << 20

    served(body, loop, unsent_bytes=128 << 10)


def test_pings_without_end_that_are_read_are_all_answered_in_order(loop: str) -> None:
    async def body(server: Server) -> None:
        async with server.client() as (reader, writer):
            data = bytearray()

            async def read() -> None:
                while b"19999" not in data[-2000:]:
                    data.extend(await reader.read(65536))

            reading = asyncio.create_task(read())
            for number in range(20_000):
                writer.write(masked(b"%05d" % number, 0x89))
                if number % 100 == 0:
                    await writer.drain()
            await reading
            assert [payload for first, payload in frames(bytes(data)) if first == 0x8A] == [
                b"%05d" % number for number in range(20_000)
            ]

    served(body, loop)


def test_what_comes_behind_an_action_waits_in_order_and_in_bounds(loop: str) -> None:
    async def body(server: Server) -> None:
        async with server.client() as (reader, writer):
            (stream,) = server.streams
            go = asyncio.Event()

            async def held() -> None:
                await go.wait()

            stream.begin(held())
            sent = 0

            async def flood() -> None:
                nonlocal sent
                for _ in range(2000):
                    writer.write(masked(b"%0120d" % sent, 0x89) * 16)
                    sent += 1
                    await writer.drain()

            flooding = asyncio.create_task(flood())
            await server.until(lambda: not stream._reading)
            waiting, seen = stream._reader.waiting, sent
            assert waiting <= (64 << 10) + (256 << 10)
            for _ in range(20):
                await asyncio.sleep(0.005)
            assert stream._reader.waiting == waiting
            # The kernel's buffers fill, and then the client stands still.
            assert sent < 2000 or seen == 2000
            go.set()
            data = bytearray()
            while data.count(b"\x8a\x78") < 2000 * 16:
                data.extend(await reader.read(1 << 16))
            await flooding
            numbers = [int(payload) for first, payload in frames(bytes(data)) if first == 0x8A]
            assert numbers == [number // 16 for number in range(2000 * 16)]
            assert stream._reading

    served(body, loop, unsent_bytes=64 << 20)


def test_a_client_that_never_reads_is_dropped_and_the_others_get_everything(loop: str) -> None:
    async def body(server: Server) -> None:
        async with server.client(receive_buffer=4096), server.client() as (reader, _):
            await server.until(lambda: len(server.streams) == 2)
            data, number = bytearray(), 0
            while 4008 not in server.hub.closes:
                for _ in range(20):
                    number += 1
                    server.publish(number, 5000)
                while b'"offset":%d}' % number not in data[-6000:]:
                    data.extend(await reader.read(1 << 16))
            offsets = [
                int(payload.rsplit(b":", 1)[1][:-1]) for _, payload in frames(bytes(data)) if b"offset" in payload
            ]
            assert offsets == list(range(1, number + 1))
            assert server.hub.closes == {4008: 1}

    served(body, loop, unsent_bytes=256 << 10)
