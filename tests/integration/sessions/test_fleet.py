"""What the table `providers` says of them, and what follows for their sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

from orchestrator.database import Pool
from orchestrator.fleet import Fleet, RunBridge
from orchestrator.holds import Holds
from orchestrator.providers.contract import Observation, Provider, SessionRef
from orchestrator.settings import DatabaseSettings


class Reachable:
    """A provider that is asked for nothing but whether it is there."""

    async def check(self) -> None:
        pass

    async def watch(self) -> AsyncIterator[tuple[SessionRef, Observation]]:
        await asyncio.Event().wait()
        yield cast(Any, None)

    async def close(self) -> None:
        pass


async def _nothing(*_: object) -> None:
    pass


async def _broken(*_: object) -> None:
    raise KeyError("secret")


async def test_a_bridge_that_breaks_is_told_of(pool: Pool, database_settings: DatabaseSettings, tmp_path: Path) -> None:
    async with pool.acquire() as connection:
        await connection.execute("INSERT INTO providers (name, kind) VALUES ('staged', 'kubernetes')")
    fleet = _fleet(pool, database_settings, tmp_path, _broken)
    try:
        await fleet.refresh()
        async with asyncio.timeout(30):
            while fleet.states() != [("staged", "kubernetes", "down")]:
                await asyncio.sleep(0.01)
                await fleet.check()
        async with pool.acquire() as connection:
            message = await connection.fetchval("SELECT message FROM providers")
        assert message.startswith("What happens in the cluster is not followed")
        assert "KeyError" in message
        assert "secret" not in message
    finally:
        await fleet.close()


def _fleet(pool: Pool, database_settings: DatabaseSettings, data_dir: Path, run_bridge: RunBridge) -> Fleet:
    return Fleet(
        pool,
        Holds(database_settings),
        lambda *_, **__: cast(Provider, Reachable()),
        data_dir=data_dir,
        sink=lambda _: None,
        on_observation=_nothing,
        on_change=lambda: None,
        run_bridge=run_bridge,
        follow=run_bridge,
    )


async def test_a_provider_that_is_back_hurries_its_sessions_and_waits_for_nobody_who_holds_one(
    pool: Pool, database_settings: DatabaseSettings, tmp_path: Path
) -> None:
    async with pool.acquire() as connection:
        workspace_id = await connection.fetchval("INSERT INTO workspaces (name) VALUES ('team') RETURNING id")
        provider_id = await connection.fetchval(
            "INSERT INTO providers (name, kind, state) VALUES ('staged', 'docker', 'down') RETURNING id"
        )
        sessions = []
        for number in range(2):
            project = await connection.fetchrow(
                "INSERT INTO projects (workspace_id, name) VALUES ($1, $2) RETURNING id, uuid",
                workspace_id,
                f"project {number}",
            )
            sessions.append(
                await connection.fetchval(
                    """INSERT INTO sessions (project_id, project_uuid, workspace_id, provider_id, provider,
                                             machine_config, machine, namespace, container_name, observed_generation,
                                             status, stale, expires_at, next_attempt_at)
                       VALUES ($1, $2, $3, $4, 'staged', 'small', '{"name": "small"}', $2::uuid::text, $2::uuid::text,
                               1, 'running', true, now() + interval '1 year', now() + interval '1 hour')
                       RETURNING id""",
                    project["id"], project["uuid"], workspace_id, provider_id,
                )
            )  # fmt: skip
    fleet = _fleet(pool, database_settings, tmp_path, _nothing)
    try:
        await fleet.refresh()
        async with pool.acquire() as other:
            async with other.transaction():
                await other.execute("SELECT id FROM sessions WHERE id = $1 FOR NO KEY UPDATE", sessions[0])
                await asyncio.wait_for(fleet.check(), 30)
            due = await other.fetchval("SELECT array_agg(id) FROM sessions WHERE next_attempt_at <= now()")
        assert due == sessions[1:]
    finally:
        await fleet.close()
