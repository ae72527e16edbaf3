"""The real-time path: from a request's answer to its first event, and the recovery of a thousand events."""

from __future__ import annotations

import asyncio
import uuid
from time import perf_counter

import aiohttp
import asyncpg
import orjson

from tests.benchmarks.report import Figure, percentile, spread
from tests.benchmarks.stage import Server

SAMPLES = 200
EVENTS = 1000


async def first_status(server: Server, connection: asyncpg.Connection, token: str) -> Figure:
    """Milliseconds from the answer of `POST /api/v1/sessions` to the first `session.status` on an open socket."""
    # A machine without services: what is measured is the way of the event, not the start of a process.
    await connection.execute(
        """INSERT INTO machine_configs (name, provider_id)
           SELECT 'empty', id FROM providers WHERE is_default ON CONFLICT DO NOTHING"""
    )
    headers = {"Authorization": f"Bearer {token}"}
    delays = []
    async with (
        aiohttp.ClientSession(server.url, headers=headers) as client,
        client.ws_connect(f"/ws?token={await _short(client)}") as socket,
    ):
        seen: dict[int, float] = {}
        reader = asyncio.create_task(_note_first(socket, seen), name="reader")
        for _ in range(SAMPLES):
            body = {"project_uuid": str(uuid.uuid4()), "machine_config": "empty"}
            async with client.post("/api/v1/sessions", json=body) as answer:
                session = await answer.json()
                answered = perf_counter()
                assert answer.status == 201, session
            async with asyncio.timeout(5):
                while session["id"] not in seen:
                    await asyncio.sleep(0)
            delays.append(max(0.0, seen[session["id"]] - answered) * 1000)
            # At rest: let the session come up, and everything settle.
            await asyncio.sleep(0.05)
        reader.cancel()
    return Figure(
        "POST /sessions answered -> first session.status",
        f"p50 {percentile(delays, 0.5):.1f} ms, p99 {percentile(delays, 0.99):.1f} ms",
        "p99 < 50 ms",
        f"{SAMPLES} sessions, one after the other, one socket",
    )


async def _short(client: aiohttp.ClientSession) -> str:
    async with client.post("/api/v1/auth") as answer:
        return str((await answer.json())["short_token"])


async def _note_first(socket: aiohttp.ClientWebSocketResponse, seen: dict[int, float]) -> None:
    async for message in socket:
        event = orjson.loads(message.data)
        if event["event_type"] == "session.status":
            seen.setdefault(event["data"]["id"], perf_counter())


async def recovery(server: Server, connection: asyncpg.Connection, token: str, user_id: int) -> Figure:
    """Milliseconds from a `subscribe` with `since` to its `subscribed` answer, a thousand events later."""
    channel = f"user:{user_id}"
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(server.url, headers=headers) as client:
        async with client.ws_connect(f"/ws?token={await _short(client)}") as socket:
            position = (await socket.receive_json())["data"]["position"]
            await connection.execute(
                """INSERT INTO outbox (event_type, channel, data)
                   SELECT 'bench.event', $1, '{"filler": "' || repeat('x', 150) || '"}' FROM generate_series(1, $2)""",
                channel,
                EVENTS,
            )
            for _ in range(EVENTS):
                await socket.receive()
        took = []
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(
                f"GET /ws?token={await _short(client)} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
            )
            await reader.readuntil(b'"connected"')
            await asyncio.sleep(0.05)
            action = orjson.dumps({"action": "subscribe", "channel": channel, "since": position})
            began = perf_counter()
            # A masked text frame, whose mask is zero (RFC 6455, section 5.2).
            writer.write(bytes([0x81, 0xFE]) + len(action).to_bytes(2, "big") + bytes(4) + action)
            received = bytearray()
            while b'"subscribed"' not in received[-1000:]:
                received += await reader.read(1 << 18)
            took.append((perf_counter() - began) * 1000)
            assert received.count(b'"bench.event"') == EVENTS
            writer.close()
            await writer.wait_closed()
    return Figure(f"recovery of {EVENTS:,} events", f"{spread(took, 1)} ms", "< 10 ms", "20 times, on a raw socket")


async def idle(server: Server, *, seconds: float = 20) -> Figure:
    """Resident memory and CPU of the whole embedded process at rest."""
    before = server.cpu()
    await asyncio.sleep(seconds)
    cpu = (server.cpu() - before) / seconds * 100
    rss = server.process.memory_info().rss / (1 << 20)
    return Figure("at rest", f"{rss:.0f} MiB resident, {cpu:.1f} % CPU", "< 150 MiB, no CPU to speak of")
