"""Workspaces: the tenants. Each user has a personal one beside."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from marshmallow import Schema, fields, validate

from auth import audit, tenants
from auth.errors import NotVisible
from auth.permissions import Action, Role, decide
from auth.tenants import Workspace as Row
from gateway import lifecycle
from gateway.fields import PageQuery, Text, moment, page_of
from gateway.operation import Call, Database, PathKind, answer, nothing, operation, page
from orchestrator import permissions_changed

ROLES = [role.name.lower() for role in Role]
# More members than any workspace has.
_ALL = 1_000_000


class WorkspaceChanges(Schema):
    """What a workspace is made with, and what of it can change."""

    name = Text(required=True)


class Workspace(Schema):
    """A tenant. `role` is the caller's; null for an administrator who is no member."""

    id = fields.Integer(required=True)
    name = fields.String(required=True)
    personal = fields.Boolean(required=True)
    role = fields.String(required=True, allow_none=True, validate=validate.OneOf(ROLES))
    created_at = moment()
    updated_at = moment()


def _public(workspace: Row, role: Role | None) -> dict[str, Any]:
    return {
        "id": workspace.id,
        "name": workspace.name,
        "personal": workspace.personal_user_id is not None,
        "role": role.name.lower() if role else None,
        "created_at": workspace.created_at,
        "updated_at": workspace.updated_at,
    }


async def permitted(call: Call, action: Action) -> tuple[Row, Role | None]:
    """The workspace of the path and the caller's role in it. Raises NotVisible or Forbidden."""
    found = await tenants.workspace_with_role(call.connection, call.path["workspace_id"], call.identity.user_id)
    if found is None:
        raise NotVisible("There is no such workspace.")
    decide(call.identity, action, found[1], what="workspace")
    return found


@operation("List workspaces", tag="workspaces", query=PageQuery, answers={200: page_of(Workspace)})
async def list_workspaces(call: Call) -> web.Response:
    """Those that the caller is a member of; administrators see all."""
    query = call.query
    items, total = await tenants.list_for(call.connection, call.identity, query["page"], query["page_size"])
    return answer(page([_public(workspace, workspace.role) for workspace in items], total, query))


@operation(
    "Make a workspace",
    tag="workspaces",
    body=WorkspaceChanges,
    answers={201: Workspace},
    database=Database.WRITE,
)
async def create(call: Call) -> web.Response:
    """The caller becomes its owner."""
    workspace = await tenants.create(call.connection, call.body["name"], call.identity.user_id)
    await _changed(call, "workspace.created", workspace, user_id=call.identity.user_id)
    return answer(_public(workspace, Role.OWNER), 201, location=f"/api/v1/workspaces/{workspace.id}")


@operation("Read a workspace", tag="workspaces", path={"workspace_id": PathKind.ID}, answers={200: Workspace})
async def read(call: Call) -> web.Response:
    """For its members."""
    workspace, role = await permitted(call, Action.WORKSPACE_READ)
    return answer(_public(workspace, role))


@operation(
    "Change a workspace",
    tag="workspaces",
    path={"workspace_id": PathKind.ID},
    body=WorkspaceChanges,
    answers={200: Workspace},
    database=Database.WRITE,
)
async def update(call: Call) -> web.Response:
    """For its admins and owners."""
    workspace, role = await permitted(call, Action.WORKSPACE_UPDATE)
    changed = await tenants.update(call.connection, workspace.id, call.body["name"])
    await _changed(call, "workspace.updated", changed)
    return answer(_public(changed, role))


@operation(
    "Delete a workspace",
    tag="workspaces",
    path={"workspace_id": PathKind.ID},
    answers={204: None},
    database=Database.WRITE,
)
async def delete(call: Call) -> web.Response:
    """For its owners. 409 while it has projects; a personal workspace goes with its user only."""
    workspace, _ = await permitted(call, Action.WORKSPACE_DELETE)
    members, _ = await tenants.list_members(call.connection, workspace.id, 1, _ALL)
    await tenants.delete(call.connection, workspace.id)
    await _changed(call, "workspace.deleted", workspace)
    await permissions_changed.tell(call.connection, *(member.user_id for member in members))
    return nothing()


async def _changed(call: Call, what: str, workspace: Row, user_id: int | None = None) -> None:
    data = {"id": workspace.id, "name": workspace.name}
    await lifecycle.tell(call.connection, what, data, workspace_id=workspace.id, user_id=user_id)
    action = what.removesuffix("d")
    await audit.record(call.connection, call.identity.user_id, action, f"workspace:{workspace.id}", call.address)
