"""The gateway on a real database, with the log in memory: what all tests of the HTTP edge start from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest_asyncio
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from auth import accounts, projects, tenants
from auth.permissions import Role
from auth.tokens import TokenSettings
from gateway.app import build
from gateway.context import CONTEXT, Context
from gateway.settings import GatewaySettings
from orchestrator.database import Pool
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.settings import DatabaseSettings

SECRET = "tests-sign-their-tokens-with-this-0123456789"
# No test but that of the limits themselves wants to meet one.
SETTINGS = GatewaySettings(rate_limit_address="", rate_limit_user="", rate_limit_login="")

_numbers = count(1)


@dataclass
class Person:
    """A user with a main token."""

    id: int
    email: str
    token: str
    workspace_id: int


@dataclass
class Answer:
    """What came back, read."""

    status: int
    headers: Any
    body: bytes
    json: Any

    @property
    def errors(self) -> dict[str, list[str]]:
        """The wrong fields of a problem document."""
        return self.json.get("errors", {})


@dataclass
class Api:
    """A client of one running gateway, and the way behind its back."""

    client: TestClient[Any, Any]
    pool: Pool
    context: Context
    people: dict[str, Person] = field(default_factory=dict)

    async def call(
        self, method: str, path: str, who: Person | str | None = None, json: Any = None, **options: Any
    ) -> Answer:
        """Send one request as `who` (a person, or a bare token)."""
        headers = dict(options.pop("headers", {}))
        if who is not None:
            headers["Authorization"] = f"Bearer {who.token if isinstance(who, Person) else who}"
        if json is not None:
            options["json"] = json
        async with self.client.request(method, path, headers=headers, **options) as response:
            return await _read(response)

    async def person(self, *, is_admin: bool = False) -> Person:
        """A new user. Has no password: the tests of signing in register theirs."""
        email = f"user{next(_numbers)}@example.test"
        async with self.pool.acquire() as connection:
            user = await accounts.register(connection, email, None, "Somebody", is_admin=is_admin)
            workspace = await connection.fetchval("SELECT id FROM workspaces WHERE personal_user_id = $1", user.id)
        return Person(user.id, email, self.context.tokens.issue_main(user.id), workspace)

    async def workspace(self, owner: Person, **members: Person) -> int:
        """A workspace with members by role: `workspace(ann, viewer=bob)`."""
        async with self.pool.acquire() as connection:
            made = await tenants.create(connection, "team", owner.id)
            for role, person in members.items():
                await tenants.add_member(connection, made.id, person.id, Role[role.upper()], by=Role.OWNER)
        return made.id

    async def project(self, workspace_id: int, uuid: UUID | None = None) -> dict[str, Any]:
        """A project; its id and UUID."""
        async with self.pool.acquire() as connection:
            made = await projects.create(connection, workspace_id, name="site", uuid=uuid or uuid4())
        return {"id": made.id, "uuid": str(made.uuid)}

    async def session(self, who: Person, project: dict[str, Any]) -> dict[str, Any]:
        """A session of the project, as it is answered."""
        answer = await self.call("POST", "/api/v1/sessions", who, {"project_uuid": project["uuid"]})
        assert answer.status == 201, answer.json
        return dict(answer.json)

    async def fetch(self, query: str, *args: Any) -> list[asyncpg.Record]:
        """Look at the database."""
        async with self.pool.acquire() as connection:
            return list(await connection.fetch(query, *args))


async def _read(response: ClientResponse) -> Answer:
    body = await response.read()
    is_json = response.content_type in ("application/json", "application/problem+json")
    return Answer(response.status, response.headers, body, await response.json(content_type=None) if is_json else None)


Serve = Callable[..., Any]


@pytest_asyncio.fixture
async def serve(pool: Pool, database_settings: DatabaseSettings) -> AsyncIterator[Serve]:
    """Start a gateway with other settings: `await serve(registration=False)`."""
    async with AsyncExitStack() as stack:

        async def start(token_settings: TokenSettings | None = None, **changes: Any) -> Api:
            log = MemoryLog()
            stack.push_async_callback(log.close)
            settings = replace(SETTINGS, **changes)
            app = build(settings, token_settings or TokenSettings(secret=SECRET), pool, log, database_settings)
            client = await stack.enter_async_context(TestClient(TestServer(app)))
            return Api(client, pool, app[CONTEXT])

        yield start


@pytest_asyncio.fixture
async def api(serve: Serve) -> Api:
    """A gateway with the usual settings, and a place where sessions could run."""
    api: Api = await serve()
    await api.fetch(
        """WITH p AS (INSERT INTO providers (name, kind, is_default) VALUES ('here', 'local', true) RETURNING id)
           INSERT INTO machine_configs (name, provider_id, is_default, cpu, memory_bytes, services)
           SELECT 'small', id, true, 1, 1 << 30, '{"preview": {"command": ["true"]}}' FROM p"""
    )
    return api


@pytest_asyncio.fixture
async def ann(api: Api) -> Person:
    """Somebody."""
    return await api.person()


@pytest_asyncio.fixture
async def bob(api: Api) -> Person:
    """Somebody else."""
    return await api.person()


@pytest_asyncio.fixture
async def root(api: Api) -> Person:
    """An administrator."""
    return await api.person(is_admin=True)
