"""What all tests share: a real PostgreSQL, a database for each test, and an eye on what a test leaves behind."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio

import migrations
from orchestrator.database import Pool, open_pool
from orchestrator.settings import DatabaseSettings
from scripts.embedded import EmbeddedPostgres

# Tests need speed, not the survival of a power cut.
_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "100"}

_numbers = count(1)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def postgres() -> AsyncIterator[EmbeddedPostgres]:
    """A server with the database `template`, migrated. One for the whole run."""
    with tempfile.TemporaryDirectory(prefix="cluster-code-tests-") as folder:
        server = EmbeddedPostgres(Path(folder), options=_FAST)
        try:
            await server.start()
            url = await server.create_database("template")
            await asyncio.to_thread(migrations.apply, url)
            yield server
        finally:
            await server.stop()


@pytest_asyncio.fixture
async def database_url(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """The URL of a migrated, empty database that only this test has."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    yield await postgres.create_database(name, template="template")
    connection = await asyncpg.connect(postgres.url())
    try:
        await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await connection.close()


@pytest.fixture
def database_settings(database_url: str) -> DatabaseSettings:
    """The test's database, as the processes get it."""
    return DatabaseSettings(url=database_url)


@pytest_asyncio.fixture
async def pool(database_settings: DatabaseSettings) -> AsyncIterator[Pool]:
    """A pool on the test's database."""
    pool = await open_pool(database_settings, name="test")
    yield pool
    await pool.close()


@pytest_asyncio.fixture
async def connection(pool: Pool) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the test's database."""
    async with pool.acquire() as connection:
        yield connection


@asynccontextmanager
async def no_task_left() -> AsyncIterator[None]:
    """Fail when the body leaves a task behind that was not there before."""
    before = asyncio.all_tasks()
    yield
    # A fixture's end may run in another task than its beginning.
    if current := asyncio.current_task():
        before.add(current)
    async with asyncio.timeout(2):
        while any(not task.done() for task in asyncio.all_tasks() - before):
            await asyncio.sleep(0.01)
