from __future__ import annotations

import asyncio
from uuid import uuid4

import asyncpg
import pytest

from auth import accounts, projects, tenants
from auth.accounts import User
from auth.errors import Forbidden, NotVisible, Taken, Unacceptable
from auth.permissions import Identity, Role
from auth.tenants import Workspace
from orchestrator.database import Pool
from tests.integration.auth.conftest import MakeUser


@pytest.fixture
async def ann(make_user: MakeUser) -> User:
    return await make_user()


@pytest.fixture
async def bob(make_user: MakeUser) -> User:
    return await make_user("bob@example.org", "Bob")


@pytest.fixture
async def workspace(connection: asyncpg.Connection, ann: User) -> Workspace:
    return await tenants.create(connection, " shared ", ann.id)


def identity(user: User, *, is_admin: bool = False) -> Identity:
    return Identity(user.id, user.email, is_admin)


async def personal(connection: asyncpg.Connection, user: User) -> int:
    return await connection.fetchval("SELECT id FROM workspaces WHERE personal_user_id = $1", user.id)


# Workspaces


async def test_who_makes_a_workspace_owns_it(
    connection: asyncpg.Connection, ann: User, bob: User, workspace: Workspace
) -> None:
    assert (workspace.name, workspace.role, workspace.personal_user_id) == ("shared", Role.OWNER, None)
    assert await tenants.role_in(connection, workspace.id, ann.id) is Role.OWNER
    assert await tenants.role_in(connection, workspace.id, bob.id) is None
    assert await tenants.workspace_with_role(connection, workspace.id, ann.id) == (workspace, Role.OWNER)
    seen_by_bob = await tenants.workspace_with_role(connection, workspace.id, bob.id)
    assert seen_by_bob is not None
    assert seen_by_bob[1] is None
    assert await tenants.workspace_with_role(connection, 10**9, bob.id) is None
    with pytest.raises(Unacceptable):
        await tenants.create(connection, " ", ann.id)


async def test_people_see_their_workspaces_and_administrators_all(
    connection: asyncpg.Connection, ann: User, bob: User, workspace: Workspace
) -> None:
    of_ann = [workspace.id, await personal(connection, ann)]
    of_bob = [await personal(connection, bob)]
    items, total = await tenants.list_for(connection, identity(ann), 1, 10)
    assert ([item.id for item in items], total) == (of_ann, 2)
    assert await tenants.workspace_ids(connection, ann.id) == sorted(of_ann)
    items, total = await tenants.list_for(connection, identity(ann), 2, 1)
    assert ([item.id for item in items], total) == (of_ann[1:], 2)
    items, total = await tenants.list_for(connection, identity(bob, is_admin=True), 1, 10)
    assert [item.id for item in items] == sorted(of_ann + of_bob, reverse=True)
    assert [item.role for item in items if item.id in of_bob] == [Role.OWNER]
    assert {item.role for item in items if item.id in of_ann} == {None}
    assert total == 3


async def test_a_workspace_is_renamed(connection: asyncpg.Connection, workspace: Workspace) -> None:
    changed = await tenants.update(connection, workspace.id, "other")
    assert changed.name == "other"
    assert changed.updated_at > workspace.updated_at
    with pytest.raises(NotVisible):
        await tenants.update(connection, 10**9, "other")


async def test_a_workspace_goes_when_it_is_empty_and_nobodys_own(
    connection: asyncpg.Connection, ann: User, workspace: Workspace
) -> None:
    project = await projects.create(connection, workspace.id, name="p")
    with pytest.raises(Taken, match=r"has 1 project\(s\): delete them first") as caught:
        await tenants.delete(connection, workspace.id)
    assert caught.value.field == "projects"
    await projects.delete(connection, project.id)
    await tenants.delete(connection, workspace.id)
    with pytest.raises(NotVisible):
        await tenants.delete(connection, workspace.id)
    with pytest.raises(Unacceptable, match="personal workspace"):
        await tenants.delete(connection, await personal(connection, ann))


# Members


async def test_members_are_listed_owners_first(
    connection: asyncpg.Connection, ann: User, bob: User, workspace: Workspace, make_user: MakeUser
) -> None:
    cyd = await make_user("cyd@example.org", "Cyd")
    added = await tenants.add_member(connection, workspace.id, bob.id, Role.VIEWER, by=Role.ADMIN)
    assert (added.email, added.name, added.role) == ("bob@example.org", "Bob", Role.VIEWER)
    await tenants.add_member(connection, workspace.id, cyd.id, Role.ADMIN, by=Role.ADMIN)
    items, total = await tenants.list_members(connection, workspace.id, 1, 10)
    assert [(item.user_id, item.role) for item in items] == [
        (ann.id, Role.OWNER), (cyd.id, Role.ADMIN), (bob.id, Role.VIEWER),
    ]  # fmt: skip
    assert total == 3
    assert (await tenants.list_members(connection, workspace.id, 2, 2))[0] == [added]
    assert await tenants.get_member(connection, workspace.id, bob.id) == added


