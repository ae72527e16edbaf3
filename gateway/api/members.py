"""Who belongs to a workspace, in which role."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from auth import accounts, audit, tenants
from auth.permissions import Action, Role
from auth.tenants import Member as Row
from gateway import lifecycle
from gateway.api.workspaces import ROLES, permitted
from gateway.fields import Email, PageQuery, moment, object_id, page_of
from gateway.operation import Call, Database, PathKind, answer, nothing, operation, page
from orchestrator import permissions_changed
from orchestrator.errors import Invalid

_ONE_MEMBER = {"workspace_id": PathKind.ID, "user_id": PathKind.ID}


class NewMember(Schema):
    """Who joins: by `user_id` or by `email`."""

    user_id = object_id()
    email = Email()
    role = fields.String(required=True, validate=validate.OneOf(ROLES))

    @validates_schema
    def _one_of_two(self, data: dict[str, Any], **_: Any) -> None:
        if ("user_id" in data) == ("email" in data):
            raise ValidationError("Give either user_id or email.", "user_id")


class MemberChanges(Schema):
    """Another role."""

    role = fields.String(required=True, validate=validate.OneOf(ROLES))


class Member(Schema):
    """A user in a workspace."""

    workspace_id = fields.Integer(required=True)
    user_id = fields.Integer(required=True)
    email = fields.String(required=True)
    name = fields.String(required=True)
    role = fields.String(required=True, validate=validate.OneOf(ROLES))
    created_at = moment()


def _public(member: Row) -> dict[str, Any]:
    return {
        "workspace_id": member.workspace_id,
        "user_id": member.user_id,
        "email": member.email,
        "name": member.name,
        "role": member.role.name.lower(),
        "created_at": member.created_at,
    }


@operation(
    "List members",
    tag="workspaces",
    path={"workspace_id": PathKind.ID},
    query=PageQuery,
    answers={200: page_of(Member)},
)
async def list_members(call: Call) -> web.Response:
    """Owners first."""
    workspace, _ = await permitted(call, Action.MEMBER_READ)
    query = call.query
    items, total = await tenants.list_members(call.connection, workspace.id, query["page"], query["page_size"])
    return answer(page([_public(member) for member in items], total, query))


@operation(
    "Add a member",
    tag="workspaces",
    path={"workspace_id": PathKind.ID},
    body=NewMember,
    answers={201: Member},
    database=Database.WRITE,
)
async def add(call: Call) -> web.Response:
    """For admins and owners; only owners make owners."""
    workspace, role = await permitted(call, Action.MEMBER_WRITE)
    user_id = call.body.get("user_id")
    if user_id is None:
        user = await accounts.find_by_email(call.connection, call.body["email"])
        if user is None:
            raise Invalid("There is no account with this address.", field="email")
        user_id = user.id
    member = await tenants.add_member(
        call.connection, workspace.id, user_id, Role[call.body["role"].upper()], by=_acting(call, role)
    )
    await _changed(call, "member.add", "member.added", member.workspace_id, user_id, role=call.body["role"])
    return answer(_public(member), 201, location=f"/api/v1/workspaces/{workspace.id}/members/{user_id}")


@operation(
    "Give a member another role",
    tag="workspaces",
    path=_ONE_MEMBER,
    body=MemberChanges,
    answers={200: Member},
    database=Database.WRITE,
)
async def change(call: Call) -> web.Response:
    """For admins and owners; only owners make and demote owners, and one of them stays."""
    workspace, role = await permitted(call, Action.MEMBER_WRITE)
    user_id = call.path["user_id"]
    member = await tenants.update_member(
        call.connection, workspace.id, user_id, Role[call.body["role"].upper()], by=_acting(call, role)
    )
    await _changed(call, "member.update", "member.updated", workspace.id, user_id, role=call.body["role"])
    return answer(_public(member))


@operation("Remove a member", tag="workspaces", path=_ONE_MEMBER, answers={204: None}, database=Database.WRITE)
async def remove(call: Call) -> web.Response:
    """For admins and owners, and for whoever leaves. The sockets of who is removed hear no more within a second."""
    user_id = call.path["user_id"]
    leaves = user_id == call.identity.user_id
    workspace, role = await permitted(call, Action.MEMBER_READ if leaves else Action.MEMBER_WRITE)
    await tenants.remove_member(call.connection, workspace.id, user_id, by=_acting(call, role))
    await _changed(call, "member.remove", "member.removed", workspace.id, user_id)
    return nothing()


def _acting(call: Call, role: Role | None) -> Role:
    """In which role the caller acts: administrators own everything."""
    return Role.OWNER if call.identity.is_admin or role is None else role


async def _changed(call: Call, action: str, event_type: str, workspace_id: int, user_id: int, **details: Any) -> None:
    data = {"workspace_id": workspace_id, "user_id": user_id, **details}
    await lifecycle.tell(call.connection, event_type, data, workspace_id=workspace_id, user_id=user_id)
    await permissions_changed.tell(call.connection, user_id)
    await audit.record(
        call.connection,
        call.identity.user_id,
        action,
        f"workspace:{workspace_id}",
        call.address,
        user_id=user_id,
        **details,
    )
