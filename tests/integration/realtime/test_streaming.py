"""The whole path over real sockets: cut off at random and resumed, never read, replayed at length, drained."""

from __future__ import annotations

import asyncio
import random
import socket
from collections import defaultdict
from contextlib import suppress

import aiohttp
import pytest

from orchestrator.events import Event
from tests.integration.realtime.client import Client, Closed
from tests.integration.realtime.conftest import Gateway, Stage


async def test_a_cut_off_client_resumes_and_misses_nothing(stage: Stage) -> None:
    user = await stage.user("ann", channels=("app:*",))
    client = stage.client(user)
    await client.connect(channels=["app:1", "app:2"])
    await stage.publish("app:1", 1, 2)
    await client.receive()
    client.cut()
    await stage.publish("app:2", 3, 4)
    await stage.publish("app:3", 5)
    await stage.publish("app:1", 6)
    await client.resume()
    for _ in range(4):
        await client.receive()
    assert client.recovered
    assert client.numbers == {"app:1": [1, 2, 6], "app:2": [3, 4]}
    assert stage.hub.recoveries == {"recovered": 1}


async def test_a_client_resumes_at_another_gateway_of_the_same_log(gateway: Gateway) -> None:
    async with gateway() as first, gateway(log=first.log) as second:
        user = await first.user("ann", channels=("app:*",))
        client = first.client(user)
        await client.connect(channels=["app:1"])
        await first.publish("app:1", 1)
        await client.receive()
        client.cut()
        await first.publish("app:1", 2)
        client._url = second.url
        assert (await client.resume())["recovered"]
        await first.publish("app:1", 3)
        await client.receive()
        await client.receive()
        assert client.numbers == {"app:1": [1, 2, 3]}
        second.clients.append(client)


async def test_a_client_of_another_epoch_is_told_to_load_anew(stage: Stage) -> None:
    user = await stage.user("ann")
    await stage.publish("app:1", 1)
    data = await stage.client(user).connect(since="other:7")
    assert data["recovered"] is False
    assert data["position"] == f"{stage.log.epoch}:1"


async def test_batches_come_as_arrays_to_who_asks(stage: Stage) -> None:
    user = await stage.user("ann", channels=("app:*",))
    batch, plain = stage.client(user), stage.client(user)
    await batch.connect(channels=["app:1"], batch=True)
    await plain.connect(channels=["app:1"])
    await stage.publish("app:1", *range(100))
    for client in (batch, plain):
        while len(client.events) < 100:
            await client.receive()
    assert batch.events == plain.events
    assert plain.frames == 101
    assert batch.frames < 10


@pytest.mark.parametrize(("batch", "arrays"), [("1", 1), ("0", 0), ("true", 0), ("", 0)])
async def test_only_who_says_so_gets_a_replay_as_an_array(stage: Stage, batch: str, arrays: int) -> None:
    user = await stage.user("ann", channels=("app:*",))
    start = str(stage.context.history.position)
    await stage.publish("app:1", 1, 2, 3)
    await stage.until(lambda: stage.context.feed.offset == 3)
    query = {"token": stage.tokens.issue_short(user), "channels": "app:1", "since": start, "batch": batch}
    async with stage.session.ws_connect(stage.url, params=query) as websocket:
        assert (await websocket.receive_json(timeout=10))["event_type"] == "connected"
        replayed = [await websocket.receive_json(timeout=10) for _ in range(1 if arrays else 3)]
        assert sum(isinstance(frame, list) for frame in replayed) == arrays
        events = replayed[0] if arrays else replayed
        assert [event["data"]["n"] for event in events] == [1, 2, 3]
        await stage.publish("app:1", 4)
        assert (await websocket.receive_json(timeout=10))["data"] == {"n": 4}


