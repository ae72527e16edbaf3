"""Server-sent events over real sockets, read as the HTML standard says (section 9.2)."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from auth.permissions import Identity
from auth.tokens import Tokens
from orchestrator.events import GATEWAY, PERMISSIONS_CHANGED, Event
from tests.integration.realtime.client import Client
from tests.integration.realtime.conftest import Gateway, Stage


class EventSource:
    """A browser's EventSource: the same URL at each connection, and `Last-Event-ID` once there was an id."""

    def __init__(self, stage: Stage, **query: str) -> None:
        self._session = stage.session
        self._url = stage.server.make_url("/api/v1/events").with_query(query)
        self._answer: aiohttp.ClientResponse | None = None
        self.headers: dict[str, str] = {}
        self.last_id = ""
        # What has come of the next message.
        self._id = ""
        self._data: list[str] = []
        self.retry: int | None = None
        self.comments = 0
        # What `onmessage` was given, through all connections, each with its id.
        self.messages: list[dict[str, Any]] = []
        self.ids: list[str] = []

    async def open(self, **headers: str) -> dict[str, Any]:
        """The data of `connected`. Raises aiohttp.ClientResponseError for another status than 200."""
        if self.last_id:
            headers["Last-Event-ID"] = self.last_id
        self._id, self._data = self.last_id, []
        self._answer = await self._session.get(
            self._url,
            headers={"Accept": "text/event-stream", **headers},
            raise_for_status=True,
            timeout=None,
            read_bufsize=8 << 20,
        )
        assert self._answer.content_type == "text/event-stream"
        first = await self.receive()
        assert first["event_type"] == "connected", first
        return first["data"]

    async def receive(self, timeout: float = 10) -> dict[str, Any]:
        """The next message. Raises EOFError at the end of the stream."""
        assert self._answer is not None
        async with asyncio.timeout(timeout):
            while line := (await self._answer.content.readline()).decode():
                name, _, value = line.rstrip("\n").partition(":")
                value = value.removeprefix(" ")
                if line == "\n":
                    self.last_id = self._id
                    if self._data:
                        self.ids.append(self.last_id)
                        self.messages.append(json.loads("\n".join(self._data)))
                        self._data = []
                        return self.messages[-1]
                elif name == "data":
                    self._data.append(value)
                elif name == "id":
                    self._id = value
                elif name == "retry":
                    self.retry = int(value)
                else:
                    assert name == "", line
                    self.comments += 1
        raise EOFError

    async def until(self, event_type: str, timeout: float = 10) -> dict[str, Any]:
        async with asyncio.timeout(timeout):
            while (message := await self.receive(timeout))["event_type"] != event_type:
                pass
        return message

    async def closed(self) -> dict[str, Any]:
        """The data of `closing`, which is the last thing that is said."""
        closing = (await self.until("closing"))["data"]
        with pytest.raises(EOFError):
            await self.receive()
        return closing

    def cut(self) -> None:
        """End the connection as a broken network does."""
        assert self._answer is not None
        self._answer.close()

    @property
    def numbers(self) -> list[int]:
        return [message["data"]["n"] for message in self.messages if "offset" in message]


def source(stage: Stage, user: Identity, *channels: str, **query: str) -> EventSource:
    """One with a short token."""
    if channels:
        query["channels"] = ",".join(channels)
    return EventSource(stage, token=stage.tokens.issue_short(user), **query)


async def refused(opening: EventSource, **headers: str) -> int:
    with pytest.raises(aiohttp.ClientResponseError) as refusal:
        await opening.open(**headers)
    return refusal.value.status


