"""The row of a deployment: written and told in one transaction."""

from __future__ import annotations

from typing import Any

import asyncpg
import orjson
import pytest

from orchestrator.database import Pool
from orchestrator.deployments import record
from orchestrator.deployments.contract import AppSecrets
from orchestrator.deployments.record import After, Deployment
from orchestrator.deployments.secrets import Keyring
from orchestrator.errors import NotFound
from tests.integration.deployments.conftest import Place


async def _deployment(connection: asyncpg.Connection, place: Place, *, user_id: int | None) -> Deployment:
    app_id = await connection.fetchval(
        """INSERT INTO apps (workspace_id, name, repo_url, settings) VALUES ($1, 'shop', 'https://g.test/shop', $2)
           RETURNING id""",
        place.workspace_id,
        {"port": 3000},
    )
    deployment_id = await connection.fetchval(
        """INSERT INTO deployments (app_id, workspace_id, number, cause, user_id, repo_url, settings)
           SELECT id, workspace_id, 1, 'create', $2, repo_url, settings FROM apps WHERE id = $1 RETURNING id""",
        app_id,
        user_id,
    )
    found = await record.get(connection, deployment_id)
    assert found is not None
    return found


async def _told(connection: asyncpg.Connection) -> list[tuple[str, str, Any]]:
    rows = await connection.fetch("DELETE FROM outbox RETURNING id, event_type, channel, data")
    return [(row["event_type"], row["channel"], _json(row["data"])) for row in sorted(rows, key=lambda row: row["id"])]


def _json(data: Any) -> Any:
    return orjson.loads(data) if isinstance(data, str) else data


async def test_what_clients_see_is_told_to_all_who_may_follow_it(pool: Pool, place: Place) -> None:
    async with pool.acquire() as connection, connection.transaction():
        before = await _deployment(connection, place, user_id=place.user_id)
        steps = record.begun(before.steps, "clone")
        written = await record.write(
            connection, before, status="deploying", step="clone", steps=steps, started_at=After(0), message="a\0b"
        )
        assert (written.status, written.step, written.message, written.app_name) == (
            "deploying",
            "clone",
            "a�b",
            "shop",
        )
        assert written.steps == [{"name": "clone", "status": "running", "seconds": None}]
        assert written.started_at is not None
        assert written.updated_at > before.updated_at
        assert not written.finished
        told = await _told(connection)
        assert [channel for _, channel, _ in told] == [
            f"deployment:{before.id}", f"user:{place.user_id}", f"workspace:{place.workspace_id}"
        ]  # fmt: skip
        assert {event_type for event_type, _, _ in told} == {"deployment.status"}
        assert all(data == record.public(written) for _, _, data in told)
        assert await record.write(connection, written, status="deploying", steps=steps) == written
        assert await _told(connection) == [], "told what did not change"


async def test_what_only_workers_see_is_not_told(pool: Pool, place: Place) -> None:
    async with pool.acquire() as connection, connection.transaction():
        before = await _deployment(connection, place, user_id=None)
        written = await record.write(
            connection, before, attempts=1, image_id="sha256:1", lease_expires_at=After(30), next_attempt_at=After(0)
        )
        assert (written.attempts, written.image_id, written.updated_at) == (1, "sha256:1", before.updated_at)
        assert await _told(connection) == []


async def test_a_deployment_that_nobody_signed_in_made_is_told_to_no_user(pool: Pool, place: Place) -> None:
    async with pool.acquire() as connection, connection.transaction():
        before = await _deployment(connection, place, user_id=None)
        await record.write(connection, before, status="live", finished_at=After(0))
        channels = [channel for _, channel, _ in await _told(connection)]
        assert channels == [f"deployment:{before.id}", f"workspace:{place.workspace_id}"]


async def test_a_transaction_that_is_rolled_back_tells_nothing(pool: Pool, place: Place) -> None:
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        before = await _deployment(connection, place, user_id=None)
        await record.write(connection, before, status="live")
        await transaction.rollback()
        assert await _told(connection) == []
        with pytest.raises(NotFound):
            await record.lock(connection, before.id)
        assert await record.get(connection, before.id) is None


async def test_a_deployment_has_its_own_copy_of_settings_and_secrets(pool: Pool, place: Place) -> None:
    keys = Keyring(["A" * 43])
    async with pool.acquire() as connection:
        deployment = await _deployment(connection, place, user_id=None)
        assert (await record.recipe(connection, deployment, keys)) == (
            record.settings_of({"port": 3000}), AppSecrets()
        )  # fmt: skip
        sealed = keys.encrypt_secrets(AppSecrets(env={"A": "b"}), deployment.app_id)
        await connection.execute("UPDATE deployments SET secrets = $2 WHERE id = $1", deployment.id, sealed)
        _, secrets = await record.recipe(connection, deployment, keys)
        assert secrets == AppSecrets(env={"A": "b"})


def test_a_step_that_a_dead_worker_had_begun_begins_anew_with_all_after_it() -> None:
    steps = record.ended(record.begun([], "clone"), "done", 1.23456)
    assert steps == [{"name": "clone", "status": "done", "seconds": 1.235}]
    steps = record.begun(steps, "build")
    assert [step["name"] for step in steps] == ["clone", "build"]
    again = record.begun(steps, "clone")
    assert again == [{"name": "clone", "status": "running", "seconds": None}]
