"""`python -m orchestrator`: several on one database, one RabbitMQ and one machine, any of which may be killed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import aiohttp
import pytest
import pytest_asyncio

from auth import accounts, projects
from orchestrator import machine_import
from orchestrator.database import Pool
from orchestrator.sessions import store
from scripts.demo_repository import served
from tests.integration.eventlog.rabbit import send
from tests.integration.processes.conftest import Make
from tests.integration.processes.process import DEADLINE, ROOT, Process, living
from tests.proxy import TcpProxy


async def begun(process: Process) -> Process:
    before = len(process.logged("orchestrator runs"))
    await process.start()
    await process.until_logged("orchestrator runs", before + 1)
    return process


@dataclass
class Sessions:
    """Projects with a page, and sessions of them, by way of the database."""

    pool: Pool
    repository: str
    user_id: int
    workspace_id: int

    async def create(self) -> int:
        async with self.pool.acquire() as connection, connection.transaction():
            project = await projects.create(connection, self.workspace_id, name="site", repo_url=self.repository)
            session, _ = await store.create(
                connection, project=project, user_id=self.user_id, provider=None, machine_config=None
            )
        return session.id

    async def until(self, session_id: int, status: str) -> store.Session:
        seen = None
        try:
            async with asyncio.timeout(DEADLINE):
                while seen is None or seen.status != status:
                    await asyncio.sleep(0.02)
                    async with self.pool.acquire() as connection:
                        seen = await store.get(connection, session_id)
        except TimeoutError:
            raise AssertionError(f"it does not become {status}: {seen}") from None
        return seen

    async def until_served(self, session_id: int) -> None:
        """Return once the session's preview shows its page."""
        async with asyncio.timeout(DEADLINE), aiohttp.ClientSession() as http:
            while True:
                session = await self.until(session_id, "running")
                try:
                    async with http.get(str(session.preview_url)) as answer:
                        if "A page of the orchestrators" in await answer.text():
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def sessions(pool: Pool) -> AsyncIterator[Sessions]:
    async with (
        served({"index.html": "<h1>A page of the orchestrators</h1>"}) as repository,
        pool.acquire() as connection,
    ):
        for name in ("providers.yaml", "machine-configs.yaml"):
            await machine_import.apply(connection, machine_import.read_file(ROOT / "configs" / name))
        user = await accounts.register(connection, "a@example.org", None, "A")
        workspace = await connection.fetchval("SELECT id FROM workspaces")
        yield Sessions(pool, repository.url, user.id, workspace)


async def test_sessions_of_a_killed_orchestrator_run_again_at_another_within_seconds(
    make: Make, sessions: Sessions, tmp_path: Path
) -> None:
    # Its lease is no reason to wait.
    slow = {"ORCHESTRATOR_LEASE": "600", "ORCHESTRATOR_POLL_INTERVAL": "600", "ORCHESTRATOR_RESYNC_INTERVAL": "600"}
    first, second = await begun(make("orchestrator", **slow)), await begun(make("orchestrator", **slow))
    session_id = await sessions.create()
    await sessions.until_served(session_id)
    holder, other = (first, second) if first.logged("providers are ours now") else (second, first)
    assert not other.logged("providers are ours now")
    mark = tmp_path / "data" / "sessions" / str(session_id) / "workspace" / "mine"
    mark.write_text("kept")

    began = monotonic()
    await holder.kill()
    await other.until_logged("providers are ours now")
    await sessions.until(session_id, "starting")
    await sessions.until_served(session_id)
    took = monotonic() - began
    assert took < DEADLINE
    assert mark.read_text() == "kept"

    # The one that comes back finds it taken.
    await begun(holder)
    assert len(holder.logged("providers are ours now")) == 1
    # In order, the lock goes over when all has ended.
    assert await other.stop() == 0
    await holder.until_logged("providers are ours now", 2)
    await sessions.until_served(session_id)
    assert await holder.stop() == 0
    for process in (first, second):
        assert "Traceback" not in process.output.read_text()


