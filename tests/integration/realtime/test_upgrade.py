"""The seam to aiohttp, as it is in the version that is installed: what comes early is kept, and nothing of it stays."""

from __future__ import annotations

import asyncio
import gc

import pytest
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_protocol import RequestHandler

from gateway.realtime.stream import Stream
from tests.integration.realtime.conftest import Gateway, Stage
from tests.unit.realtime.wire import frames

HANDSHAKE = (
    "GET /ws?token={token}{query} HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
)


def masked(payload: bytes, first: int = 0x81) -> bytes:
    """A short client frame, with a mask of zeros."""
    assert len(payload) < 126
    return bytes((first, 0x80 | len(payload))) + bytes(4) + payload


async def opened(
    stage: Stage, behind: bytes = b"", query: str = "", more: str = ""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    user = await stage.user("ann")
    reader, writer = await asyncio.open_connection(stage.server.host, stage.server.port)
    request = HANDSHAKE.format(token=stage.tokens.issue_short(user), query=query, more=more)
    writer.write(request.encode() + behind)
    return reader, writer


async def test_the_answer_is_that_of_rfc_6455(stage: Stage) -> None:
    reader, writer = await opened(stage)
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    status, *lines = head.strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert status == "HTTP/1.1 101 Switching Protocols"
    assert headers["upgrade"] == "websocket"
    assert headers["connection"] == "upgrade"
    # The example of RFC 6455, section 1.3.
    assert headers["sec-websocket-accept"] == "s3pplmbitxaq9kygzzhzrbk+xoo="
    assert "content-length" not in headers
    assert "transfer-encoding" not in headers
    writer.close()


async def test_a_body_makes_it_no_handshake(stage: Stage) -> None:
    reader, writer = await opened(stage, b"12345", more="Content-Length: 5\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize("size", [0, 1_000_000])
@pytest.mark.parametrize("query", ["", "&since=e:1"])
async def test_what_comes_right_behind_the_handshake_is_not_lost(stage: Stage, size: int, query: str) -> None:
    many = masked(b"", 0x8A) * (size // 6)
    reader, writer = await opened(stage, many + masked(b'{"action":"ping","id":"early"}') + masked(b"", 0x88), query)
    await reader.readuntil(b"\r\n\r\n")
    # The first ping comes at any moment.
    rest = [frame for frame in frames(await asyncio.wait_for(reader.read(), 20)) if frame[0] != 0x89]
    assert [first for first, _ in rest] == [0x81, 0x81, 0x88]
    assert b'"id":"early"' in rest[1][1]
    writer.close()


async def test_nothing_of_aiohttp_stays_and_its_timers_touch_nothing(gateway: Gateway) -> None:
    async with gateway() as stage:
        runner = stage.server.runner
        assert runner is not None
        assert runner.server is not None
        theirs = (RequestHandler, web.BaseRequest, web.StreamResponse, AbstractStreamWriter)
        # What earlier tests have left to be collected is theirs.
        before = [one for one in gc.get_objects() if isinstance(one, theirs)]
        client = stage.client(await stage.user("ben"))
        await client.connect()
        await stage.until(lambda: not [task for task in asyncio.all_tasks() if "RequestHandler" in repr(task)])
        (connection,) = stage.hub.connections.values()
        gc.collect()
        known = set(map(id, before))
        assert [one for one in gc.get_objects() if isinstance(one, theirs) and id(one) not in known] == []
        assert isinstance(connection.transport.get_protocol(), Stream)
        assert runner.server.connections == []
        await client.send({"action": "ping"})
        assert (await client.receive())["event_type"] == "pong"


async def test_a_keep_alive_connection_may_upgrade_after_other_requests(gateway: Gateway) -> None:
    async with gateway() as stage:
        reader, writer = await asyncio.open_connection(stage.server.host, stage.server.port)
        for _ in range(2):
            writer.write(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 404 " in await reader.readline()
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(length)
        writer.write(
            HANDSHAKE.format(token=stage.tokens.issue_short(await stage.user("ann")), query="", more="").encode()
        )
        assert b" 101 " in await reader.readline()
        await reader.readuntil(b"\r\n\r\n")
        writer.write(masked(b'{"action":"ping","id":"x"}'))
        await reader.readuntil(b'"id":"x"')
        writer.close()
        await stage.until(lambda: not stage.hub.by_user)


async def test_a_client_that_goes_during_the_handshake_leaves_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    redeem = stage.context.tokens.redeem_many
    begun, go = asyncio.Event(), asyncio.Event()

    async def held(*arguments: object) -> object:
        begun.set()
        await go.wait()
        return await redeem(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stage.context.tokens, "redeem_many", held)
    assert stage.server.runner is not None
    assert stage.server.runner.server is not None
    _, writer = await opened(stage)
    await begun.wait()
    writer.transport.abort()
    server = stage.server.runner.server
    await stage.until(lambda: not server.connections)
    go.set()
    await stage.until(lambda: not [task for task in asyncio.all_tasks() if "RequestHandler" in repr(task)])
    assert dict(stage.hub.by_user) == {}
    assert stage.hub.connections == {}


async def test_the_servers_own_shutdown_leaves_taken_connections_to_the_drain(gateway: Gateway) -> None:
    async with gateway() as stage:
        client = stage.client(await stage.user("ann"))
        await client.connect()
        assert stage.server.runner is not None
        assert stage.server.runner.server is not None
        await stage.server.runner.server.shutdown(0.1)
        await client.send({"action": "ping"})
        assert (await client.receive())["event_type"] == "pong"
        _, code = await asyncio.gather(stage.hub.drain(), client.closed())
        assert code == 4001
