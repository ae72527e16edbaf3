"""Apps in the database, as the queue has them; nothing here builds or runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import orjson
import pytest
import pytest_asyncio

from auth import accounts
from orchestrator.database import Pool, open_pool
from orchestrator.deployments import apps, queue, release, worker
from orchestrator.deployments.apps import App
from orchestrator.deployments.contract import AppSecrets, AppSettings
from orchestrator.deployments.record import Deployment
from orchestrator.deployments.secrets import Keyring
from orchestrator.settings import DatabaseSettings, DeploySettings
from tests.docker import Owned
from tests.integration.deployments.releasing import Site

if TYPE_CHECKING:
    from tests.integration.deployments.staged import Stage

KEYS = Keyring(["k" * 42 + "A"])


@dataclass(frozen=True)
class Place:
    """A user and the workspace that is theirs."""

    pool: Pool
    user_id: int
    workspace_id: int

    async def app(
        self,
        name: str = "shop",
        secrets: AppSecrets | None = None,
        *,
        repo_url: str = "https://git.test/shop",
        **settings: Any,
    ) -> App:
        """An app without deployments."""
        async with self.pool.acquire() as connection, connection.transaction():
            app, _ = await apps.create(
                connection, KEYS, workspace_id=self.workspace_id, created_by=self.user_id, name=name,
                repo_url=repo_url, branch=None, auto_deploy=True,
                settings=replace(AppSettings(), **settings), secrets=secrets or AppSecrets(),
            )  # fmt: skip
        return app

    async def enqueue(self, app: App, **options: Any) -> Deployment:
        """A deployment of it, which waits."""
        async with self.pool.acquire() as connection, connection.transaction():
            return await queue.enqueue(connection, app.id, **{"cause": "manual", "user_id": self.user_id, **options})

    async def set(self, deployment: Deployment, **columns: Any) -> None:
        """Do to the row what a worker would."""
        names = ", ".join(f"{name} = ${place}" for place, name in enumerate(columns, start=2))
        async with self.pool.acquire() as connection:
            statement = f"UPDATE deployments SET {names} WHERE id = $1"  # noqa: S608  Our own names.
            await connection.execute(statement, deployment.id, *columns.values())

    async def told(self) -> list[tuple[str, str, dict[str, Any]]]:
        """What was told since the last look: event type, channel, data."""
        async with self.pool.acquire() as connection:
            return await told(connection)


async def told(connection: asyncpg.Connection) -> list[tuple[str, str, dict[str, Any]]]:
    """The same, within a transaction."""
    rows = await connection.fetch("DELETE FROM outbox RETURNING id, event_type, channel, data::text AS data")
    rows.sort(key=lambda row: row["id"])
    return [(row["event_type"], row["channel"], orjson.loads(row["data"])) for row in rows]


@pytest_asyncio.fixture
async def place(pool: Pool) -> Place:
    """Where apps can be."""
    async with pool.acquire() as connection:
        user = await accounts.register(connection, "ann@example.test", None, "Ann")
        workspace = await connection.fetchval("SELECT id FROM workspaces WHERE personal_user_id = $1", user.id)
    return Place(pool, user.id, workspace)


@pytest_asyncio.fixture
async def stage(
    place: Place, database_settings: DatabaseSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Stage:
    """Where workers can be, with an engine that does what a test says."""
    # What no hint announces is seen soon.
    monkeypatch.setattr(worker, "POLL", 0.2)
    monkeypatch.setattr(worker, "_PATIENCE", 0.2)
    from tests.integration.deployments.staged import Stage

    settings = DeploySettings(directory=tmp_path / "deployments", lease=15.0, secrets_key=["k" * 42 + "A"])
    return Stage(place, database_settings, settings)


@pytest_asyncio.fixture
async def own(database_settings: DatabaseSettings) -> AsyncIterator[Pool]:
    """A second pool, named `own`, whose connections are cut."""
    pool = await open_pool(database_settings, name="own")
    yield pool
    pool.terminate()


@pytest_asyncio.fixture
async def site(owned: Owned, busybox: str, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Where an app can be released, on a network of its own; what is waited for on Traefik's account is short."""
    monkeypatch.setattr(release, "LETS_GO", 0.1)
    monkeypatch.setattr(release, "STEADY", 0.1)
    settings = DeploySettings(
        base_domain="apps.test", network=owned.instance, instance=owned.instance, probe_deadline=30.0, drain=0.1
    )
    return Site(owned, busybox, settings, owned.instance)