async def test_a_postgresql_that_cuts_all_connections_moves_no_session(make: Make, sessions: Sessions) -> None:
    first, second = await begun(make("orchestrator")), await begun(make("orchestrator"))
    session_id = await sessions.create()
    await sessions.until_served(session_id)
    history = "SELECT count(*) FROM session_events WHERE session_id = $1"
    before = await sessions.pool.fetchval(history, session_id)
    cut = """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
              WHERE datname = current_database() AND application_name LIKE 'cluster-code%'"""
    assert await sessions.pool.fetchval(cut) > 4
    for process in (first, second):
        await process.until(
            lambda process=process: process.logged("the connection that holds what is ours was lost; taking it again")
        )
    assert len([*first.logged("providers are ours now"), *second.logged("providers are ours now")]) == 1
    await sessions.until_served(session_id)
    assert await sessions.pool.fetchval(history, session_id) == before
    assert (await first.stop(), await second.stop()) == (0, 0)


async def test_a_signal_ends_it_with_0_and_another_hurries(make: Make, sessions: Sessions) -> None:
    orchestrator = await begun(make("orchestrator"))
    await sessions.until_served(await sessions.create())
    children = orchestrator.descendants()
    assert children
    assert await orchestrator.stop() == 0
    assert not any(living(pid) for pid in children)
    await begun(orchestrator)
    orchestrator.signal(signal.SIGTERM)
    await orchestrator.until_logged("ending; another signal hurries", 2)
    orchestrator.signal(signal.SIGTERM)
    assert await orchestrator.ended() in (0, 130)


async def test_it_waits_for_what_is_away_at_the_start(make: Make, rabbitmq_server, amqp_url: str) -> None:
    async with TcpProxy("127.0.0.1", rabbitmq_server.port) as proxy:
        await proxy.refuse()
        orchestrator = make("orchestrator", AMQP_URL=amqp_url.replace(f":{rabbitmq_server.port}", f":{proxy.port}"))
        await orchestrator.start()
        await orchestrator.until_logged("waiting at the start")
        await proxy.resume()
        await orchestrator.until_logged("orchestrator runs")
        assert await orchestrator.stop() == 0


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("AMQP_URL", "", "AMQP_URL is not set"), ("DATABASE_URL", "nonsense", "DATABASE_URL: ")],
)
async def test_a_wrong_setting_is_one_line(make: Make, name: str, value: str, told: str) -> None:
    orchestrator = make("orchestrator", **{name: value})
    await orchestrator.start()
    assert await orchestrator.ended() == 2
    (said,) = [line for line in orchestrator.output.read_text().splitlines() if not line.startswith("{")]
    assert said.startswith(f"orchestrator: {told}")


async def test_users_and_dead_letters_are_seen_to(make: Make, pool: Pool, amqp_url: str) -> None:
    """By whichever runs: they are root tasks of every orchestrator."""
    first, second = await begun(make("orchestrator")), await begun(make("orchestrator"))
    gateway = make("gateway")
    await gateway.start()
    await gateway.until_answer("/ready", 200)

    async def known(name: str, letters: int) -> bool:
        put_away = await pool.fetchval("SELECT count(*) FROM dead_letters WHERE published_at IS NOT NULL")
        return (await pool.fetchval("SELECT name FROM users"), put_away) == (name, letters)

    for letters, name in enumerate(("Ada", "Ada Lovelace"), 1):
        await send(amqp_url, "auth.user.updated", b'{"id": 7, "email": "a@example.org", "name": "%b"}' % name.encode())
        await send(amqp_url, "app.broken", b"nonsense")
        await second.until_so(lambda name=name, letters=letters: known(name, letters))
        if first.running:
            await first.kill()
    assert "cluster_code_dead_letters_waiting 0.0" in (await gateway.get("/metrics"))[1]
