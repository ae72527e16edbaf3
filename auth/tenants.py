"""Workspaces, the tenants, with their members.

Who may do what is decided by `auth.permissions.decide`; here are the rules that hold whoever asks.

Functions that write what depends on other rows lock the workspace's row first, in a transaction of their own (a
savepoint within the caller's), so that two requests cannot pass each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import asyncpg

from auth.errors import Forbidden, NotVisible, Taken, Unacceptable
from auth.names import clean
from auth.permissions import Identity, Role

_WORKSPACE = "w.id, w.name, w.personal_user_id, w.created_at, w.updated_at"


@dataclass(frozen=True, slots=True)
class Workspace:
    """A tenant."""

    id: int
    name: str
    # Whose personal workspace it is; None: nobody's.
    personal_user_id: int | None
    created_at: datetime
    updated_at: datetime
    # The role of who asked; None: none, or nobody in particular asked.
    role: Role | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A user in a workspace."""

    workspace_id: int
    user_id: int
    email: str
    name: str
    role: Role
    created_at: datetime


async def role_in(connection: asyncpg.Connection, workspace_id: int, user_id: int) -> Role | None:
    """The user's role in the workspace; None for who is no member, and when there is no such workspace."""
    return to_role(
        await connection.fetchval(
            "SELECT role::text FROM workspace_members WHERE workspace_id = $1 AND user_id = $2", workspace_id, user_id
        )
    )


# Workspaces


async def create(connection: asyncpg.Connection, name: str, owner_id: int) -> Workspace:
    """Make a workspace that belongs to the user. Raises Unacceptable(field="name")."""
    row = await connection.fetchrow(
        """WITH w AS (INSERT INTO workspaces (name) VALUES ($1) RETURNING *),
                m AS (INSERT INTO workspace_members (workspace_id, user_id, role) SELECT id, $2, 'owner' FROM w)
           SELECT id, name, personal_user_id, created_at, updated_at, 'owner' AS role FROM w""",
        clean(name, field="name"),
        owner_id,
    )
    return _workspace(row)


async def workspace_with_role(
    connection: asyncpg.Connection, workspace_id: int, user_id: int
) -> tuple[Workspace, Role | None] | None:
    """The workspace and the user's role in it, in one query; None when there is no such workspace."""
    row = await connection.fetchrow(
        f"""SELECT {_WORKSPACE}, m.role::text AS role FROM workspaces w
              LEFT JOIN workspace_members m ON m.workspace_id = w.id AND m.user_id = $2
             WHERE w.id = $1""",  # noqa: S608  A constant.
        workspace_id,
        user_id,
    )
    if row is None:
        return None
    workspace = _workspace(row)
    return workspace, workspace.role


async def list_for(
    connection: asyncpg.Connection, identity: Identity, page: int, page_size: int
) -> tuple[list[Workspace], int]:
    """One page (from 1) of the workspaces that the caller may see, newest first, and how many there are in all.

    An administrator sees every one; `role` still says what the caller is in it.
    """
    source = """FROM workspaces w LEFT JOIN workspace_members m ON m.workspace_id = w.id AND m.user_id = $1
                WHERE $2 OR m.user_id IS NOT NULL"""
    rows = await connection.fetch(
        f"SELECT {_WORKSPACE}, m.role::text AS role {source} ORDER BY w.id DESC LIMIT $3 OFFSET $4",
        identity.user_id,
        identity.is_admin,
        page_size,
        (page - 1) * page_size,
    )
    total = await connection.fetchval(f"SELECT count(*) {source}", identity.user_id, identity.is_admin)
    return [_workspace(row) for row in rows], total


async def workspace_ids(connection: asyncpg.Connection, user_id: int) -> list[int]:
    """The workspaces that the user is a member of, for lists that span them."""
    rows = await connection.fetch("SELECT workspace_id FROM workspace_members WHERE user_id = $1 ORDER BY 1", user_id)
    return [row["workspace_id"] for row in rows]


async def update(connection: asyncpg.Connection, workspace_id: int, name: str) -> Workspace:
    """Rename a workspace. Raises NotVisible, Unacceptable(field="name")."""
    row = await connection.fetchrow(
        f"UPDATE workspaces w SET name = $2, updated_at = now() WHERE id = $1 RETURNING {_WORKSPACE}",  # noqa: S608  A constant.
        workspace_id,
        clean(name, field="name"),
    )
    if row is None:
        raise _no_such("workspace")
    return _workspace(row)


async def delete(connection: asyncpg.Connection, workspace_id: int) -> None:
    """Delete a workspace and its memberships.

    Raises NotVisible; Unacceptable for a personal one, which goes with its user only; Taken(field="projects") or
    Taken(field="apps") for one that has some.
    """
    async with connection.transaction():
        if await _lock_workspace(connection, workspace_id, "UPDATE") is not None:
            raise Unacceptable(
                "A personal workspace goes with its user only: it cannot be deleted.", field="workspace_id"
            )
        count = await connection.fetchval("SELECT count(*) FROM projects WHERE workspace_id = $1", workspace_id)
        if count:
            raise Taken(f"The workspace has {count} project(s): delete them first.", field="projects")
        count = await connection.fetchval("SELECT count(*) FROM apps WHERE workspace_id = $1", workspace_id)
        if count:
            raise Taken(
                f"The workspace has {count} app(s): delete them first, and wait until they are gone.", field="apps"
            )
        await connection.execute("DELETE FROM workspaces WHERE id = $1", workspace_id)


# Members


