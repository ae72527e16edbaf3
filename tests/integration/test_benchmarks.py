"""The tools of the benchmarks count what they say they count. What they measure is no test's business."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import orjson
import psutil
import pytest
import uvloop

from tests.benchmarks import fanout, watch
from tests.benchmarks.control import publication
from tests.benchmarks.report import Progress
from tests.benchmarks.servers import KINDS, Cores, Running, Stage, compiled, open_all

pytestmark = [
    # With CI set they run, and fail by the compiler that is not there.
    pytest.mark.skipif(
        shutil.which("cc") is None and not os.environ.get("CI"), reason="no C compiler: apt install gcc libc6-dev"
    ),
    pytest.mark.timeout(120),
]

_ANSWER = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def place(tmp_path: Path, database_url: str) -> Stage:
    return Stage(tmp_path, database_url, [], Cores(frozenset(), frozenset()))


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[int]:
    """A server that makes the handshake, then does as the script says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_ANSWER)
        await script(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def text(*numbers: int) -> bytes:
    """A frame with these events: alone as an object, several as an array."""
    events = [{"data": {"n": number, "t": time.monotonic_ns(), "fill": "x" * 150}} for number in numbers]
    payload = orjson.dumps(events[0] if len(events) == 1 else events)
    return bytes((0x81, 126)) + len(payload).to_bytes(2, "big") + payload


async def test_the_load_reads_arrays_split_frames_and_pings_and_counts_each_gap(place: Stage) -> None:
    go = asyncio.Event()
    pongs: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        split = text(4)
        writer.write(text(1) + text(2, 3) + split[:50])
        await writer.drain()
        writer.write(split[50:] + b"\x89\x02hi")
        pongs.append(await reader.readexactly(8))
        writer.write(text(6))
        await writer.drain()
        await reader.read()
        writer.close()

    async with scripted(script) as port:
        server = Running(KINDS["floor"], port, 0, psutil.Process())
        async with place.browsers(server, 1, publisher=False) as browsers:
            await open_all(browsers, 1)
            assert await browsers("listen 5 30") == {"listening": True}
            go.set()
            figures = await browsers.figures()
    assert pongs == [b"\x8a\x82\0\0\0\0hi"]
    assert (figures["deliveries"], figures["missing"], figures["sequence_errors"]) == (5, 0, 1)
    assert 0 < figures["p50"] <= figures["p99"]
    assert figures["p99"] <= figures["max"] * 1.02


async def test_the_load_tells_of_events_that_never_came(place: Stage) -> None:
    go = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        writer.write(text(1) + text(2))
        await reader.read()
        writer.close()

    async with scripted(script) as port:
        server = Running(KINDS["floor"], port, 0, psutil.Process())
        async with place.browsers(server, 1, publisher=False) as browsers:
            await open_all(browsers, 1)
            await browsers("listen 3 1")
            go.set()
            figures = await browsers.figures()
    assert (figures["deliveries"], figures["missing"], figures["sequence_errors"]) == (2, 1, 0)


async def test_the_floors_send_what_is_published_to_a_channel_to_its_listeners_only(place: Stage) -> None:
    for name in ("floor", "joining"):
        async with place.serve(KINDS[name]) as server:
            readers = [await _listener(server.port, channels) for channels in ("a", "a,b", "b")]
            _, writer = await asyncio.open_connection("127.0.0.1", server.control)
            writer.write(publication(b"a", b"one") + publication(b"b", b"y" * 200) + publication(b"a", b"two"))
            one, two, long = b"\x81\x03one", b"\x81\x03two", b"\x81\x7e\x00\xc8" + b"y" * 200
            assert await readers[0][0].readexactly(10) == one + two
            # Of different channels, the joining floor says nothing about the order.
            both = await readers[1][0].readexactly(10 + 204)
            assert both in (one + long + two, one + two + long)
            assert await readers[2][0].readexactly(204) == long
            for one_writer in (writer, *(listener for _, listener in readers)):
                one_writer.close()
                await one_writer.wait_closed()


async def _listener(port: int, channels: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /ws?channels={channels} HTTP/1.1\r\n\r\n".encode())
    assert await reader.readuntil(b"\r\n\r\n") == _ANSWER
    return reader, writer


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
async def test_our_gateway_and_the_floors_lose_nothing_under_the_load(
    place: Stage, connection: asyncpg.Connection, own: bool
) -> None:
    users = [
        await connection.fetchval(
            "INSERT INTO users (email, name) VALUES ($1, 'Bench') RETURNING id", f"{n}@bench.test"
        )
        for n in range(3)
    ]
    place = Stage(place.folder, place.database_url, users, place.cores)
    compiled("browsers")
    scenario = fanout.Scenario("test", "20 browsers", 20, ("closed", "16 4"), (("floor", 0.0),), own=own)
    with Progress("test") as progress:
        samples = await fanout.measure(
            place, scenario, ["ours", "floor", "joining"], rounds=1, seconds=0.2, progress=progress
        )
    assert set(samples) == {"ours", "floor", "joining"}
    for sample in (one for kept in samples.values() for one in kept):
        assert (sample.errors, sample.missing) == (0, 0)
        assert sample.p50 > 0


async def test_the_watch_its_floor_and_the_bridge_see_every_change_of_every_pod(
    database_url: str, tmp_path: Path
) -> None:
    load = watch.Load(pods=500, rate=1000, seconds=0.5, rounds=1)
    with Progress("test") as progress:
        measured = await asyncio.to_thread(uvloop.run, watch.measure(load, progress, database_url, tmp_path))
    assert measured.floor_seen == measured.ours_seen == measured.told == [500]
    assert len(measured.lists) == 2
    assert all(lag > 0 for lag in measured.lags)
    assert measured.held > 0
    assert len(watch.figures(load, measured)) == 7
