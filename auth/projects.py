"""Projects: what sessions are made of. Each lies in a workspace, whose members' roles decide who may do what with it.

A connection's jsonb codec must be set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypedDict, Unpack
from uuid import UUID

import asyncpg

from auth.errors import NotVisible, Taken
from auth.names import clean
from auth.permissions import Identity, Role
from auth.tenants import to_role

_PROJECT = """p.id, p.uuid, p.workspace_id, p.name, p.repo_url, p.branch, p.env, p.chart_values, p.created_by,
              p.created_at, p.updated_at"""


@dataclass(frozen=True, slots=True)
class Project:
    """What a session is made of. Its UUID and its workspace never change."""

    id: int
    uuid: UUID
    workspace_id: int
    name: str
    repo_url: str | None
    branch: str | None
    env: Mapping[str, str]
    # As `orchestrator.machine_kinds.ChartValuesSchema` takes them.
    chart_values: Mapping[str, Any]
    # None: that user is gone.
    created_by: int | None
    created_at: datetime
    updated_at: datetime


class ProjectChanges(TypedDict, total=False):
    """What `update` can change."""

    name: str
    repo_url: str | None
    branch: str | None
    env: Mapping[str, str]
    chart_values: Mapping[str, Any]


async def with_role(
    connection: asyncpg.Connection,
    *,
    user_id: int,
    id: int | None = None,  # noqa: A002  The column's name.
    uuid: UUID | None = None,
) -> tuple[Project, Role | None] | None:
    """The project of that id or UUID, and the user's role in its workspace, in one query; None when there is none."""
    row = await connection.fetchrow(
        f"""SELECT {_PROJECT}, m.role::text AS role FROM projects p
              LEFT JOIN workspace_members m ON m.workspace_id = p.workspace_id AND m.user_id = $2
             WHERE p.{"uuid" if id is None else "id"} = $1""",  # noqa: S608  Constants.
        uuid if id is None else id,
        user_id,
    )
    return None if row is None else (_project(row), to_role(row["role"]))


async def by_id(connection: asyncpg.Connection, id: int) -> Project:  # noqa: A002  The column's name.
    """The project. Raises NotVisible."""
    return _found(await connection.fetchrow(f"SELECT {_PROJECT} FROM projects p WHERE id = $1", id))  # noqa: S608  A constant.


async def by_uuid(connection: asyncpg.Connection, uuid: UUID) -> Project:
    """The project. Raises NotVisible."""
    return _found(await connection.fetchrow(f"SELECT {_PROJECT} FROM projects p WHERE uuid = $1", uuid))  # noqa: S608  A constant.


async def list_page(
    connection: asyncpg.Connection, identity: Identity, page: int, page_size: int, *, workspace_id: int | None = None
) -> tuple[list[Project], int]:
    """One page (from 1) of the projects that the caller may see, newest first, and how many there are in all.

    `workspace_id` keeps those of one workspace; of one that the caller may not see there are none.
    """
    source = """FROM projects p WHERE ($3::bigint IS NULL OR p.workspace_id = $3) AND ($2 OR p.workspace_id IN (
                    SELECT m.workspace_id FROM workspace_members m WHERE m.user_id = $1))"""
    scope = (identity.user_id, identity.is_admin, workspace_id)
    rows = await connection.fetch(
        f"SELECT {_PROJECT} {source} ORDER BY p.id DESC LIMIT $4 OFFSET $5",
        *scope,
        page_size,
        (page - 1) * page_size,
    )
    total = await connection.fetchval(f"SELECT count(*) {source}", *scope)
    return [_project(row) for row in rows], total