async def test_the_stream_begins_with_connected_and_goes_on_with_the_same_envelopes(stage: Stage) -> None:
    user = await stage.user("ann", channels=("app:*",))
    events, websocket = source(stage, user, "app:1", "app:2"), stage.client(user)
    data = await events.open()
    own = f"user:{user.user_id}"
    assert events.messages[0]["channel"] == own
    assert data["channels"] == [own, "app:1", "app:2"]
    assert (data["recovered"], data["ping_interval"], data["expires_at"]) == (True, 25, None)
    assert events.last_id == data["position"] == f"{stage.log.epoch}:0"
    assert events.retry is not None
    assert 1000 <= events.retry <= 5000
    headers = events._answer.headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Accel-Buffering"] == "no"
    assert "Content-Encoding" not in headers
    await websocket.connect(channels=["app:1", "app:2"])
    await stage.publish("app:1", 1, 2)
    await stage.publish("app:2", 3)
    await stage.publish("app:3", 4)
    await stage.publish(own, 5)
    for client in (events, websocket):
        for _ in range(4):
            await client.receive()
    assert events.messages[1:] == websocket.events
    assert events.ids == [f"{stage.log.epoch}:{offset}" for offset in (0, 1, 2, 3, 5)]
    assert stage.hub.deliveries == 8
    events.cut()
    await stage.until(lambda: len(stage.hub.connections) == 1)


async def test_the_browser_comes_back_by_itself_and_misses_nothing(stage: Stage) -> None:
    user = await stage.user("ann", channels=("app:*",))
    events = source(stage, user, "app:1")
    await events.open()
    await stage.publish("app:1", 1, 2)
    await events.receive()
    events.cut()
    await stage.publish("app:1", 3)
    data = await events.open()
    assert data["recovered"]
    assert data["position"] == f"{stage.log.epoch}:1"
    await events.receive()
    await events.receive()
    assert events.numbers == [1, 2, 3]
    events.cut()


@pytest.mark.random
async def test_with_random_cuts_each_event_comes_exactly_once_in_order(stage: Stage) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    user = await stage.user("ann", channels=("app:*",))
    events = source(stage, user, "app:1", "app:2", "app:3")
    await events.open()

    async def publish() -> None:
        number = 0
        while number < 3000:
            batch = [
                Event(
                    "test.event",
                    f"app:{draw.randint(1, 4)}",
                    {"n": number + place, "text": "x" * draw.randint(0, 2000)},
                )
                for place in range(draw.randint(1, 40))
            ]
            number += len(batch)
            expected.extend(event.data["n"] for event in batch if event.channel != "app:4")
            await stage.log.publish(batch)
            await asyncio.sleep(draw.choice([0, 0, 0.002]))

    expected: list[int] = []
    publisher = asyncio.create_task(publish())
    cuts = 0
    async with asyncio.timeout(50):
        while not publisher.done() or events.numbers[-1:] != expected[-1:]:
            with suppress(TimeoutError):
                for _ in range(draw.randint(0, 600)):
                    await events.receive(0.05)
            if draw.random() < 0.4:
                events.cut()
                cuts += 1
                assert (await events.open())["recovered"]
    await publisher
    assert cuts
    assert events.numbers == expected
    events.cut()


async def test_a_short_token_opens_one_stream_and_only_its_own_browser_comes_back(stage: Stage) -> None:
    user = await stage.user("ann")
    events = source(stage, user)
    await events.open()
    token = events._url.query["token"]
    assert await refused(EventSource(stage, token=token)) == 401
    assert (await stage.refused(params={"token": token}))[0] == 401
    other = stage.tokens.issue_short(user)
    websocket = Client(stage.session, stage.url, lambda: asyncio.sleep(0, other))
    await websocket.connect()
    stage.clients.append(websocket)
    assert await refused(EventSource(stage, token=other), **{"Last-Event-ID": events.last_id}) == 401
    await stage.pool.execute("UPDATE spent_short_tokens SET address = '192.0.2.1' WHERE address IS NOT NULL")
    events.cut()
    assert await refused(events) == 401


async def test_other_clients_show_their_main_token_in_a_header(stage: Stage) -> None:
    user = await stage.user("ann")
    main = stage.tokens.issue_main(user.user_id)
    events = EventSource(stage)
    for _ in range(2):
        data = await events.open(Authorization=f"Bearer {main}")
        assert data["expires_at"] is not None
        events.cut()
    assert await refused(events) == 401
    assert await refused(events, Authorization="Bearer nonsense") == 401
    assert await refused(events, Authorization=f"Bearer {stage.tokens.issue_short(user)}") == 401


