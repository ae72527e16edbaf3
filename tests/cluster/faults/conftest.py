"""A ground for each test; what stops and freezes the API server, where a command for that is named."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from auth import accounts
from orchestrator.cluster.client import Cluster
from orchestrator.database import Pool
from orchestrator.settings import DatabaseSettings
from tests.cluster.faults.ground import DEADLINE, Ground
from tests.conftest import no_task_left

Control = Callable[[str], Awaitable[None]]

_HOW_TO_CONTROL = "no outage to be had: set CLUSTER_CONTROL to a command with stop-api, start-api, freeze-api, thaw-api"


@pytest_asyncio.fixture
async def ground(
    pool: Pool, cluster: Cluster, kubeconfig: Path, database_settings: DatabaseSettings, amqp_url: str, tmp_path: Path
) -> AsyncIterator[Ground]:
    """Sessions of an installation of the test's own; nothing of it is left in the end."""
    async with pool.acquire() as connection:
        user = await accounts.register(connection, "a@example.org", None, "A")
        workspace_id = await connection.fetchval("SELECT id FROM workspaces")
    (folder := tmp_path / "logs").mkdir()
    environment = {
        "DATABASE_URL": database_settings.url,
        "AMQP_URL": amqp_url,
        "DATA_DIR": str(tmp_path / "data"),
    }
    async with no_task_left():
        ground = Ground(pool, cluster, folder, environment, kubeconfig, user.id, workspace_id)
        try:
            yield ground
        finally:
            await ground.close()


@pytest.fixture
def control(kubeconfig: Path) -> Control:
    """Stages an outage of the API server: `stop-api`, `start-api`, `freeze-api` or `thaw-api`."""
    command = os.environ.get("CLUSTER_CONTROL")
    if not command:
        if os.environ.get("CI"):
            pytest.fail(_HOW_TO_CONTROL, pytrace=False)
        pytest.skip(_HOW_TO_CONTROL)

    async def control(verb: str) -> None:
        process = await asyncio.create_subprocess_exec(command, verb, stdin=asyncio.subprocess.DEVNULL)
        async with asyncio.timeout(DEADLINE):
            assert await process.wait() == 0, verb

    return control
