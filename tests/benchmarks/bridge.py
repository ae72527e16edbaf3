"""The bridge in the watch's benchmark: informers, the sessions' rows and their events, on a real PostgreSQL.

Only our own process is counted, PostgreSQL is another one. The relay that sends the events on is no part of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from orchestrator.bridge.bridge import Bridge, Bridges
from orchestrator.bridge.statuses import Look
from orchestrator.database import Pool, open_pool
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.logs import LogWriter
from orchestrator.providers.kubernetes import KubernetesProvider
from orchestrator.providers.options import KubernetesOptions
from orchestrator.settings import DatabaseSettings
from tests.benchmarks.cluster import project

_NAME = "bench"
# CPU seconds in a second in which it counts as at rest.
_REST = 0.1


async def fill(url: str, count: int) -> int:
    """A provider with so many running sessions, numbered from 1; its id."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            workspace = await connection.fetchval("INSERT INTO workspaces (name) VALUES ('bench') RETURNING id")
            provider = await connection.fetchval(
                "INSERT INTO providers (name, kind) VALUES ($1, 'kubernetes') RETURNING id", _NAME
            )
            await connection.execute(
                """WITH made AS (INSERT INTO projects (workspace_id, name, uuid)
                                 SELECT $1, 'project', uuid FROM unnest($3::uuid[]) AS uuid RETURNING id, uuid)
                   INSERT INTO sessions (id, project_id, project_uuid, workspace_id, provider_id, provider,
                                         machine_config, machine, namespace, container_name, observed_generation,
                                         status, preview_url, expires_at, updated_at)
                   OVERRIDING SYSTEM VALUE
                   SELECT number, made.id, uuid, $1, $2, $4, 'small', '{"name": "small"}', uuid::text,
                          'session-' || number, 1, 'running', 'http://there/preview', now() + interval '1 year',
                          now() - interval '1 minute'
                     FROM unnest($3::uuid[]) WITH ORDINALITY AS one (uuid, number) JOIN made USING (uuid)""",
                workspace,
                provider,
                [project(number) for number in range(1, count + 1)],
                _NAME,
                timeout=600,
            )
        await connection.execute("VACUUM ANALYZE", timeout=600)
        return int(provider)
    finally:
        await connection.close()


@asynccontextmanager
async def following(url: str, provider_id: int, kubeconfig: Path) -> AsyncIterator[Bridge]:
    """The bridge, once it follows everything and is at rest."""
    settings = DatabaseSettings(url=url)
    pool: Pool = await open_pool(settings, name="bench")
    # The cluster's pods write nothing.
    provider = KubernetesProvider(_NAME, KubernetesOptions(kubeconfig=str(kubeconfig), log_streams=0))
    logs = LogWriter(pool, MemoryLog(), keep=1000)
    bridges = Bridges(settings, pool, logs, Look(_nobody, 300.0))
    bridge = Bridge(bridges, provider_id, _NAME, provider)
    task = asyncio.create_task(bridge.run())
    try:
        async with asyncio.timeout(300):
            while not _complete(bridge):
                await asyncio.sleep(0.1)
            await rest()
        yield bridge
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])
        await provider.close()
        await pool.close()


async def rest() -> None:
    """Return once this thread has had nothing to do for a second."""
    while True:
        before = time.thread_time()
        await asyncio.sleep(1.0)
        if time.thread_time() - before < _REST:
            return


def _complete(bridge: Bridge) -> bool:
    reading = bridge.read()
    return bool(reading.resources) and all(one.lists for one in reading.resources.values()) and not reading.waiting


async def _nobody(_: int) -> None:
    """Sessions here need no inspection."""
