from __future__ import annotations

import asyncio
from uuid import uuid4

import asyncpg
import pytest

from auth import projects, tenants
from auth.accounts import User
from auth.errors import NotVisible, Taken, Unacceptable
from auth.permissions import Role
from auth.tenants import Workspace
from orchestrator.database import Pool
from tests.integration.auth.conftest import identity, personal


async def test_a_project_is_made_read_and_changed(
    connection: asyncpg.Connection, ann: User, bob: User, workspace: Workspace
) -> None:
    uuid = uuid4()
    project = await projects.create(
        connection,
        workspace.id,
        name="'; DROP TABLE projects; --",
        repo_url="https://example.org/x.git",
        branch="main",
        env={"A": "1"},
        created_by=ann.id,
        uuid=uuid,
    )
    assert (project.uuid, project.workspace_id, project.created_by, project.env) == (
        uuid,
        workspace.id,
        ann.id,
        {"A": "1"},
    )
    assert await projects.by_id(connection, project.id) == project
    assert await projects.by_uuid(connection, uuid) == project
    assert await projects.with_role(connection, id=project.id, user_id=ann.id) == (project, Role.OWNER)
    assert await projects.with_role(connection, uuid=uuid, user_id=bob.id) == (project, None)
    assert await projects.with_role(connection, uuid=uuid4(), user_id=bob.id) is None

    changed = await projects.update(connection, project.id, name=" new ", branch=None, env={})
    assert (changed.name, changed.branch, changed.env, changed.repo_url) == ("new", None, {}, project.repo_url)
    assert changed.updated_at > project.updated_at
    assert (await projects.update(connection, project.id, repo_url=None)).repo_url is None


async def test_a_project_that_cannot_be_is_refused(connection: asyncpg.Connection, workspace: Workspace) -> None:
    project = await projects.create(connection, workspace.id, name="p")
    with pytest.raises(Taken) as caught:
        await projects.create(connection, workspace.id, name="q", uuid=project.uuid)
    assert caught.value.field == "uuid"
    with pytest.raises(Unacceptable):
        await projects.create(connection, workspace.id, name="")
    with pytest.raises(Unacceptable):
        await projects.update(connection, project.id, name="\x00")
    for change in (
        projects.create(connection, 10**9, name="p"),
        projects.by_id(connection, 10**9),
        projects.by_uuid(connection, uuid4()),
        projects.update(connection, 10**9, name="p"),
        projects.delete(connection, 10**9),
    ):
        with pytest.raises(NotVisible):
            await change


async def test_people_see_the_projects_of_their_workspaces_and_administrators_all(
    connection: asyncpg.Connection, ann: User, bob: User, workspace: Workspace
) -> None:
    first = await projects.create(connection, workspace.id, name="first")
    second = await projects.create(connection, await personal(connection, ann), name="second")
    assert await projects.list_page(connection, identity(ann), 1, 10) == ([second, first], 2)
    assert await projects.list_page(connection, identity(ann), 2, 1) == ([first], 2)
    assert await projects.list_page(connection, identity(ann), 1, 9, workspace_id=workspace.id) == ([first], 1)
    assert await projects.list_page(connection, identity(bob), 1, 9, workspace_id=workspace.id) == ([], 0)
    assert await projects.list_page(connection, identity(bob), 1, 9) == ([], 0)
    assert await projects.list_page(connection, identity(bob, is_admin=True), 1, 9) == ([second, first], 2)


async def test_concurrent_adoptions_make_one_project_of_the_personal_workspace(
    pool: Pool, connection: asyncpg.Connection, ann: User
) -> None:
    uuid = uuid4()

    async def adopt() -> object:
        async with pool.acquire() as other:
            return await projects.adopt(other, uuid, ann.id)

    adopted = await asyncio.gather(*(adopt() for _ in range(8)))
    assert len({project.id for project in adopted}) == 1
    assert adopted[0].workspace_id == await personal(connection, ann)
    assert adopted[0].name == f"project {str(uuid)[:8]}"
    assert adopted[0].created_by == ann.id


async def test_anothers_project_is_not_adopted(
    connection: asyncpg.Connection, ann: User, bob: User, workspace: Workspace
) -> None:
    project = await projects.create(connection, workspace.id, name="p")
    with pytest.raises(NotVisible):
        await projects.adopt(connection, project.uuid, bob.id)
    await tenants.add_member(connection, workspace.id, bob.id, Role.VIEWER, by=Role.OWNER)
    assert await projects.adopt(connection, project.uuid, bob.id) == project
    with pytest.raises(NotVisible):
        await projects.adopt(connection, uuid4(), 10**9)


INSERT_SESSION = """
    INSERT INTO sessions (project_id, project_uuid, workspace_id, provider_id, provider, machine_config, machine,
                          namespace, container_name, status, expires_at)
    SELECT id, uuid, workspace_id, $2, 'local', 'small', '{}', uuid::text, 'c', $3, now() + interval '1 year'
      FROM projects WHERE id = $1 RETURNING id"""


async def test_a_project_with_a_session_stays_and_deleted_sessions_go_with_it(
    connection: asyncpg.Connection, workspace: Workspace
) -> None:
    project = await projects.create(connection, workspace.id, name="p")
    provider = await connection.fetchval("INSERT INTO providers (name, kind) VALUES ('local', 'local') RETURNING id")
    for _ in range(2):
        await connection.fetchval(INSERT_SESSION, project.id, provider, "deleted")
    session = await connection.fetchval(INSERT_SESSION, project.id, provider, "running")
    await connection.execute(
        "INSERT INTO session_events (session_id, status, reason, message) VALUES ($1, 'running', '', '')", session
    )
    with pytest.raises(Taken, match=f"has a session, {session}, which is running: delete it") as caught:
        await projects.delete(connection, project.id)
    assert caught.value.field == "session"
    assert await connection.fetchval("SELECT count(*) FROM sessions") == 3
    await connection.execute("UPDATE sessions SET status = 'deleted'")
    await projects.delete(connection, project.id)
    assert await connection.fetchval("SELECT count(*) FROM sessions") == 0
    with pytest.raises(NotVisible):
        await projects.by_id(connection, project.id)


async def test_a_session_that_is_being_made_keeps_its_project(
    pool: Pool, connection: asyncpg.Connection, workspace: Workspace
) -> None:
    project = await projects.create(connection, workspace.id, name="p")
    provider = await connection.fetchval("INSERT INTO providers (name, kind) VALUES ('local', 'local') RETURNING id")

    async def delete() -> None:
        async with pool.acquire() as other:
            await projects.delete(other, project.id)

    async with connection.transaction():
        await connection.fetchval(INSERT_SESSION, project.id, provider, "pending")
        deleting = asyncio.create_task(delete())
        async with asyncio.timeout(5):
            while not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
                await asyncio.sleep(0.01)
    with pytest.raises(Taken, match="which is pending"):
        await deleting