class Story:
    """A publisher, and one client whose connection is cut again and again."""

    CHANNELS = ("app:1", "app:2", "app:3", "app:4", "app:5")

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage = stage
        self.draw = random.Random(seed)
        self.published: dict[str, list[int]] = defaultdict(list)
        self.own = ""

    async def publish(self, total: int) -> None:
        number = 0
        while number < total:
            events = []
            for _ in range(self.draw.randint(1, 30)):
                channel = self.draw.choice([*self.CHANNELS, self.own, "other:1"])
                number += 1
                events.append(Event("test.event", channel, {"n": number, "text": "x" * self.draw.randint(0, 2000)}))
                self.published[channel].append(number)
            await self.stage.log.publish(events)
            if self.draw.random() < 0.1:
                # The relay repeats what the log did not confirm.
                await self.stage.log.publish(events)
            await asyncio.sleep(self.draw.choice([0, 0, 0.001, 0.01]))

    def complete(self, client: Client) -> bool:
        seen = client.numbers
        return all(seen[channel][-1:] == self.published[channel][-1:] for channel in [*self.CHANNELS, self.own])

    async def read(self, client: Client, count: int) -> None:
        """Receive some messages, or stop because it is quiet."""
        for _ in range(count):
            with suppress(TimeoutError):
                await client.receive(0.05)
                continue
            return


@pytest.mark.random
@pytest.mark.parametrize("batch", [False, True])
async def test_with_random_cuts_each_event_comes_exactly_once_in_order(stage: Stage, batch: bool) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    story = Story(stage, seed)
    draw = random.Random(seed + 1)
    user = await stage.user("ann", channels=("app:*",))
    story.own = f"user:{user.user_id}"
    client = stage.client(user)
    start = (await client.connect(channels=["app:1", "app:2"], batch=batch))["position"]
    publisher = asyncio.create_task(story.publish(6_000))
    await asyncio.sleep(0)
    # The rest is subscribed later, with the position of the beginning.
    late = ["app:3", "app:4", "app:5"]
    cuts = 0
    async with asyncio.timeout(50):
        while not (publisher.done() and not late and not client.replaying and story.complete(client)):
            await story.read(client, draw.randint(0, 400))
            if late and draw.random() < 0.5:
                await client.subscribe(late.pop(), since=start)
                await story.read(client, draw.randint(0, 20))
            if draw.random() < 0.4:
                client.cut()
                cuts += 1
                await client.resume(batch=batch)
    await publisher
    assert client.recovered
    assert cuts > 3
    numbers = client.numbers
    for channel in (*story.CHANNELS, story.own):
        assert numbers[channel] == story.published[channel], channel
    assert "other:1" not in numbers
    assert stage.context.history.repeats > 0


async def test_a_long_replay_to_a_client_that_reads_slowly_is_paced_and_complete(gateway: Gateway) -> None:
    async with gateway(unsent_bytes=256 << 10) as stage:
        user = await stage.user("ann", channels=("app:*",))
        start = str(stage.context.history.position)
        for number in range(200):
            await stage.publish("app:1", number, text="x" * 50_000)
        await stage.until(lambda: stage.context.feed.offset == 200)
        client = stage.client(user)
        await client.connect(channels=["app:1"], since=start)
        (connection,) = stage.hub.connections.values()
        most = 0
        for number in range(200, 220):
            await stage.publish("app:1", number, text="x" * 50_000)
        while len(client.events) < 220:
            await client.receive()
            most = max(most, connection.transport.get_write_buffer_size())
            if len(client.events) % 20 == 0:
                await asyncio.sleep(0.01)
        assert client.numbers == {"app:1": list(range(220))}
        assert most < 512 << 10
        assert connection.closed is None


