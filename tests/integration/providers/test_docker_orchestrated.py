"""Orchestrators with a Docker provider: what becomes of a session's row, and of its engine's outage."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from orchestrator.database import Pool, open_pool
from orchestrator.docker.engine import Engine
from orchestrator.errors import ProviderUnavailable
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.providers.contract import LogSink, Provider
from orchestrator.providers.registry import open_provider
from orchestrator.sessions.record import Session
from orchestrator.settings import DatabaseSettings, OrchestratorSettings
from tests.conftest import no_docker
from tests.docker import Daemon, NoDocker, Owned, make_busybox
from tests.integration.providers.docker_sessions import BRITTLE, shell
from tests.integration.sessions.conftest import Stage, until

MakeStage = Callable[..., Any]


class Real:
    """Opens what the rows say."""

    def open(
        self,
        kind: str,
        name: str,
        options: Mapping[str, Any],
        *,
        endpoint: str | None,
        credentials: Mapping[str, str],
        data_dir: Path,
        sink: LogSink,
    ) -> Provider:
        return open_provider(
            kind, name, options, endpoint=endpoint, credentials=credentials, data_dir=data_dir, sink=sink
        )


@pytest_asyncio.fixture
async def make_stage(pool: Pool, database_settings: DatabaseSettings, tmp_path: Path) -> AsyncIterator[MakeStage]:
    """Makes a workspace with a Docker provider of these options, and a machine config of these services."""
    log = MemoryLog()

    async def make(options: Mapping[str, Any], services: Mapping[str, Any], endpoint: str | None = None) -> Stage:
        async with pool.acquire() as connection:
            user_id = await connection.fetchval("INSERT INTO users (email, name) VALUES ('a@b.c', 'Ann') RETURNING id")
            workspace_id = await connection.fetchval("INSERT INTO workspaces (name) VALUES ('team') RETURNING id")
            await connection.execute(
                "INSERT INTO workspace_members (workspace_id, user_id, role) VALUES ($1, $2, 'owner')",
                workspace_id,
                user_id,
            )
            provider_id = await connection.fetchval(
                """INSERT INTO providers (name, kind, is_default, endpoint, options)
                   VALUES ('docker', 'docker', true, $1, $2) RETURNING id""",
                endpoint,
                dict(options),
            )
            await connection.execute(
                """INSERT INTO machine_configs (name, provider_id, is_default, services)
                   VALUES ('small', $1, true, $2)""",
                provider_id,
                dict(services),
            )
        settings = OrchestratorSettings(
            data_dir=tmp_path, lease=10.0, poll_interval=0.5, resync_interval=2.0, start_deadline=60.0
        )
        world: Any = Real()
        return Stage(pool, database_settings, settings, world, log, user_id, workspace_id, provider_id)

    yield make
    await log.close()


async def created(stage: Stage) -> Session:
    project = await stage.project()
    await stage.execute("UPDATE projects SET repo_url = NULL, branch = NULL WHERE id = $1", project.id)
    return await stage.create(project)


async def lines(stage: Stage, session: Session, stream: str = "stdout") -> list[str]:
    rows = await stage.fetch(
        "SELECT line FROM session_logs WHERE session_id = $1 AND stream = $2 ORDER BY id", session.id, stream
    )
    return [row["line"] for row in rows]


async def answers(session: Session) -> bool:
    try:
        async with aiohttp.request("GET", session.preview_url or "") as answer:
            return answer.status == 404
    except aiohttp.ClientError:
        return False


@pytest_asyncio.fixture
async def own_pool(database_settings: DatabaseSettings) -> AsyncIterator[Pool]:
    """Of a second orchestrator."""
    pool = await open_pool(database_settings, name="test")
    yield pool
    await pool.close()


@pytest.mark.timeout(120)
async def test_a_session_runs_prints_crashes_recovers_stops_and_goes(
    make_stage: MakeStage, own_pool: Pool, owned: Owned, engine: Engine, busybox: str
) -> None:
    stage = await make_stage({"instance": owned.instance}, {"preview": shell(busybox, BRITTLE, ready="/")})
    # Whoever works on it: one of the two follows its output.
    async with stage.running(), stage.running(pool=own_pool):
        session = await created(stage)
        session = await stage.until(session, "running", "error")
        assert session.status == "running", session
        assert await answers(session)
        await until(lambda: lines(stage, session))
        provider = Real().open(
            "docker", "d", {"instance": owned.instance}, endpoint=None, credentials={},
            data_dir=stage.settings.data_dir, sink=lambda line: None,
        )  # fmt: skip
        await provider.exec(session.ref, ["kill", "-USR1", "1"])
        await provider.close()

        async def recovered() -> bool:
            return [status for status, _ in await stage.history(session)].count("running") == 2

        await until(recovered, lambda: stage.history(session))
        session = await stage.until(session, "running")
        assert await answers(session)

        async def said_twice() -> bool:
            return (await lines(stage, session)).count("hello") == 2

        await until(said_twice, lambda: lines(stage, session))
        assert await lines(stage, session) == ["hello", "oh no", "hello"]
        await stage.request(session, "stopped")
        await stage.until(session, "stopped")
        await stage.request(session, "running")
        again = await stage.until(session, "running")
        assert again.preview_url == session.preview_url
        await stage.request(session, "deleted")
        await stage.until(session, "deleted")
    history = [status for status, _ in await stage.history(session)]
    assert "error" not in history
    assert not await engine.containers.list(owned.labels)
    assert not await engine.volumes.list(owned.labels)


@pytest.mark.timeout(180)
async def test_an_engine_that_is_killed_loses_no_session_and_fails_none(make_stage: MakeStage, tmp_path: Path) -> None:
    try:
        daemon = Daemon(reachable=True)
    except NoDocker as error:
        no_docker(error)
    async with daemon, Engine(daemon.host) as engine:
        image = await make_busybox(engine, "busybox:test")
        stage = await make_stage(
            {"publish": None, "request_timeout": 5}, {"preview": shell(image, ready="/")}, daemon.host
        )
        async with stage.running():
            session = await created(stage)
            session = await stage.until(session, "running", "error")
            assert session.status == "running", session
            assert await answers(session)
            name = f"{session.container_name}-preview"
            before = await engine.containers.inspect(name)
            daemon.kill()
            stale = await stage.until(session, "running", stale=True)
            assert stale.reason == "ProviderUnavailable"
            assert daemon.host in stale.message
            with pytest.raises(ProviderUnavailable):
                await engine.info()
            await daemon.start()

            async def back() -> Session | None:
                now = await stage.get(session)
                return now if now.status == "running" and not now.stale and await answers(now) else None

            await until(back, lambda: stage.get(session))
            after = await engine.containers.inspect(name)
            assert before is not None
            assert after is not None
            assert after["Id"] == before["Id"]
            assert after["State"]["StartedAt"] != before["State"]["StartedAt"]
            # An engine without live-restore ends what runs when it is back; that is started again as it was.
            assert "error" not in [status for status, _ in await stage.history(session)]
            await stage.request(session, "deleted")
            await stage.until(session, "deleted")
            assert not await engine.containers.list()
