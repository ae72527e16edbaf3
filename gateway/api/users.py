"""Accounts: one's own, and all of them for administrators."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from marshmallow import Schema, fields

from auth import accounts, audit, passwords
from auth.errors import Forbidden
from auth.permissions import Action, Scope, decide
from gateway.fields import NO_NUL, Email, Flag, PageQuery, Text, moment, page_of
from gateway.operation import Call, Database, PathKind, answer, lease, nothing, operation, page
from gateway.problems import Problem
from gateway.ratelimit import LIMITS, limited_address
from orchestrator import permissions_changed


class Password(Text):
    """A password to be set, in the bounds that `auth.passwords` gives it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(least=passwords.SHORTEST, most=passwords.LONGEST, allowed=NO_NUL, **kwargs)


class User(Schema):
    """An account."""

    id = fields.Integer(required=True)
    external_id = fields.String(required=True, allow_none=True)
    email = fields.String(required=True)
    name = fields.String(required=True)
    is_admin = fields.Boolean(required=True)
    is_disabled = fields.Boolean(required=True)
    created_at = moment()
    updated_at = moment()


class OwnChanges(Schema):
    """What people may change of their own account. A new password takes the current one."""

    email = Email()
    name = Text()
    password = Password()
    current_password = Text(most=passwords.LONGEST, allowed=NO_NUL)


class Changes(Schema):
    """What administrators may change of an account."""

    email = Email()
    name = Text()
    password = Password()
    is_admin = Flag()
    is_disabled = Flag()


class UsersQuery(PageQuery):
    """Which accounts."""

    q = Text(metadata={"description": "Part of the address or the name."})


def public(user: accounts.User) -> dict[str, Any]:
    """An account, as answers have it."""
    return {
        "id": user.id,
        "external_id": user.external_id,
        "email": user.email,
        "name": user.name,
        "is_admin": user.is_admin,
        "is_disabled": user.is_disabled,
        "created_at": user.created_at,
        "updated_at": user.updated_at,
    }


@operation("Read one's own account", tag="users", answers={200: User})
async def me(call: Call) -> web.Response:
    """Who the token stands for."""
    return answer(public(await accounts.get(call.connection, call.identity.user_id)))


@operation(
    "Change one's own account",
    tag="users",
    body=OwnChanges,
    answers={200: User},
    database=Database.NONE,
    scope=Scope.WRITE,
)
async def update_me(call: Call) -> web.Response:
    """A new password voids every main and refresh token issued before. A new address takes a token of all scopes."""
    password_hash = None
    if "email" in call.body and call.identity.scopes is not None:
        raise Forbidden("A token of limited scopes cannot change the address that its user signs in with.")
    if "password" in call.body:
        call.request.app[LIMITS].login.take(limited_address(call.address))
        given = call.body.get("current_password", "")
        if not await accounts.verify_password(call.context.pool, call.identity.user_id, given):
            raise Problem(422, "The current password is wrong.", errors={"current_password": ["Wrong."]})
        password_hash = await passwords.hash(call.body["password"])
    return await _update(call, call.identity.user_id, password_hash)


@operation("List accounts", tag="users", query=UsersQuery, answers={200: page_of(User)}, scope=Scope.ADMIN)
async def list_users(call: Call) -> web.Response:
    """For administrators."""
    decide(call.identity, Action.USER_ADMIN_READ)
    query = call.query
    items, total = await accounts.list_page(
        call.connection, page=query["page"], page_size=query["page_size"], query=query.get("q")
    )
    return answer(page([public(user) for user in items], total, query))


@operation("Read an account", tag="users", path={"user_id": PathKind.ID}, answers={200: User}, scope=Scope.ADMIN)
async def read(call: Call) -> web.Response:
    """For administrators."""
    decide(call.identity, Action.USER_ADMIN_READ)
    return answer(public(await accounts.get(call.connection, call.path["user_id"])))


@operation(
    "Change an account",
    tag="users",
    path={"user_id": PathKind.ID},
    body=Changes,
    answers={200: User},
    database=Database.NONE,
    scope=Scope.ADMIN,
)
async def update(call: Call) -> web.Response:
    """For administrators. A disabled account loses its tokens and its connections."""
    decide(call.identity, Action.USER_ADMIN_WRITE)
    password_hash = await passwords.hash(call.body["password"]) if "password" in call.body else None
    return await _update(call, call.path["user_id"], password_hash)


async def _update(call: Call, user_id: int, password_hash: str | None) -> web.Response:
    changes = {name: value for name, value in call.body.items() if "password" not in name}
    async with lease(call.context) as connection, connection.transaction():
        user = await accounts.update(connection, user_id, password_hash=password_hash, **changes)
        if password_hash or "is_admin" in changes or "is_disabled" in changes:
            await permissions_changed.tell(connection, user_id)
        # Names of the fields only: a new address is nobody's business in a log.
        await audit.record(
            connection, call.identity.user_id, "user.update", f"user:{user_id}", call.address, fields=sorted(call.body)
        )
    return answer(public(user))


@operation(
    "Delete an account",
    tag="users",
    path={"user_id": PathKind.ID},
    answers={204: None},
    database=Database.WRITE,
    scope=Scope.ADMIN,
)
async def delete(call: Call) -> web.Response:
    """For administrators. 409 while others may need what the account owns: the answer says what."""
    decide(call.identity, Action.USER_ADMIN_WRITE)
    user_id = call.path["user_id"]
    await accounts.delete(call.connection, user_id)
    await permissions_changed.tell(call.connection, user_id)
    await audit.record(call.connection, call.identity.user_id, "user.delete", f"user:{user_id}", call.address)
    return nothing()
