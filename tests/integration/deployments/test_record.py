"""The row of a deployment: written and told in one transaction."""

from __future__ import annotations

import pytest

from orchestrator.database import Pool
from orchestrator.deployments import apps, queue, record
from orchestrator.deployments.contract import AppSecrets
from orchestrator.deployments.record import After
from orchestrator.errors import NotFound
from tests.integration.deployments.conftest import KEYS, Place, told


async def test_what_clients_see_is_told_to_all_who_may_follow_it(pool: Pool, place: Place) -> None:
    before = await place.enqueue(await place.app())
    await place.told()
    async with pool.acquire() as connection, connection.transaction():
        steps = record.begun(before.steps, "clone")
        changes = {"status": "deploying", "step": "clone", "steps": steps, "started_at": After(0), "message": "a\0b"}
        written = await record.write(connection, before, **changes)
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
        events = await told(connection)
        assert [channel for _, channel, _ in events] == [
            f"deployment:{before.id}", f"user:{place.user_id}", f"workspace:{place.workspace_id}"
        ]  # fmt: skip
        assert {event_type for event_type, _, _ in events} == {"deployment.status"}
        assert all(data == record.public(written) for _, _, data in events)
        assert await record.write(connection, written, status="deploying", steps=steps) == written
        assert await told(connection) == [], "told what did not change"


async def test_what_only_workers_see_is_not_told(pool: Pool, place: Place) -> None:
    before = await place.enqueue(await place.app())
    await place.told()
    async with pool.acquire() as connection, connection.transaction():
        written = await record.write(
            connection, before, attempts=1, image_id="sha256:1", lease_expires_at=After(30), next_attempt_at=After(0)
        )
        assert (written.attempts, written.image_id, written.updated_at) == (1, "sha256:1", before.updated_at)
        assert await told(connection) == []


async def test_a_deployment_that_nobody_signed_in_made_is_told_to_no_user(pool: Pool, place: Place) -> None:
    before = await place.enqueue(await place.app(), user_id=None)
    await place.told()
    async with pool.acquire() as connection, connection.transaction():
        written = await record.write(connection, before, status="live", finished_at=After(0))
        assert written.finished
    channels = [channel for _, channel, _ in await place.told()]
    assert channels == [f"deployment:{before.id}", f"workspace:{place.workspace_id}"]


async def test_who_is_no_member_any_more_is_told_nothing(pool: Pool, place: Place) -> None:
    app = await place.app()
    deployment = await place.enqueue(app)
    await place.told()
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("DELETE FROM workspace_members")
        await record.write(connection, await record.lock(connection, deployment.id), message="Hello.")
        await queue.delete_app(connection, app.id)
    assert {channel for _, channel, _ in await place.told()} == {
        f"deployment:{deployment.id}", f"workspace:{place.workspace_id}"
    }  # fmt: skip
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("UPDATE users SET is_admin = true")
        await apps.tell_waiting(connection, app.id, "Docker does not answer.")
    assert {channel for _, channel, _ in await place.told()} == {
        f"user:{place.user_id}", f"workspace:{place.workspace_id}"
    }  # fmt: skip


async def test_a_transaction_that_is_rolled_back_tells_nothing(pool: Pool, place: Place) -> None:
    before = await place.enqueue(await place.app())
    await place.told()
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await record.write(connection, before, status="live")
        await transaction.rollback()
        assert await record.get(connection, before.id) == before
        with pytest.raises(NotFound):
            await record.lock(connection, 99)
    assert await place.told() == []


async def test_a_deployment_has_its_own_copy_of_settings_and_secrets(pool: Pool, place: Place) -> None:
    app = await place.app(secrets=AppSecrets(env={"A": "b"}), port=3000, domains=("shop.test",))
    deployment = await place.enqueue(app)
    async with pool.acquire() as connection:
        await connection.execute("UPDATE apps SET settings = '{}', secrets = NULL")
        settings, secrets = await record.recipe(connection, deployment, KEYS)
    assert settings == app.settings
    assert (settings.port, settings.domains) == (3000, ("shop.test",))
    assert secrets == AppSecrets(env={"A": "b"})


def test_a_step_that_a_dead_worker_had_begun_begins_anew_with_all_after_it() -> None:
    steps = record.ended(record.begun([], "clone"), "done", 1.23456)
    assert steps == [{"name": "clone", "status": "done", "seconds": 1.235}]
    steps = record.begun(steps, "build")
    assert [step["name"] for step in steps] == ["clone", "build"]
    assert record.begun(steps, "clone") == [{"name": "clone", "status": "running", "seconds": None}]