async def test_what_may_not_be_subscribed_to_is_refused(gateway: Gateway) -> None:
    async with gateway(channels_per_connection=2, connections_per_user=1) as stage:
        user = await stage.user("ann", channels=("app:*",))
        assert await refused(source(stage, user, "cluster")) == 403
        assert await refused(source(stage, user, "app:1", "app:2")) == 403
        assert await refused(source(stage, replace(user, scopes=frozenset()))) == 403
        narrowed = EventSource(stage, token=stage.tokens.issue_short(user, ["app:1"]), channels="app:2")
        assert await refused(narrowed) == 403
        assert await refused(source(stage, user), Origin="https://evil.example") == 403
        events = source(stage, user)
        await events.open()
        assert await refused(source(stage, user)) == 429
        events.cut()
        await stage.until(lambda: not stage.hub.by_user)
        stage.hub.draining = True
        assert await refused(events) == 503
        stage.hub.draining = False


async def test_another_epoch_and_what_is_no_position_are_told_as_lost(stage: Stage) -> None:
    user = await stage.user("ann")
    for last_id in ("other:7", "nonsense"):
        events = source(stage, user, since=f"{stage.log.epoch}:0")
        data = await events.open(**{"Last-Event-ID": last_id})
        assert (data["recovered"], data["position"]) == (False, f"{stage.log.epoch}:0")
        events.cut()


async def test_a_line_break_in_an_event_of_another_service_ends_no_line(stage: Stage) -> None:
    user = await stage.user("ann", channels=("app:*",))
    events = source(stage, user, "app:1")
    await events.open()

    class Pretty(Event):
        def body(self) -> bytes:
            return b'{\r\n "event_type": "t",\n "channel": "app:1",\r "data": {"n": 1, "text": "a\\nb"}\n}\n'

    await stage.log.publish([Pretty("t", "app:1", {})])
    assert (await events.receive())["data"] == {"n": 1, "text": "a\nb"}
    events.cut()


async def test_heartbeats_are_comments_and_no_pong_is_missed(gateway: Gateway) -> None:
    async with gateway(ping_interval=0.1, pong_timeout=0.1) as stage:
        user = await stage.user("ann", channels=("app:*",))
        events = source(stage, user, "app:1")
        await events.open()
        async with asyncio.timeout(20):
            while events.comments < 5:
                with suppress(TimeoutError):
                    await events.receive(0.1)
        await stage.publish("app:1", 1)
        await events.receive()
        assert stage.hub.closes == {}
        events.cut()


async def test_the_kernel_gives_up_a_client_that_is_gone_without_a_word(stage: Stage) -> None:
    events = source(stage, await stage.user("ann"))
    await events.open()
    (connection,) = stage.hub.connections.values()
    own = connection.transport.get_extra_info("socket")
    assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 35_000
    events.cut()


async def test_a_revoked_token_ends_the_stream_for_good(stage: Stage) -> None:
    user = await stage.user("ann")
    main = stage.tokens.issue_main(user.user_id)
    async with stage.pool.acquire() as connection:
        events = source(stage, await stage.tokens.authenticate(connection, main))
    await events.open()
    await stage.pool.execute("UPDATE users SET tokens_valid_from = now()")
    await stage.log.publish([Event(PERMISSIONS_CHANGED, GATEWAY, {"user_id": user.user_id})])
    assert await events.closed() == {"code": 4500, "reason": "token invalid", "reconnect": False}
    assert await refused(events) == 401