async def create(
    connection: asyncpg.Connection,
    workspace_id: int,
    *,
    name: str,
    repo_url: str | None = None,
    branch: str | None = None,
    env: Mapping[str, str] | None = None,
    chart_values: Mapping[str, Any] | None = None,
    created_by: int | None = None,
    uuid: UUID | None = None,
) -> Project:
    """Make a project; without a `uuid` it gets a random one.

    Which repositories are allowed is for the caller to have checked. Raises NotVisible for the workspace,
    Taken(field="uuid"), Unacceptable(field="name").
    """
    name = clean(name, field="name")
    async with connection.transaction():
        if await connection.fetchval("SELECT id FROM workspaces WHERE id = $1 FOR KEY SHARE", workspace_id) is None:
            raise NotVisible("There is no such workspace.")
        row = await connection.fetchrow(
            f"""INSERT INTO projects AS p (uuid, workspace_id, name, repo_url, branch, env, chart_values, created_by)
                VALUES (coalesce($1, gen_random_uuid()), $2, $3, $4, $5, $6, $7, $8)
                ON CONFLICT (uuid) DO NOTHING RETURNING {_PROJECT}""",  # noqa: S608  A constant.
            uuid,
            workspace_id,
            name,
            repo_url,
            branch,
            dict(env or {}),
            dict(chart_values or {}),
            created_by,
        )
    if row is None:
        raise Taken(f"There is a project with the UUID {uuid} already.", field="uuid")
    return _project(row)


async def adopt(connection: asyncpg.Connection, uuid: UUID, user_id: int) -> Project:
    """Make a project that another service owns one of the user's personal workspace, unless it is known.

    Of concurrent calls one makes it and all get it. Raises NotVisible when it is, or has just become, a project of a
    workspace that the user is no member of.
    """
    row = await connection.fetchrow(
        f"""INSERT INTO projects AS p (uuid, workspace_id, name, created_by)
            SELECT $1::uuid, w.id, 'project ' || left($1::uuid::text, 8), $2 FROM workspaces w
             WHERE w.personal_user_id = $2
            ON CONFLICT (uuid) DO NOTHING RETURNING {_PROJECT}""",  # noqa: S608  A constant.
        uuid,
        user_id,
    )
    if row is not None:
        return _project(row)
    found = await with_role(connection, uuid=uuid, user_id=user_id)
    if found is None or found[1] is None:
        raise _no_such()
    return found[0]


async def update(connection: asyncpg.Connection, project_id: int, **changes: Unpack[ProjectChanges]) -> Project:
    """Change what is given; sessions take it up at their next start. Raises NotVisible, Unacceptable(field="name")."""
    if "name" in changes:
        changes["name"] = clean(changes["name"], field="name")
    async with connection.transaction():
        row = await connection.fetchrow(
            f"SELECT {_PROJECT} FROM projects p WHERE id = $1 FOR NO KEY UPDATE",  # noqa: S608  A constant.
            project_id,
        )
        project = replace(_found(row), **changes)
        row = await connection.fetchrow(
            f"""UPDATE projects p SET name = $2, repo_url = $3, branch = $4, env = $5, chart_values = $6,
                       updated_at = now()
                 WHERE id = $1 RETURNING {_PROJECT}""",  # noqa: S608  A constant.
            project_id,
            project.name,
            project.repo_url,
            project.branch,
            dict(project.env),
            dict(project.chart_values),
        )
        return _project(row)


async def delete(connection: asyncpg.Connection, project_id: int) -> None:
    """Delete a project and what is left of its deleted sessions, in one transaction.

    Raises NotVisible, and Taken(field="session") while it has a session, whatever that one's status.
    """
    async with connection.transaction():
        # No session can be made while this row is locked: its reference asks for a share of it.
        if await connection.fetchval("SELECT id FROM projects WHERE id = $1 FOR UPDATE", project_id) is None:
            raise _no_such()
        session = await connection.fetchrow(
            "SELECT id, status FROM sessions WHERE project_id = $1 AND status <> 'deleted'", project_id
        )
        if session is not None:
            raise Taken(
                f"The project has a session, {session['id']}, which is {session['status']}: delete it and wait until "
                "it is gone.",
                field="session",
            )
        await connection.execute("DELETE FROM sessions WHERE project_id = $1", project_id)
        await connection.execute("DELETE FROM projects WHERE id = $1", project_id)


def _project(row: asyncpg.Record) -> Project:
    fields: dict[str, Any] = dict(row)
    fields.pop("role", None)
    return Project(**fields)


def _found(row: asyncpg.Record | None) -> Project:
    if row is None:
        raise _no_such()
    return _project(row)


def _no_such() -> NotVisible:
    return NotVisible("There is no such project.")
