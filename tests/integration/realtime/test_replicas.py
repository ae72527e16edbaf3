"""Two gateways on one log: presence, administration and revocation reach both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from auth.tokens import TokenSettings
from gateway.app import build
from gateway.context import CONTEXT, Context
from gateway.realtime import inquiries, replicas
from gateway.realtime.replicas import Replicas
from gateway.settings import GatewaySettings
from orchestrator.database import Pool
from orchestrator.eventlog import outbox
from orchestrator.eventlog.contract import EventLog
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.eventlog.rabbitmq import RabbitLog
from orchestrator.events import GATEWAY, Event
from orchestrator.settings import AmqpSettings, DatabaseSettings
from tests.conftest import no_task_left
from tests.integration.realtime.client import Client

SETTINGS = GatewaySettings(rate_limit_address="off", rate_limit_user="off", rate_limit_login="off")
TOKENS = TokenSettings(secret="6f1e0f1c5d3b4a29b8a7c6d5e4f30211")
# Every answer that there is comes on a busy machine, too.
PATIENCE = 20.0


async def until(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass
class Replica:
    """One gateway."""

    app: web.Application
    server: TestServer
    session: aiohttp.ClientSession
    clients: list[Client] = field(default_factory=list)

    @property
    def context(self) -> Context:
        return self.app[CONTEXT]

    @property
    def replicas(self) -> Replicas:
        return self.context.replicas

    async def call(self, method: str, path: str, token: str, json: Any = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}"}
        async with self.session.request(method, self.server.make_url(path), headers=headers, json=json) as answer:
            return answer.status, await answer.json(content_type=None) if await answer.read() else None

    async def connect(self, token: str, *channels: str) -> Client:
        async def short() -> str:
            return (await self.call("POST", "/api/v1/auth", token))[1]["short_token"]

        client = Client(self.session, str(self.server.make_url("/ws")), short)
        await client.connect(channels=channels)
        self.clients.append(client)
        return client


@dataclass
class Pair:
    """Two gateways, each with its own log client, and a relay of the outbox."""

    pool: Pool
    first: Replica
    second: Replica

    async def user(self, name: str, *, is_admin: bool = False) -> tuple[int, str]:
        """A new user's id and main token."""
        number = await self.pool.fetchval(
            "INSERT INTO users (email, name, is_admin) VALUES ($1, $2, $3) RETURNING id",
            f"{name}@example.org",
            name,
            is_admin,
        )
        return number, self.first.context.tokens.issue_main(number)

    async def audited(self) -> list[tuple[int, str, str]]:
        rows = await self.pool.fetch("SELECT actor_id, action, object FROM audit_log ORDER BY id")
        return [tuple(row) for row in rows]


@asynccontextmanager
async def gateway(pool: Pool, log: EventLog, database: DatabaseSettings) -> AsyncIterator[Replica]:
    app = build(SETTINGS, TOKENS, pool, log, database)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        replica = Replica(app, server, session)
        await until(lambda: replica.context.feed.ready)
        yield replica
        await asyncio.gather(*(client.close() for client in replica.clients))


async def relay(pool: Pool, log: EventLog) -> None:
    while True:
        async with pool.acquire() as connection:
            await outbox.relay_batch(connection, log)
        await asyncio.sleep(0.02)