async def test_a_membership_that_cannot_be_is_refused(
    connection: asyncpg.Connection, bob: User, workspace: Workspace
) -> None:
    await tenants.add_member(connection, workspace.id, bob.id, Role.MEMBER, by=Role.ADMIN)
    with pytest.raises(Taken) as taken:
        await tenants.add_member(connection, workspace.id, bob.id, Role.VIEWER, by=Role.ADMIN)
    assert taken.value.field == "user_id"
    with pytest.raises(Unacceptable) as unknown:
        await tenants.add_member(connection, workspace.id, 10**9, Role.VIEWER, by=Role.ADMIN)
    assert unknown.value.field == "user_id"
    with pytest.raises(NotVisible, match="workspace"):
        await tenants.add_member(connection, 10**9, bob.id, Role.VIEWER, by=Role.ADMIN)
    for change in (
        tenants.get_member(connection, workspace.id, 10**9),
        tenants.update_member(connection, workspace.id, 10**9, Role.VIEWER, by=Role.OWNER),
        tenants.remove_member(connection, workspace.id, 10**9, by=Role.OWNER),
        tenants.remove_member(connection, 10**9, bob.id, by=Role.OWNER),
    ):
        with pytest.raises(NotVisible):
            await change


async def test_only_owners_make_demote_and_remove_owners(
    connection: asyncpg.Connection, ann: User, bob: User, workspace: Workspace, make_user: MakeUser
) -> None:
    cyd = await make_user("cyd@example.org")
    with pytest.raises(Forbidden):
        await tenants.add_member(connection, workspace.id, bob.id, Role.OWNER, by=Role.ADMIN)
    await tenants.add_member(connection, workspace.id, bob.id, Role.MEMBER, by=Role.ADMIN)
    with pytest.raises(Forbidden):
        await tenants.update_member(connection, workspace.id, bob.id, Role.OWNER, by=Role.ADMIN)
    promoted = await tenants.update_member(connection, workspace.id, bob.id, Role.OWNER, by=Role.OWNER)
    assert promoted.role is Role.OWNER
    await tenants.add_member(connection, workspace.id, cyd.id, Role.OWNER, by=Role.OWNER)
    with pytest.raises(Forbidden):
        await tenants.update_member(connection, workspace.id, ann.id, Role.ADMIN, by=Role.ADMIN)
    with pytest.raises(Forbidden):
        await tenants.update_member(connection, workspace.id, ann.id, Role.OWNER, by=Role.ADMIN)
    with pytest.raises(Forbidden):
        await tenants.remove_member(connection, workspace.id, ann.id, by=Role.ADMIN)
    await tenants.update_member(connection, workspace.id, ann.id, Role.VIEWER, by=Role.OWNER)
    await tenants.remove_member(connection, workspace.id, ann.id, by=Role.ADMIN)
    assert await tenants.role_in(connection, workspace.id, ann.id) is None


async def test_the_last_owner_stays(connection: asyncpg.Connection, ann: User, bob: User, workspace: Workspace) -> None:
    with pytest.raises(Unacceptable, match="last owner") as caught:
        await tenants.update_member(connection, workspace.id, ann.id, Role.ADMIN, by=Role.OWNER)
    assert caught.value.field == "role"
    with pytest.raises(Unacceptable, match="last owner"):
        await tenants.remove_member(connection, workspace.id, ann.id, by=Role.OWNER)
    assert (await tenants.update_member(connection, workspace.id, ann.id, Role.OWNER, by=Role.OWNER)).role is Role.OWNER
    await tenants.add_member(connection, workspace.id, bob.id, Role.OWNER, by=Role.OWNER)
    await tenants.remove_member(connection, workspace.id, ann.id, by=Role.OWNER)


async def test_two_owners_cannot_leave_at_the_same_moment(
    pool: Pool, connection: asyncpg.Connection, ann: User, bob: User, workspace: Workspace
) -> None:
    await tenants.add_member(connection, workspace.id, bob.id, Role.OWNER, by=Role.OWNER)

    async def leave(user: User) -> None:
        async with pool.acquire() as other:
            await tenants.remove_member(other, workspace.id, user.id, by=Role.OWNER)

    results = await asyncio.gather(leave(ann), leave(bob), return_exceptions=True)
    assert sum(isinstance(result, Unacceptable) for result in results) == 1
    assert (await tenants.list_members(connection, workspace.id, 1, 10))[1] == 1


async def test_a_user_stays_owner_of_the_personal_workspace(
    connection: asyncpg.Connection, ann: User, bob: User
) -> None:
    own = await personal(connection, ann)
    await tenants.add_member(connection, own, bob.id, Role.OWNER, by=Role.OWNER)
    with pytest.raises(Unacceptable, match="personal workspace"):
        await tenants.remove_member(connection, own, ann.id, by=Role.OWNER)
    with pytest.raises(Unacceptable, match="personal workspace"):
        await tenants.update_member(connection, own, ann.id, Role.ADMIN, by=Role.OWNER)
    await tenants.remove_member(connection, own, bob.id, by=Role.OWNER)


# Projects


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


async def test_a_user_whose_account_goes_leaves_no_workspace_behind(connection: asyncpg.Connection, ann: User) -> None:
    own = await personal(connection, ann)
    await accounts.delete(connection, ann.id)
    assert await tenants.workspace_with_role(connection, own, ann.id) is None
