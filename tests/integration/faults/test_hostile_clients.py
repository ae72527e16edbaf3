"""Clients that read slowly, not at all, or send what no client should: the others do not notice, and nothing grows."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import psutil
import pytest

from tests.integration.faults.flow import Flow
from tests.integration.faults.stage import Replica, Stage, caught_up, until
from tests.integration.faults.viewer import BINARY, PING, PONG, TEXT, Viewer, handshake, masked, p99, prove

pytestmark = [pytest.mark.alone, pytest.mark.timeout(200)]

CHANNEL = "app:one"
OBSERVERS = 10
# Seconds under which a latency is never held against anybody: the machine may be busy.
FLOOR = 1.5
# Bytes by which all of this process may grow, viewers and all.
MEMORY = 96 << 20


class Raw:
    """A connection without a client behind it, past its `connected`: nothing is read or answered by itself."""

    def __init__(self, sock: socket.socket, position: str, rest: bytes) -> None:
        self.sock = sock
        self.position = position
        self.rest = rest
        self.closed_with: int | None = None

    @classmethod
    async def open(cls, stage: Stage, port: int, *, receive: int = 0) -> Raw:
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setblocking(False)
        if receive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await loop.sock_sendall(sock, handshake(port, stage.token(), f"&channels={CHANNEL}"))
        data = b""
        while True:
            head, separator, rest = data.partition(b"\r\n\r\n")
            # `connected` is longer than 125 bytes.
            if separator and len(rest) >= 4 and len(rest) >= 4 + int.from_bytes(rest[2:4], "big"):
                break
            received = await loop.sock_recv(sock, 1 << 10)
            assert received, data
            data += received
        assert head.split(b" ", 2)[1] == b"101"
        end = 4 + int.from_bytes(rest[2:4], "big")
        return cls(sock, orjson.loads(rest[4:end])["data"]["position"], rest[end:])

    async def send(self, data: bytes) -> None:
        """Send; that the other side has had enough is no error."""
        try:
            await asyncio.get_running_loop().sock_sendall(self.sock, data)
        except ConnectionError:
            return

    async def end(self) -> int:
        """Read until a close frame or the end of the connection; the code, 1006 without one."""
        loop, data = asyncio.get_running_loop(), self.rest
        try:
            while (code := close_code(data)) is None and (received := await loop.sock_recv(self.sock, 1 << 16)):
                data += received
        except ConnectionError:
            code = None
        self.sock.close()
        return code or 1006

    def comes_back(self, stage: Stage) -> Viewer:
        """As a proper client, from where it was."""
        viewer = Viewer(lambda: stage.ports, stage.token, [CHANNEL])
        viewer.position = self.position
        viewer._begin(CHANNEL, self.position)
        stage.viewers.append(viewer)
        viewer.start()
        return viewer


def close_code(data: bytes) -> int | None:
    """The code of the close frame among frames of a server; None: there is none yet."""
    place = 0
    while len(data) - place >= 4:
        length, start = data[place + 1], place + 2
        if length >= 126:
            start += 2 if length == 126 else 8
            length = int.from_bytes(data[place + 2 : start], "big")
        if data[place] & 15 == 8:
            return int.from_bytes(data[start : start + 2], "big")
        place = start + length
    return None


@asynccontextmanager
async def watched(stage: Stage, *, size: int, rate: float, **limits: object) -> AsyncIterator[Replica]:
    """A gateway with observers, whose latency is measured before the body and during it, and compared at the end.

    At the end all observers have each event, and of all others nothing is left.
    """
    async with stage.gateway(**limits) as gateway:
        observers = await stage.audience(OBSERVERS, [CHANNEL], measured=True)
        flow = Flow(await stage.log())
        async with flow.flowing([CHANNEL], rate, size=size):
            await asyncio.gather(*(viewer.until(lambda v=viewer: v.last(CHANNEL) >= 2 * rate) for viewer in observers))
            # What a start costs is not what is measured.
            undisturbed = p99(settled(observers, 0.3))
            began = asyncio.get_running_loop().time()
            memory = psutil.Process().memory_info().rss
            yield gateway
            # Each hears more after all that.
            last = max(viewer.last(CHANNEL) for viewer in observers)
            await asyncio.gather(*(viewer.until(lambda v=viewer: v.last(CHANNEL) > last) for viewer in observers))
        await caught_up(stage.viewers, flow.sent)
        prove(stage.viewers, flow.sent)
        assert all(viewer.connections == 1 for viewer in observers), "an observer was disturbed"
        disturbed = p99((pair for viewer in observers for pair in viewer.latencies), since=began)
        assert disturbed < max(2 * undisturbed, FLOOR), (undisturbed, disturbed)
        grown = psutil.Process().memory_info().rss - memory
        assert grown < MEMORY, f"{grown >> 20} MiB more"
        await until(lambda: len(gateway.context.hub.connections) == len(stage.viewers))
        await stage.leave()
        await until(lambda: not gateway.context.hub.by_user)


def settled(observers: list[Viewer], seconds: float) -> list[tuple[float, float]]:
    return [pair for viewer in observers for pair in viewer.latencies if pair[0] > viewer.latencies[0][0] + seconds]


async def test_clients_that_never_read_are_dropped_and_come_back_without_a_loss(stage: Stage) -> None:
    async with watched(stage, size=8_000, rate=200) as gateway:
        hub = gateway.context.hub
        idle = [await Raw.open(stage, gateway.port, receive=4096) for _ in range(20)]
        await until(lambda: hub.closes[4008] == len(idle))
        assert len(hub.connections) == OBSERVERS
        back = [raw.comes_back(stage) for raw in idle]
        for raw in idle:
            raw.sock.close()
        await asyncio.gather(*(viewer.connected.wait() for viewer in back))
        assert all(len(viewer.segments[CHANNEL]) == 1 for viewer in back)


async def test_clients_that_read_a_byte_a_second_are_dropped_and_come_back_without_a_loss(stage: Stage) -> None:
    async with watched(stage, size=8_000, rate=200) as gateway:
        hub = gateway.context.hub
        slow = [await Raw.open(stage, gateway.port, receive=4096) for _ in range(20)]
        readers = [asyncio.create_task(sip(raw)) for raw in slow]
        try:
            await until(lambda: hub.closes[4008] == len(slow))
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.wait(readers)
        back = [raw.comes_back(stage) for raw in slow]
        for raw in slow:
            raw.sock.close()
        await asyncio.gather(*(viewer.connected.wait() for viewer in back))
        assert all(len(viewer.segments[CHANNEL]) == 1 for viewer in back)


async def sip(raw: Raw) -> None:
    """Read a byte a second, the first at once."""
    loop = asyncio.get_running_loop()
    while await loop.sock_recv(raw.sock, 1):
        await asyncio.sleep(1.0)


async def test_a_client_that_reads_a_byte_a_second_of_its_replay_holds_little_and_is_dropped(stage: Stage) -> None:
    async with watched(stage, size=8_000, rate=200, ping_interval=1.0, pong_timeout=1.0) as gateway:
        hub = gateway.context.hub
        position = next(iter(stage.viewers)).segments[CHANNEL][0]
        since = f"&channels={CHANNEL}&since={position.epoch}:{position.start}"
        slow = []
        for _ in range(20):
            sock = socket.socket()
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", gateway.port))
            await loop.sock_sendall(sock, handshake(gateway.port, stage.token(), since))
            slow.append(sock)
        await until(lambda: hub.closes[4008] == len(slow))
        for sock in slow:
            sock.close()


def garbage(draw: random.Random) -> tuple[bytes, set[int]]:
    """What no client should send, and the codes with which it may be answered."""
    return draw.choice(
        [
            # Reserved bits or an unknown opcode, one way or another; sometimes it happens to be a frame that is bad.
            (b"\xff" + draw.randbytes(200), {1002}),
            # Not masked.
            (bytes((0x80 | TEXT, 5)) + b"hello", {1002}),
            # A frame of a gibibyte, and of more than there are bytes.
            (bytes((0x80 | TEXT, 0xFF)) + (1 << 30).to_bytes(8, "big") + bytes(4), {4501}),
            (bytes((0x80 | TEXT, 0xFF)) + b"\xff" * 8 + bytes(4), {1002, 4501}),
            (masked(TEXT, b"x" * (80 << 10)), {4501}),
            # Fragments without an end.
            (masked(TEXT, b"x" * 1000, fin=False) + masked(0, b"x" * 1000, fin=False) * 80, {4501}),
            # A continuation of nothing, and a message within a message.
            (masked(0, b"x"), {1002}),
            (masked(TEXT, b"x", fin=False) + masked(TEXT, b"x"), {1002}),
            (masked(PING, b"x" * 126), {1002}),
            (masked(PING, b"", fin=False), {1002}),
            (masked(BINARY, b"x"), {4501}),
            (masked(TEXT, b"\xff\xfe"), {1007, 1006}),
            (masked(TEXT, b"{]") * 10, {4501}),
            (masked(TEXT, b'{"action": 1}') * 10, {4501}),
        ]
    )


@pytest.mark.random
async def test_garbage_closes_its_sender_and_disturbs_nobody(stage: Stage) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    ended: Counter[int] = Counter()

    async def misbehave(port: int) -> None:
        raw = await Raw.open(stage, port)
        data, codes = garbage(draw)
        # In pieces, as networks may cut it.
        place = draw.randrange(1, len(data))
        await raw.send(data[:place])
        await asyncio.sleep(0)
        await raw.send(data[place:])
        code = await raw.end()
        assert code in codes, (code, codes, data[:20])
        ended[code] += 1

    async with watched(stage, size=100, rate=100) as gateway:
        for _ in range(6):
            await asyncio.gather(*(misbehave(gateway.port) for _ in range(30)))
    assert ended.total() == 180


async def test_half_frames_and_half_handshakes_cost_a_socket_and_nothing_else(stage: Stage) -> None:
    async with watched(stage, size=100, rate=100, ping_interval=1.0, pong_timeout=1.0) as gateway:
        hub, port, loop = gateway.context.hub, gateway.port, asyncio.get_running_loop()
        half = [await Raw.open(stage, port) for _ in range(50)]
        for raw in half:
            await raw.send(masked(TEXT, b"x" * (60 << 10))[: 50 << 10])
        shaking = []
        for _ in range(50):
            sock = socket.socket()
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", port))
            await loop.sock_sendall(sock, handshake(port, stage.token())[:100])
            shaking.append(sock)
        # Whoever does not answer pings is gone, however busy it looks.
        codes = await asyncio.gather(*(raw.end() for raw in half))
        assert set(codes) == {4012}
        assert len(hub.connections) == OBSERVERS
        for sock in shaking:
            sock.close()


async def test_pings_without_end_are_answered_or_end_their_sender(stage: Stage) -> None:
    async with watched(stage, size=100, rate=100) as gateway:
        hub, port = gateway.context.hub, gateway.port
        flood = b"".join(masked(PING, os.urandom(100)) for _ in range(200))

        async def ping(raw: Raw, *, read: bool) -> None:
            """Those who read stop at last; the others go on until they are cut off."""
            loop = asyncio.get_running_loop()
            for number in itertools.count():
                try:
                    await loop.sock_sendall(raw.sock, flood)
                    if read:
                        await loop.sock_recv(raw.sock, 1 << 20)
                except ConnectionError:
                    return
                if read and number == 100:
                    return

        readers = [await Raw.open(stage, port) for _ in range(3)]
        deaf = [await Raw.open(stage, port, receive=4096) for _ in range(3)]
        async with asyncio.timeout(60):
            await asyncio.gather(*(ping(raw, read=True) for raw in readers), *(ping(raw, read=False) for raw in deaf))
        assert hub.closes[4008] == len(deaf)
        for raw in (*readers, *deaf):
            raw.sock.close()


async def test_pongs_and_actions_without_end_disturb_nobody(stage: Stage) -> None:
    subscribe = masked(TEXT, orjson.dumps({"action": "subscribe", "channel": "app:other"}))
    unsubscribe = masked(TEXT, orjson.dumps({"action": "unsubscribe", "channel": "app:other"}))
    unknown = masked(TEXT, orjson.dumps({"action": "unknown"}))
    flood = (masked(PONG, b"x") + subscribe + unknown + unsubscribe) * 100
    async with watched(stage, size=100, rate=100) as gateway:
        raws = [await Raw.open(stage, gateway.port) for _ in range(4)]

        async def act(raw: Raw) -> None:
            loop = asyncio.get_running_loop()
            reader = asyncio.create_task(swallow(raw))
            try:
                for _ in range(20):
                    await loop.sock_sendall(raw.sock, flood)
            finally:
                reader.cancel()
                await asyncio.wait([reader])

        async with asyncio.timeout(60):
            await asyncio.gather(*(act(raw) for raw in raws))
        for raw in raws:
            raw.sock.close()


async def swallow(raw: Raw) -> None:
    while await asyncio.get_running_loop().sock_recv(raw.sock, 1 << 20):
        pass
