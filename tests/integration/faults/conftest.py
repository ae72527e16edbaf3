"""A stage on the run's RabbitMQ or on one that may be killed; nothing of it is left when the test ends."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator.database import open_pool
from orchestrator.settings import AmqpSettings, DatabaseSettings
from tests.conftest import no_task_left
from tests.integration.faults.stage import Stage

# Seconds that RabbitMQ may take: short, since what is tested is what comes after.
TIMEOUT = 5.0

MakeStage = Callable[[str], AbstractAsyncContextManager[Stage]]


@pytest.fixture
def stage_on(database_settings: DatabaseSettings) -> MakeStage:
    """Makes a stage on the RabbitMQ of a URL."""

    @asynccontextmanager
    async def make(amqp_url: str) -> AsyncIterator[Stage]:
        with tempfile.TemporaryDirectory(prefix="cc-faults-") as folder:
            pool = await open_pool(database_settings, name="faults")
            try:
                user_id = await pool.fetchval(
                    "INSERT INTO users (email, name) VALUES ('faults@example.org', 'f') RETURNING id"
                )
                async with no_task_left(), AsyncExitStack() as stack:
                    stage = Stage(
                        pool, database_settings, AmqpSettings(amqp_url, timeout=TIMEOUT), Path(folder), user_id, stack
                    )
                    try:
                        yield stage
                    finally:
                        await stage.leave()
            finally:
                pool.terminate()

    return make


@pytest_asyncio.fixture
async def stage(stage_on: MakeStage, amqp_url: str) -> AsyncIterator[Stage]:
    """A stage in a virtual host of its own."""
    async with stage_on(amqp_url) as stage:
        yield stage
