"""PostgreSQL goes away and comes back while the outbox is relayed: what was committed is told, once and in order."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from uuid import uuid4

import asyncpg
import pytest
import pytest_asyncio

import migrations
from orchestrator.database import UNAVAILABLE, Wakeup, listen
from orchestrator.eventlog import outbox
from orchestrator.events import Event
from orchestrator.settings import DatabaseSettings
from scripts.embedded import EmbeddedPostgres
from tests.integration.faults.conftest import MakeStage
from tests.integration.faults.stage import caught_up, until
from tests.integration.faults.viewer import Viewer, prove

pytestmark = pytest.mark.timeout(200)

CHANNEL = "app:one"


@pytest_asyncio.fixture
async def own_postgres() -> AsyncIterator[EmbeddedPostgres]:
    """A server that the test may kill. What it has acknowledged survives that, but for a power cut."""
    with tempfile.TemporaryDirectory(prefix="cc-pg-") as folder:
        server = EmbeddedPostgres(Path(folder), options={"fsync": "off"})
        try:
            await server.start()
            url = await server.create_database("outbox")
            await asyncio.to_thread(migrations.apply, url)
            connection = await asyncpg.connect(url)
            await connection.execute("CREATE TABLE committed (n int PRIMARY KEY)")
            await connection.close()
            yield server
        finally:
            await server.stop()


@pytest.fixture
def database_settings(own_postgres: EmbeddedPostgres) -> DatabaseSettings:
    """Instead of the run's: the gateways of these tests and the relay share the server that is killed."""
    return DatabaseSettings(url=own_postgres.url("outbox"), timeout=1.0)


async def test_what_is_committed_while_postgres_is_killed_again_and_again_is_told_once(
    stage_on: MakeStage, amqp_url: str, own_postgres: EmbeddedPostgres, database_settings: DatabaseSettings
) -> None:
    async with stage_on(amqp_url) as stage, stage.gateway(), stage.gateway():
        viewers = await stage.audience(10, [CHANNEL])
        wakeup = Wakeup()
        # Two, as two orchestrators have: one leads, and another takes over.
        logs = [await stage.log("one"), await stage.log("two")]
        tasks = [
            asyncio.create_task(listen(database_settings, {"outbox": wakeup})),
            asyncio.create_task(own_postgres.supervise()),
            *(asyncio.create_task(outbox.relay(database_settings, log, wakeup, 0.2, batch=7)) for log in logs),
        ]
        sent: Counter[str] = Counter()
        committing = asyncio.create_task(commit(database_settings, sent))
        try:
            for end in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
                await further(viewers, sent)
                before = own_postgres.pid
                os.kill(before, end)
                await until(lambda before=before: own_postgres.pid not in (None, before))
            await further(viewers, sent)
            # Clients that come back meanwhile find the database again, too.
            for viewer in viewers:
                viewer.cut()
            await asyncio.gather(*(viewer.until(lambda v=viewer: v.connections == 2) for viewer in viewers))
        finally:
            committing.cancel()
            await asyncio.wait([committing])
            # What was being committed when it was cancelled is either there or not.
            try:
                sent[CHANNEL] = await highest(database_settings)
                await caught_up(viewers, sent)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        assert prove(viewers, sent) == 10 * sent[CHANNEL]
        assert all(len(viewer.segments[CHANNEL]) == 1 for viewer in viewers)
        assert await waiting(database_settings) == 0
        await stage.leave()


async def further(viewers: list[Viewer], sent: Counter[str]) -> None:
    """Return once each viewer has got some that were not committed before."""
    goal = sent[CHANNEL] + 60
    await asyncio.gather(*(viewer.until(lambda v=viewer: v.last(CHANNEL) >= goal) for viewer in viewers))


async def commit(settings: DatabaseSettings, sent: Counter[str]) -> None:
    """For ever: three events with a change, in one transaction, tried again until it is known to be committed."""
    while True:
        try:
            connection = await asyncpg.connect(settings.url, timeout=5)
        except UNAVAILABLE:
            await asyncio.sleep(0.05)
            continue
        try:
            # Whether the last one was committed is not known when the answer to it was lost.
            number = sent[CHANNEL] = await connection.fetchval("SELECT coalesce(max(n), 0) FROM committed")
            while True:
                numbers = range(number + 1, number + 4)
                async with connection.transaction():
                    await connection.executemany("INSERT INTO committed VALUES ($1)", [(n,) for n in numbers])
                    await outbox.add(
                        connection,
                        *(Event("test.event", CHANNEL, {"n": n, "t": monotonic()}, str(uuid4())) for n in numbers),
                    )
                number = sent[CHANNEL] = numbers[-1]
                await asyncio.sleep(0.005)
        except UNAVAILABLE:
            await asyncio.sleep(0.05)
        finally:
            connection.terminate()


async def highest(settings: DatabaseSettings) -> int:
    connection = await asyncpg.connect(settings.url)
    try:
        return await connection.fetchval("SELECT coalesce(max(n), 0) FROM committed")
    finally:
        await connection.close()


async def waiting(settings: DatabaseSettings) -> int:
    connection = await asyncpg.connect(settings.url)
    try:
        return (await outbox.lag(connection))[0]
    finally:
        await connection.close()