@asynccontextmanager
async def opened(pool: Pool, database: DatabaseSettings, logs: tuple[EventLog, EventLog]) -> AsyncIterator[Pair]:
    async with no_task_left(), gateway(pool, logs[0], database) as first, gateway(pool, logs[1], database) as second:
        both = {first.replicas.id, second.replicas.id}
        await until(lambda: first.replicas.alive == second.replicas.alive == both)
        task = asyncio.create_task(relay(pool, logs[0]))
        try:
            yield Pair(pool, first, second)
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.fixture
async def pair(pool: Pool, database_settings: DatabaseSettings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    monkeypatch.setattr(replicas, "DEADLINE", PATIENCE)
    log = MemoryLog()
    async with opened(pool, database_settings, (log, log)) as pair:
        yield pair
    await log.close()


@pytest.fixture
async def rabbit_pair(
    pool: Pool, database_settings: DatabaseSettings, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pair]:
    monkeypatch.setattr(replicas, "DEADLINE", PATIENCE)
    async with AsyncExitStack() as stack:
        logs = []
        for name in ("first", "second"):
            log = await RabbitLog.open(AmqpSettings(url=amqp_url, timeout=PATIENCE), name=name)
            stack.push_async_callback(log.close)
            logs.append(log)
        async with opened(pool, database_settings, (logs[0], logs[1])) as pair:
            yield pair


async def see_who_is_there(pair: Pair) -> None:
    ann, token = await pair.user("ann")
    bob, bobs = await pair.user("bob")
    _, strangers = await pair.user("eve")
    workspace = await pair.pool.fetchval("INSERT INTO workspaces (name) VALUES ('w') RETURNING id")
    for member in (ann, bob):
        await pair.pool.execute("INSERT INTO workspace_members VALUES ($1, $2, 'viewer')", workspace, member)
    channel = f"workspace:{workspace}"
    await pair.second.connect(bobs, channel)
    for gateway in (pair.first, pair.second, pair.second):
        await gateway.connect(token, channel)
    await pair.first.connect(bobs)
    for gateway in (pair.first, pair.second):
        status, told = await gateway.call("GET", f"/api/v1/channels/{channel}/presence", token)
        assert status == 200
        assert [(user["id"], user["name"], user["connections"]) for user in told["users"]] == [
            (bob, "bob", 1),
            (ann, "ann", 3),
        ]
        assert told["users"][0]["since"] < told["users"][1]["since"]
        assert (told["channel"], told["complete"]) == (channel, True)
    assert (await pair.first.call("GET", f"/api/v1/channels/{channel}/presence", strangers))[0] == 404


async def disconnect_somebody(pair: Pair) -> None:
    root, admins = await pair.user("root", is_admin=True)
    ann, token = await pair.user("ann")
    clients = [await pair.first.connect(token), await pair.second.connect(token), await pair.second.connect(token)]
    other = await pair.second.connect(admins)
    _, told = await pair.first.call("GET", f"/api/v1/admin/connections?user_id={ann}", admins)
    assert (told["total"], told["complete"]) == (3, True)
    # The newest of all: the last of the second gateway's.
    newest = told["items"][0]
    assert newest["replica"] == pair.second.replicas.id
    closing = {"connection_id": newest["id"]}
    assert await pair.first.call("POST", "/api/v1/admin/disconnect", admins, closing) == (
        200,
        {"disconnected": 1, "complete": True},
    )
    assert await clients.pop().closed() == 4503
    assert await pair.first.call("POST", "/api/v1/admin/disconnect", admins, {"user_id": ann}) == (
        200,
        {"disconnected": 2, "complete": True},
    )
    for client in clients:
        assert await client.closed() == 4503
    await other.send({"action": "ping"})
    assert (await other.receive())["event_type"] == "pong"
    assert await pair.audited() == [
        (root, "connection.close", f"connection:{newest['id']}"),
        (root, "connection.close", f"user:{ann}"),
    ]


async def revoke_tokens(pair: Pair) -> None:
    root, admins = await pair.user("root", is_admin=True)
    ann, token = await pair.user("ann")
    other = pair.second.context.tokens.issue_main(ann)
    by_one, by_other = await pair.second.connect(token), await pair.second.connect(other)
    _, told = await pair.first.call("GET", f"/api/v1/admin/connections?user_id={ann}", admins)
    token_id = told["items"][1]["token_id"]
    revoking = {"user_id": ann, "token_id": token_id}
    assert await pair.first.call("POST", "/api/v1/admin/revoke", admins, revoking) == (204, None)
    for gateway in (pair.first, pair.second):
        assert (await gateway.call("GET", "/api/v1/users/me", token))[0] == 401
        assert (await gateway.call("GET", "/api/v1/users/me", other))[0] == 200
    assert await by_one.closed() == 4500
    await by_other.send({"action": "ping"})
    assert (await by_other.receive())["event_type"] == "pong"
    assert (await pair.first.call("POST", "/api/v1/admin/revoke", admins, {"user_id": ann}))[0] == 204
    assert (await pair.second.call("GET", "/api/v1/users/me", other))[0] == 401
    assert await by_other.closed() == 4500
    assert await pair.audited() == [(root, "token.revoke", f"user:{ann}")] * 2


async def test_presence_is_that_of_all_gateways(pair: Pair) -> None:
    await see_who_is_there(pair)


async def test_connections_are_closed_at_all_gateways(pair: Pair) -> None:
    await disconnect_somebody(pair)


async def test_tokens_are_revoked_at_all_gateways(pair: Pair) -> None:
    await revoke_tokens(pair)


async def test_presence_over_rabbitmq(rabbit_pair: Pair) -> None:
    await see_who_is_there(rabbit_pair)


async def test_disconnecting_over_rabbitmq(rabbit_pair: Pair) -> None:
    await disconnect_somebody(rabbit_pair)


async def test_revocation_over_rabbitmq(rabbit_pair: Pair) -> None:
    await revoke_tokens(rabbit_pair)


async def test_administrators_see_every_connection_and_nobody_else_does(pair: Pair) -> None:
    _, admins = await pair.user("root", is_admin=True)
    ann, token = await pair.user("ann")
    await pair.second.connect(token, "broadcast", *(f"user:{ann}",))
    await pair.first.connect(admins, "broadcast", *(f"app:{n}" for n in range(20)))
    _, told = await pair.second.call("GET", "/api/v1/admin/connections", admins)
    admin, anns = told["items"]
    assert (told["total"], told["complete"]) == (2, True)
    assert (admin["replica"], admin["channel_count"]) == (pair.first.replicas.id, 22)
    assert len(admin["channels"]) == inquiries.MOST_CHANNELS
    assert anns["channels"] == [f"user:{ann}", "broadcast"]
    assert (anns["user_id"], anns["transport"], anns["address"]) == (ann, "websocket", "127.0.0.1")
    assert anns["unsent_bytes"] == 0
    assert len(anns["token_id"]) == 32
    _, one = await pair.second.call("GET", "/api/v1/admin/connections?limit=1&channel=broadcast", admins)
    assert ([item["id"] for item in one["items"]], one["total"]) == ([admin["id"]], 2)
    for method, path, body in (
        ("GET", "connections", None),
        ("POST", "disconnect", {"user_id": ann}),
        ("POST", "revoke", {"user_id": ann}),
    ):
        assert (await pair.first.call(method, f"/api/v1/admin/{path}", token, body))[0] == 403
    assert await pair.audited() == []


async def test_who_listens_to_broadcast_is_for_administrators(pair: Pair) -> None:
    _, admins = await pair.user("root", is_admin=True)
    _, token = await pair.user("ann")
    await pair.second.connect(token, "broadcast")
    assert (await pair.first.call("GET", "/api/v1/channels/broadcast/presence", token))[0] == 403
    _, told = await pair.first.call("GET", "/api/v1/channels/broadcast/presence", admins)
    assert [user["name"] for user in told["users"]] == ["ann"]
    for channel in ("nonsense", "x" * 201, "user:%ff"):
        assert (await pair.first.call("GET", f"/api/v1/channels/{channel}/presence", admins))[0] == 404
    assert (await pair.first.call("GET", "/api/v1/channels/app:a%2Fb/presence", admins))[1]["channel"] == "app:a/b"


@pytest.mark.parametrize("body", [{}, {"user_id": 1, "connection_id": "x"}, {"user_id": 0}])
async def test_whom_to_disconnect_must_be_said(pair: Pair, body: dict[str, Any]) -> None:
    _, admins = await pair.user("root", is_admin=True)
    assert (await pair.first.call("POST", "/api/v1/admin/disconnect", admins, body))[0] == 422


async def test_nobody_to_disconnect_and_nobody_to_revoke(pair: Pair) -> None:
    _, admins = await pair.user("root", is_admin=True)
    for body in ({"user_id": 999}, {"connection_id": "none"}):
        _, told = await pair.first.call("POST", "/api/v1/admin/disconnect", admins, body)
        assert told == {"disconnected": 0, "complete": True}
    assert (await pair.first.call("POST", "/api/v1/admin/revoke", admins, {"user_id": 999}))[0] == 404


async def test_signing_out_closes_what_the_sign_in_has_opened_and_everywhere_all_of_it(pair: Pair) -> None:
    account = {"email": "ann@example.org", "password": "correct horse battery"}
    await pair.first.call("POST", "/api/v1/auth/register", "", {**account, "name": "Ann"})
    signed_in = [(await pair.first.call("POST", "/api/v1/auth/login", "", account))[1] for _ in range(4)]
    clients = [await pair.second.connect(one["access_token"]) for one in signed_in]
    leaving = {"refresh_token": signed_in[0]["refresh_token"]}
    assert (await pair.first.call("POST", "/api/v1/auth/logout", "", leaving))[0] == 204
    assert await clients[0].closed() == 4500
    statuses = [(await pair.second.call("GET", "/api/v1/users/me", one["access_token"]))[0] for one in signed_in]
    assert statuses == [401, 200, 200, 200]
    leaving = {"refresh_token": signed_in[1]["refresh_token"], "everywhere": True}
    assert (await pair.first.call("POST", "/api/v1/auth/logout", "", leaving))[0] == 204
    for client in clients[1:]:
        assert await client.closed() == 4500
    renewing = {"refresh_token": signed_in[3]["refresh_token"]}
    assert (await pair.first.call("POST", "/api/v1/auth/refresh", "", renewing))[0] == 401


async def test_a_refresh_token_that_is_used_twice_closes_what_its_sign_in_has_opened(pair: Pair) -> None:
    account = {"email": "ann@example.org", "password": "correct horse battery"}
    await pair.first.call("POST", "/api/v1/auth/register", "", {**account, "name": "Ann"})
    signed_in = (await pair.first.call("POST", "/api/v1/auth/login", "", account))[1]
    client = await pair.second.connect(signed_in["access_token"])
    renewing = {"refresh_token": signed_in["refresh_token"]}
    statuses = [(await pair.first.call("POST", "/api/v1/auth/refresh", "", renewing))[0] for _ in range(2)]
    assert statuses == [200, 401]
    assert await client.closed() == 4500


async def test_a_replica_that_does_not_answer_makes_the_answer_incomplete(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "DEADLINE", 0.1)
    _, token = await pair.user("ann")
    await pair.first.context.log.publish([Event(replicas.ALIVE, GATEWAY, {"replica": "stuck", "is_new": True})])
    await until(lambda: "stuck" in pair.first.replicas.alive)
    assert (await pair.first.replicas.ask(inquiries.PRESENCE, {"channel": "app:1"})).complete is False
    assert pair.first.replicas.incomplete == 1
    monkeypatch.setattr(replicas, "DEADLINE", PATIENCE)
    # Whoever says goodbye meanwhile is not waited for.
    asking = asyncio.create_task(pair.first.replicas.ask(inquiries.PRESENCE, {"channel": "app:1"}))
    await until(lambda: pair.first.replicas._pending)
    await pair.first.context.log.publish([Event(replicas.GONE, GATEWAY, {"replica": "stuck"})])
    answers = await asking
    assert answers.complete
    assert set(answers.by_replica) == {pair.first.replicas.id, pair.second.replicas.id}
    assert (await pair.first.call("GET", "/api/v1/users/me", token))[0] == 200


async def test_a_replica_that_falls_silent_is_taken_for_dead(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await pair.first.context.log.publish([Event(replicas.ALIVE, GATEWAY, {"replica": "dead", "is_new": False})])
    await until(lambda: "dead" in pair.first.replicas.alive)
    pair.first.replicas._heard["dead"] -= replicas.SILENCE
    assert pair.first.replicas.alive == {pair.first.replicas.id, pair.second.replicas.id}


async def test_a_replica_that_ends_is_missed_by_nobody(pool: Pool, database_settings: DatabaseSettings) -> None:
    log = MemoryLog()
    async with gateway(pool, log, database_settings) as first:
        async with gateway(pool, log, database_settings):
            await until(lambda: len(first.replicas.alive) == 2)
        await until(lambda: first.replicas.alive == {first.replicas.id})
        # One that begins does not believe what the log tells of former times.
        async with gateway(pool, log, database_settings) as third:
            await until(lambda: third.replicas.alive == {first.replicas.id, third.replicas.id})
    await log.close()


async def test_while_the_log_is_away_a_gateway_speaks_for_itself_and_says_so(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, admins = await pair.user("root", is_admin=True)
    ann, token = await pair.user("ann")
    here, there = await pair.first.connect(token), await pair.second.connect(token)
    # Closed for publishing; the readers do not notice.
    monkeypatch.setattr(pair.first.context.log, "_closed", True)
    _, told = await pair.first.call("POST", "/api/v1/admin/disconnect", admins, {"user_id": ann})
    assert told == {"disconnected": 1, "complete": False}
    assert await here.closed() == 4503
    monkeypatch.undo()
    await there.send({"action": "ping"})
    assert (await there.receive())["event_type"] == "pong"


async def test_wrong_and_unknown_control_events_are_passed_over(pair: Pair) -> None:
    feed = pair.first.context.feed
    before = feed.invalid
    await feed._log.publish(
        [
            Event(replicas.ALIVE, GATEWAY, {}),
            Event(replicas.QUESTION, GATEWAY, {"replica": "x", "id": "1"}),
            Event(replicas.QUESTION, GATEWAY, {"replica": "x", "id": "1", "question": "of tomorrow", "data": {}}),
            Event(replicas.ANSWER, GATEWAY, {"replica": "x", "id": "nobody's", "data": {}}),
            Event("gateway.of-tomorrow", GATEWAY, {}),
        ]
    )
    await until(lambda: feed.invalid == before + 2)
