"""A server that serves `/ws` and nothing else, on a real database and the log in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from auth.errors import Forbidden, Unauthenticated
from auth.permissions import Identity
from auth.tokens import Tokens, TokenSettings
from gateway.context import CONTEXT, Context
from gateway.problems import Problem
from gateway.realtime import sse, websocket
from gateway.realtime.archive import Archive
from gateway.realtime.feed import Feed
from gateway.realtime.history import History
from gateway.realtime.hub import Hub
from gateway.realtime.replicas import Replicas
from gateway.realtime.sse import Encoder
from gateway.settings import GatewaySettings, RealtimeSettings
from orchestrator.database import UNAVAILABLE, Pool, open_pool
from orchestrator.eventlog.contract import EventLog
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.events import Event
from orchestrator.settings import DatabaseSettings
from tests.conftest import no_task_left
from tests.integration.realtime.client import Client

TOKENS = TokenSettings(secret="6f1e0f1c5d3b4a29b8a7c6d5e4f30211")


@web.middleware
async def problems(request: web.Request, handler: Any) -> web.StreamResponse:
    """The part of the gateway's middleware that refused handshakes need."""
    try:
        return await handler(request)
    except Problem as problem:
        return problem.response("test")
    except Unauthenticated as error:
        return Problem(401, str(error)).response("test")
    except Forbidden as error:
        return Problem(403, str(error)).response("test")
    except UNAVAILABLE:
        return Problem(503, "The database does not answer.").response("test")


@dataclass
class Stage:
    """One gateway, and the means to make users, channels, events and clients."""

    pool: Pool
    log: EventLog
    context: Context
    server: TestServer
    session: aiohttp.ClientSession
    feed: asyncio.Task[None]
    tokens: Tokens = field(default_factory=lambda: Tokens(TOKENS))
    clients: list[Client] = field(default_factory=list)

    @property
    def hub(self) -> Hub:
        return self.context.hub

    @property
    def url(self) -> str:
        return str(self.server.make_url("/ws"))

    def client(self, identity: Identity, channels: list[str] | None = None) -> Client:
        async def token() -> str:
            return self.tokens.issue_short(identity, channels)

        self.clients.append(Client(self.session, self.url, token))
        return self.clients[-1]

    async def refused(self, url: str = "", **options: Any) -> tuple[int, dict[str, Any], Any]:
        """Status, problem and headers of a handshake that is refused."""
        headers = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            **options.pop("headers", {}),
        }
        async with self.session.get(self.url + url, headers=headers, **options) as answer:
            assert answer.content_type == "application/problem+json"
            return answer.status, orjson.loads(await answer.read()), answer.headers

    async def publish(self, channel: str, *numbers: int, **data: Any) -> None:
        await self.log.publish([Event("test.event", channel, {"n": number, **data}) for number in numbers])

    async def until(self, condition: Callable[[], object], timeout: float = 10) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.005)

    async def user(self, name: str, *, is_admin: bool = False, **fields: Any) -> Identity:
        """A new user, as its main token would show it."""
        number = await self.pool.fetchval(
            "INSERT INTO users (email, name, is_admin) VALUES ($1, $2, $3) RETURNING id",
            f"{name}@example.org",
            name,
            is_admin,
        )
        return Identity(number, f"{name}@example.org", is_admin, **fields)

    async def workspace(self, *members: Identity, role: str = "viewer") -> int:
        number = await self.pool.fetchval("INSERT INTO workspaces (name) VALUES ('w') RETURNING id")
        for member in members:
            await self.pool.execute(
                "INSERT INTO workspace_members (workspace_id, user_id, role) VALUES ($1, $2, $3::workspace_role)",
                number,
                member.user_id,
                role,
            )
        return number

    async def session_in(self, workspace: int) -> int:
        provider = await self.pool.fetchval(
            """INSERT INTO providers (name, kind) VALUES ('p', 'local')
               ON CONFLICT (name) DO UPDATE SET name = 'p' RETURNING id"""
        )
        project, uuid = await self.pool.fetchrow(
            "INSERT INTO projects (workspace_id, name) VALUES ($1, 'p') RETURNING id, uuid", workspace
        )
        return await self.pool.fetchval(
            """INSERT INTO sessions (project_id, project_uuid, workspace_id, provider_id, provider, machine_config,
                                     machine, namespace, container_name, expires_at)
               VALUES ($1, $2, $3, $4, 'p', 'm', '{}', 'n', 'c', now() + interval '1 year') RETURNING id""",
            project,
            uuid,
            workspace,
            provider,
        )


@asynccontextmanager
async def _gateway(pool: Pool, log: EventLog, settings: GatewaySettings) -> AsyncIterator[Stage]:
    history = History(log.epoch, settings.realtime.history_seconds, settings.realtime.history_bytes)
    hub = Hub(settings.realtime)
    feed = Feed(log, history, hub, pool)
    app = web.Application(middlewares=[problems])
    context = Context(
        settings,
        pool,
        Tokens(TOKENS),
        log,
        history,
        Archive(log, history, settings.realtime),
        hub,
        feed,
        Replicas(log, feed),
        Encoder(history),
        database_timeout=2.0,
    )
    app[CONTEXT] = context
    app.router.add_get("/ws", websocket.handle)
    app.router.add_get("/api/v1/events", sse.handle, allow_head=False)
    async with no_task_left():
        task = asyncio.create_task(feed.run(), name="feed under test")
        server = TestServer(app)
        await server.start_server(shutdown_timeout=1.0)
        try:
            async with aiohttp.ClientSession() as session:
                stage = Stage(pool, log, context, server, session, task)
                await stage.until(lambda: feed.ready)
                yield stage
                await asyncio.gather(*(client.close() for client in stage.clients))
                await hub.drain()
                await stage.until(lambda: not hub.by_user)
        finally:
            await server.close()
            task.cancel()
            await asyncio.wait([task])
    assert hub.connections == {}
    assert hub._subscribers == {}
    assert hub.lingering == {}


Gateway = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
async def gateway(database_settings: DatabaseSettings) -> AsyncIterator[Gateway]:
    """Makes gateways: `async with gateway(log=..., cors_origins=[...], ping_interval=...)`."""
    own = await open_pool(database_settings, name="test")
    real_time = set(RealtimeSettings.__slots__)

    def make(
        *, log: EventLog | None = None, pool: Pool | None = None, **fields: Any
    ) -> AbstractAsyncContextManager[Stage]:
        limits = replace(RealtimeSettings(), **{name: fields.pop(name) for name in tuple(fields) if name in real_time})
        return _gateway(pool or own, log or MemoryLog(), replace(GatewaySettings(), realtime=limits, **fields))

    yield make
    await own.close()


@pytest.fixture
async def stage(gateway: Gateway) -> AsyncIterator[Stage]:
    """One gateway with the usual settings."""
    async with gateway() as stage:
        yield stage
