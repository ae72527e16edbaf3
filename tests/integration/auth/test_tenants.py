from __future__ import annotations

import asyncio

import asyncpg
import pytest

from auth import accounts, projects, tenants
from auth.accounts import User
from auth.errors import Forbidden, NotVisible, Taken, Unacceptable
from auth.permissions import Role
from auth.tenants import Workspace
from orchestrator.database import Pool
from tests.integration.auth.conftest import MakeUser, identity, personal

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


async def test_a_user_whose_account_goes_leaves_no_workspace_behind(connection: asyncpg.Connection, ann: User) -> None:
    own = await personal(connection, ann)
    await accounts.delete(connection, ann.id)
    assert await tenants.workspace_with_role(connection, own, ann.id) is None