async def raw(stage: Stage, token: str, query: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A handshake by hand, over a socket with a small receive buffer, of which nothing more is read."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.setblocking(False)
    await asyncio.get_running_loop().sock_connect(own, (stage.server.host, stage.server.port))
    reader, writer = await asyncio.open_connection(sock=own, limit=1024)
    writer.write(
        f"GET /ws?token={token}{query} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    assert b"101" in await reader.readline()
    return reader, writer


async def test_a_client_that_never_reads_is_dropped_and_the_others_get_everything(gateway: Gateway) -> None:
    async with gateway(unsent_bytes=128 << 10) as stage:
        user = await stage.user("ann", channels=("app:*",))
        fine = stage.client(user)
        await fine.connect(channels=["app:1"])
        _, writer = await raw(stage, stage.tokens.issue_short(user), "&channels=app:1")
        await stage.until(lambda: len(stage.hub.connections) == 2)
        number = 0
        async with asyncio.timeout(30):
            while len(stage.hub.connections) == 2:
                await stage.publish("app:1", *range(number, number + 10), text="x" * 10_000)
                number += 10
                while len(fine.events) < number:
                    await fine.receive()
        assert stage.hub.closes == {4008: 1}
        await stage.publish("app:1", number)
        await fine.receive()
        assert fine.numbers == {"app:1": list(range(number + 1))}
        writer.close()


async def test_a_client_that_floods_and_never_reads_the_answers_is_dropped(gateway: Gateway) -> None:
    async with gateway(unsent_bytes=64 << 10) as stage:
        _, writer = await raw(stage, stage.tokens.issue_short(await stage.user("ann")))
        ping = b'{"action":"ping","id":"' + b"x" * 30_000 + b'"}'
        frame = b"\x81\xfe" + len(ping).to_bytes(2, "big") + bytes(4) + ping
        with suppress(ConnectionError):
            async with asyncio.timeout(30):
                while not stage.hub.closes:
                    writer.write(frame)
                    await writer.drain()
                    await asyncio.sleep(0)
        await stage.until(lambda: stage.hub.closes)
        assert stage.hub.closes == {4008: 1}
        writer.close()


async def test_a_replay_that_is_never_read_is_dropped(gateway: Gateway) -> None:
    async with gateway(ping_interval=0.3, pong_timeout=0.3) as stage:
        user = await stage.user("ann", channels=("app:*",))
        start = str(stage.context.history.position)
        for number in range(200):
            await stage.publish("app:1", number, text="x" * 50_000)
        await stage.until(lambda: stage.context.feed.offset == 200)
        _, writer = await raw(stage, stage.tokens.issue_short(user), f"&channels=app:1&since={start}")
        await stage.until(lambda: stage.hub.closes)
        assert stage.hub.closes == {4008: 1}
        writer.close()


async def test_a_peer_that_does_not_answer_a_close_is_aborted(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.realtime.hub.CLOSE_TIMEOUT", 0.2)
    reader, writer = await raw(stage, stage.tokens.issue_short(await stage.user("ann")))
    await stage.until(lambda: stage.hub.connections)
    stage.hub.close_all(4011)
    with suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), 10)
    await stage.until(lambda: not stage.hub.by_user and not stage.hub.lingering)
    writer.close()


async def test_a_drain_closes_every_client_with_4001_spread_evenly(gateway: Gateway) -> None:
    async with gateway(drain_rate=50, connections_per_user=100) as stage:
        user = await stage.user("ann")
        clients = [stage.client(user) for _ in range(25)]
        for client in clients:
            await client.connect()
        loop = asyncio.get_running_loop()
        ends: list[float] = []

        async def wait(client: Client) -> int | None:
            code = await client.closed()
            ends.append(loop.time())
            return code

        waiting = [asyncio.create_task(wait(client)) for client in clients]
        began = loop.time()
        await stage.hub.drain()
        assert [await task for task in waiting] == [4001] * 25
        assert max(ends) - min(ends) > 0.3
        assert loop.time() - began < 5
        assert stage.hub.closes == {4001: 25}


async def test_a_handshake_that_a_drain_overtakes_is_refused_or_closed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = await stage.user("ann")
    redeem = stage.context.tokens.redeem_many

    async def drained_meanwhile(*arguments: object) -> object:
        grant = await redeem(*arguments)  # type: ignore[arg-type]
        stage.hub.draining = True
        return grant

    monkeypatch.setattr(stage.context.tokens, "redeem_many", drained_meanwhile)
    assert (await stage.refused(params={"token": stage.tokens.issue_short(user)}))[0] == 503
    stage.hub.draining = False
    admit = stage.hub.admit

    def draining_from_here(user_id: int) -> bool:
        stage.hub.draining = True
        return admit(user_id)

    monkeypatch.undo()
    monkeypatch.setattr(stage.hub, "admit", draining_from_here)
    websocket = await stage.session.ws_connect(stage.url, params={"token": stage.tokens.issue_short(user)})
    frame = await websocket.receive(10)
    assert frame.type is aiohttp.WSMsgType.CLOSE
    assert websocket.close_code == 4001


async def test_a_feed_that_begins_anew_closes_clients_4010_and_they_come_back(stage: Stage) -> None:
    user = await stage.user("ann")
    client = stage.client(user)
    await client.connect()
    stage.context.feed._start_anew(0)
    with pytest.raises(Closed) as end:
        await client.receive()
    assert end.value.code == 4010
    await client.connect()