@pytest.mark.parametrize("way", ["redeem_stream", "authenticate"])
async def test_tokens_that_are_void_right_after_they_were_shown_open_nothing_that_lasts(
    stage: Stage, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = await stage.user("ann")
    believe, voided = getattr(Tokens, way), False

    async def void_right_after(*arguments: Any, **options: Any) -> Any:
        nonlocal voided
        believed = await believe(*arguments, **options)
        if not voided:
            voided = True
            await stage.pool.execute("UPDATE users SET tokens_valid_from = clock_timestamp()")
        return believed

    monkeypatch.setattr(Tokens, way, void_right_after)
    if way == "authenticate":
        events, headers = EventSource(stage), {"Authorization": f"Bearer {stage.tokens.issue_main(user.user_id)}"}
        assert await refused(events, **headers) == 401
    else:
        events = source(stage, user)
        await events.open()
        await stage.log.publish([Event(PERMISSIONS_CHANGED, GATEWAY, {"user_id": user.user_id})])
        assert (await events.closed())["code"] == 4500


async def test_lost_permission_ends_the_stream(stage: Stage) -> None:
    user = await stage.user("ann")
    workspace = await stage.workspace(user)
    events = source(stage, user, f"workspace:{workspace}")
    await events.open()
    await stage.pool.execute("DELETE FROM workspace_members")
    await stage.log.publish([Event(PERMISSIONS_CHANGED, GATEWAY, {"user_id": user.user_id})])
    assert (await events.closed())["code"] == 4507


async def test_who_was_disconnected_by_an_administrator_does_not_come_back_by_itself(stage: Stage) -> None:
    events = source(stage, await stage.user("ann"))
    await events.open()
    (connection,) = stage.hub.connections.values()
    assert connection.kind == "sse"
    stage.hub.close(connection, 4503)
    assert (await events.closed())["reconnect"] is False
    await stage.until(lambda: not stage.hub.actions)
    assert await refused(events) == 401


async def test_an_authorisation_that_ends_is_told_and_ends_the_stream(gateway: Gateway) -> None:
    async with gateway(expiry_notice=1.0, ping_interval=0.2) as stage:
        user = await stage.user("ann", expires_at=time.time() + 3)
        events = source(stage, user)
        await events.open()
        assert "expires_at" in (await events.until("expiring"))["data"]
        assert await events.closed() == {
            "code": 4005, "reason": "connection's authorisation expired", "reconnect": True,
        }  # fmt: skip


async def test_a_drain_spreads_the_ends_of_streams_evenly_too(gateway: Gateway) -> None:
    async with gateway(drain_rate=50, connections_per_user=100) as stage:
        user = await stage.user("ann")
        streams = [source(stage, user) for _ in range(10)]
        sockets = [stage.client(user) for _ in range(10)]
        for client in (*streams, *(one.connect() for one in sockets)):
            await (client.open() if isinstance(client, EventSource) else client)
        assert stage.hub.drain_seconds == pytest.approx(20 / 50 + 5)
        loop = asyncio.get_running_loop()
        began = loop.time()
        _, *codes = await asyncio.gather(
            stage.hub.drain(), *(one.closed() for one in sockets), *(one.closed() for one in streams)
        )
        assert (
            codes
            == [4001] * 10 + [{"code": 4001, "reason": "server is shutting down or draining", "reconnect": True}] * 10
        )
        assert loop.time() - began > 0.3
        assert stage.hub.closes == {4001: 20}


async def test_a_log_that_begins_anew_ends_the_stream_and_the_browser_comes_back(stage: Stage) -> None:
    events = source(stage, await stage.user("ann"))
    await events.open()
    stage.context.feed._start_anew(0)
    assert (await events.closed())["code"] == 4010
    assert (await events.open())["recovered"]
    events.cut()


async def test_a_stream_that_is_never_read_is_dropped_and_others_get_everything(gateway: Gateway) -> None:
    async with gateway(unsent_bytes=128 << 10) as stage:
        user = await stage.user("ann", channels=("app:*",))
        fine = source(stage, user, "app:1")
        await fine.open()
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.setblocking(False)
        await asyncio.get_running_loop().sock_connect(own, (stage.server.host, stage.server.port))
        token = stage.tokens.issue_short(user)
        own.send(f"GET /api/v1/events?channels=app:1&token={token} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
        await stage.until(lambda: len(stage.hub.connections) == 2)
        number = 0
        async with asyncio.timeout(30):
            while len(stage.hub.connections) == 2:
                await stage.publish("app:1", *range(number, number + 10), text="x" * 10_000)
                number += 10
                while len(fine.numbers) < number:
                    await fine.receive()
        assert stage.hub.closes == {4008: 1}
        assert fine.numbers == list(range(number))
        own.close()
        fine.cut()


async def test_one_event_larger_than_the_limit_drops_no_stream_that_reads(gateway: Gateway) -> None:
    async with gateway(unsent_bytes=1000) as stage:
        user = await stage.user("ann", channels=("app:*",))
        events = source(stage, user, "app:1")
        await events.open()
        for number in range(5):
            await stage.publish("app:1", number, text="x" * 2_000_000)
            await events.receive()
        assert events.numbers == list(range(5))
        assert stage.hub.closes == {}
        events.cut()
