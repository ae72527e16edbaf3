"""A stage for sessions: a workspace with projects, a provider row, and orchestrators on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from auth import projects
from auth.projects import Project
from orchestrator.database import Pool, open_pool
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.run import Orchestrator
from orchestrator.sessions import store
from orchestrator.sessions.record import Session
from orchestrator.settings import DatabaseSettings, OrchestratorSettings
from tests.conftest import no_task_left
from tests.integration.sessions.staged import World

DEADLINE = 30.0


@dataclass
class Stage:
    """The database's side of a test."""

    pool: Pool
    database_settings: DatabaseSettings
    settings: OrchestratorSettings
    world: World
    log: MemoryLog
    user_id: int
    workspace_id: int
    provider_id: int

    async def project(self, name: str = "shop") -> Project:
        async with self.pool.acquire() as connection:
            project_id = await connection.fetchval(
                """INSERT INTO projects (workspace_id, name, repo_url, branch, env)
                   VALUES ($1, $2, 'https://example.org/shop.git', 'main', '{"A": "1"}') RETURNING id""",
                self.workspace_id, name,
            )  # fmt: skip
            project = await projects.by_id(connection, project_id)
        assert project is not None
        return project

    async def create(self, project: Project | None = None, **kwargs: Any) -> Session:
        project = project or await self.project()
        arguments = {"user_id": self.user_id, "provider": None, "machine_config": None} | kwargs
        async with self.pool.acquire() as connection, connection.transaction():
            session, _ = await store.create(connection, project=project, **arguments)
        return session

    async def request(self, session: Session, desired: str, **kwargs: Any) -> Session:
        async with self.pool.acquire() as connection, connection.transaction():
            return await store.request(connection, session.id, desired, **kwargs)

    async def get(self, session: Session) -> Session:
        async with self.pool.acquire() as connection:
            found = await store.get(connection, session.id)
        assert found is not None
        return found

    async def until(self, session: Session, *statuses: str, **fields: Any) -> Session:
        """The session as soon as its status is one of these, and its fields are so."""

        async def there() -> Session | None:
            now = await self.get(session)
            fits = now.status in statuses and all(getattr(now, name) == value for name, value in fields.items())
            return now if fits else None

        return await until(there, lambda: self.get(session))

    @asynccontextmanager
    async def impatient(self) -> AsyncIterator[None]:
        """Let nobody wait for the end of a back-off."""

        async def hurry() -> None:
            while True:
                await self.execute(
                    """WITH due AS (
                           UPDATE sessions SET next_attempt_at = now() WHERE next_attempt_at > now() RETURNING id)
                       SELECT pg_notify('sessions', '') FROM due LIMIT 1"""
                )
                await asyncio.sleep(0.02)

        task = asyncio.create_task(hurry(), name="hurry")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def history(self, session: Session) -> list[tuple[str, str]]:
        """`(status, reason)` of the session's events, oldest first."""
        async with self.pool.acquire() as connection:
            rows = await connection.fetch(
                "SELECT status, reason FROM session_events WHERE session_id = $1 ORDER BY id", session.id
            )
        return [(row["status"], row["reason"]) for row in rows]

    async def execute(self, statement: str, *arguments: Any) -> Any:
        async with self.pool.acquire() as connection:
            # Some fill large tables, beside other tests.
            return await connection.fetchval(statement, *arguments, timeout=DEADLINE)

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        async with self.pool.acquire() as connection:
            return await connection.fetch(statement, *arguments)

    def orchestrator(
        self, *, pool: Pool | None = None, grace: float = 0.1, alone: bool = False, **settings: Any
    ) -> Orchestrator:
        return Orchestrator(
            settings=replace(self.settings, **settings),
            database_settings=self.database_settings,
            pool=pool or self.pool,
            log=self.log,
            open_provider=self.world.open,
            grace=grace,
            alone=alone,
        )

    @asynccontextmanager
    async def running(self, **kwargs: Any) -> AsyncIterator[Orchestrator]:
        """An orchestrator at work; one that dies fails the test, and the only one may leave no task behind."""
        orchestrator = self.orchestrator(**kwargs)
        async with nullcontext() if "pool" in kwargs else no_task_left():
            task = asyncio.create_task(orchestrator.run(), name="orchestrator")
            try:
                yield orchestrator
            finally:
                task.cancel()
                await asyncio.wait({task}, timeout=DEADLINE)
            assert task.cancelled(), task


async def until(there: Callable[[], Awaitable[Any]], otherwise: Callable[[], Awaitable[Any]] | None = None) -> Any:
    """The first true answer, within a deadline; `otherwise` says what there is instead."""
    try:
        async with asyncio.timeout(DEADLINE):
            while not (answer := await there()):
                await asyncio.sleep(0.005)
            return answer
    except TimeoutError:
        pass
    raise AssertionError(f"did not come about; instead: {await otherwise() if otherwise else 'nothing'}")


@pytest.fixture
def world() -> World:
    return World()


@pytest_asyncio.fixture
async def stage(pool: Pool, database_settings: DatabaseSettings, world: World, tmp_path: Path) -> AsyncIterator[Stage]:
    async with pool.acquire() as connection:
        user_id = await connection.fetchval("INSERT INTO users (email, name) VALUES ('a@b.c', 'Ann') RETURNING id")
        workspace_id = await connection.fetchval("INSERT INTO workspaces (name) VALUES ('team') RETURNING id")
        await connection.execute(
            "INSERT INTO workspace_members (workspace_id, user_id, role) VALUES ($1, $2, 'owner')",
            workspace_id,
            user_id,
        )
        provider_id = await connection.fetchval(
            "INSERT INTO providers (name, kind, is_default) VALUES ('staged', 'docker', true) RETURNING id"
        )
        await connection.execute(
            """INSERT INTO machine_configs (name, provider_id, is_default, cpu, services)
               VALUES ('small', $1, true, 1, '{"preview": {"command": ["serve"]}}')""",
            provider_id,
        )
    log = MemoryLog()
    settings = OrchestratorSettings(
        data_dir=tmp_path, lease=2.0, poll_interval=1.0, resync_interval=30.0, start_deadline=30.0
    )
    yield Stage(pool, database_settings, settings, world, log, user_id, workspace_id, provider_id)
    await log.close()


@pytest_asyncio.fixture
async def own_pool(database_settings: DatabaseSettings) -> AsyncIterator[Pool]:
    """A second pool, for what is to be killed."""
    pool = await open_pool(database_settings, name="test")
    yield pool
    pool.terminate()