async def list_members(
    connection: asyncpg.Connection, workspace_id: int, page: int, page_size: int
) -> tuple[list[Member], int]:
    """One page (from 1) of a workspace's members, owners first, and how many there are in all."""
    rows = await connection.fetch(
        """SELECT m.workspace_id, m.user_id, u.email, u.name, m.role::text AS role, m.created_at
             FROM workspace_members m JOIN users u ON u.id = m.user_id
            WHERE m.workspace_id = $1 ORDER BY m.role DESC, m.user_id LIMIT $2 OFFSET $3""",
        workspace_id,
        page_size,
        (page - 1) * page_size,
    )
    total = await connection.fetchval("SELECT count(*) FROM workspace_members WHERE workspace_id = $1", workspace_id)
    return [_member(row) for row in rows], total


async def get_member(connection: asyncpg.Connection, workspace_id: int, user_id: int) -> Member:
    """One member. Raises NotVisible."""
    row = await connection.fetchrow(
        """SELECT m.workspace_id, m.user_id, u.email, u.name, m.role::text AS role, m.created_at
             FROM workspace_members m JOIN users u ON u.id = m.user_id
            WHERE m.workspace_id = $1 AND m.user_id = $2""",
        workspace_id,
        user_id,
    )
    if row is None:
        raise _no_such("member")
    return _member(row)


async def add_member(
    connection: asyncpg.Connection, workspace_id: int, user_id: int, role: Role, *, by: Role
) -> Member:
    """Make the user a member. `by` is the caller's role there (OWNER for an administrator): only owners make owners.

    Raises NotVisible for the workspace, Unacceptable(field="user_id") for a user that does not exist, Taken for one who
    is a member already, Forbidden.
    """
    _only_owners(role, by)
    async with connection.transaction():
        await _lock_workspace(connection, workspace_id)
        if await connection.fetchval("SELECT id FROM users WHERE id = $1 FOR KEY SHARE", user_id) is None:
            raise Unacceptable("There is no such user.", field="user_id")
        status = await connection.execute(
            """INSERT INTO workspace_members (workspace_id, user_id, role) VALUES ($1, $2, $3::text::workspace_role)
               ON CONFLICT DO NOTHING""",
            workspace_id,
            user_id,
            role.name.lower(),
        )
        if status == "INSERT 0 0":
            raise Taken("This user is a member of the workspace already.", field="user_id")
        return await get_member(connection, workspace_id, user_id)


async def update_member(
    connection: asyncpg.Connection, workspace_id: int, user_id: int, role: Role, *, by: Role
) -> Member:
    """Give a member another role. Only owners (`by`) make owners, and only they demote one.

    Raises NotVisible, Forbidden, and Unacceptable(field="role") for the last owner and for the user of a personal
    workspace, who stays its owner.
    """
    async with connection.transaction():
        member = await _member_to_change(connection, workspace_id, user_id, by, still_owner=role is Role.OWNER)
        _only_owners(role, by)
        await connection.execute(
            "UPDATE workspace_members SET role = $3::text::workspace_role WHERE workspace_id = $1 AND user_id = $2",
            workspace_id,
            user_id,
            role.name.lower(),
        )
        return replace(member, role=role)


async def remove_member(connection: asyncpg.Connection, workspace_id: int, user_id: int, *, by: Role) -> None:
    """Take a member out, or let one leave. Only owners (`by`) remove an owner.

    Raises NotVisible, Forbidden, and Unacceptable(field="role") for the last owner or a personal workspace's user.
    """
    async with connection.transaction():
        await _member_to_change(connection, workspace_id, user_id, by, still_owner=False)
        await connection.execute(
            "DELETE FROM workspace_members WHERE workspace_id = $1 AND user_id = $2", workspace_id, user_id
        )


async def _lock_workspace(
    connection: asyncpg.Connection, workspace_id: int, strength: str = "NO KEY UPDATE"
) -> int | None:
    """Keep others from changing it and its members until the transaction ends; returns its `personal_user_id`."""
    row = await connection.fetchrow(
        f"SELECT personal_user_id FROM workspaces WHERE id = $1 FOR {strength}",  # noqa: S608  A constant of ours.
        workspace_id,
    )
    if row is None:
        raise _no_such("workspace")
    user_id: int | None = row["personal_user_id"]
    return user_id


async def _member_to_change(
    connection: asyncpg.Connection, workspace_id: int, user_id: int, by: Role, *, still_owner: bool
) -> Member:
    """Lock the workspace and return the member, when it may be changed to be, or not to be, an owner."""
    personal_user_id = await _lock_workspace(connection, workspace_id)
    member = await get_member(connection, workspace_id, user_id)
    if member.role is not Role.OWNER or still_owner:
        return member
    _only_owners(member.role, by)
    if user_id == personal_user_id:
        raise Unacceptable("This is the user's personal workspace: they stay its owner.", field="role")
    owners = await connection.fetchval(
        "SELECT count(*) FROM workspace_members WHERE workspace_id = $1 AND role = 'owner'", workspace_id
    )
    if owners == 1:
        raise Unacceptable("This is the workspace's last owner: make another member its owner first.", field="role")
    return member


def _only_owners(role: Role, by: Role) -> None:
    if role is Role.OWNER and by is not Role.OWNER:
        raise Forbidden("Only owners of a workspace may make, demote or remove its owners.")


def to_role(name: str | None) -> Role | None:
    """The role of that name in the database; None for no member."""
    return None if name is None else Role[name.upper()]


def _workspace(row: asyncpg.Record) -> Workspace:
    fields: dict[str, Any] = dict(row)
    return Workspace(**{**fields, "role": to_role(fields.get("role"))})


def _member(row: asyncpg.Record) -> Member:
    return Member(**{**row, "role": Role[row["role"].upper()]})


def _no_such(what: str) -> NotVisible:
    return NotVisible(f"There is no such {what}.")
