"""Signing in and out, and the swap of a main token for the short one that opens a WebSocket."""

from __future__ import annotations

from aiohttp import web
from marshmallow import Schema, fields, validate

from auth import accounts, audit, passwords, refresh, revocation
from gateway.api.users import Password, User, public
from gateway.context import Context
from gateway.fields import NO_NUL, Email, Flag, Text
from gateway.operation import Call, Database, answer, lease, nothing, operation
from gateway.problems import Problem
from orchestrator import permissions_changed


class Registration(Schema):
    """A new account."""

    email = Email(required=True)
    password = Password(required=True)
    name = Text(required=True)


class Login(Schema):
    """Who signs in."""

    email = Email(required=True)
    password = Text(required=True, most=passwords.LONGEST, allowed=NO_NUL)


class RefreshToken(Schema):
    """A refresh token, as a sign-in or the last refresh gave it."""

    refresh_token = Text(required=True, most=512)


class SignOut(RefreshToken):
    """What to sign out of."""

    everywhere = Flag(load_default=False, metadata={"description": "All sign-ins of the user, not only this one."})


class Tokens(Schema):
    """The answer to a sign-in (RFC 6749, section 5.1). `access_token` is the main token."""

    access_token = fields.String(required=True)
    refresh_token = fields.String(required=True)
    token_type = fields.String(required=True, validate=validate.Equal("Bearer"))
    expires_in = fields.Integer(required=True, metadata={"description": "Seconds."})


class Swap(Schema):
    """What a short token is for."""

    channels = fields.List(
        Text(most=200),
        validate=validate.Length(max=128),
        metadata={"description": "Narrows what may be subscribed to; never widens it."},
    )


class ShortToken(Schema):
    """A token that opens one WebSocket, once."""

    short_token = fields.String(required=True)
    expires_in = fields.Integer(required=True, metadata={"description": "Seconds."})


def _tokens(context: Context, user_id: int, refresh_token: str, main: refresh.Main) -> web.Response:
    return answer(
        {
            "access_token": context.tokens.issue_main(user_id, token_id=main.token_id),
            "refresh_token": refresh_token,
            "token_type": "Bearer",
            "expires_in": int(context.tokens.settings.access_ttl),
        }
    )


@operation(
    "Register an account",
    tag="auth",
    body=Registration,
    answers={201: User},
    signed_in=False,
    database=Database.NONE,
    limit="login",
)
async def register(call: Call) -> web.Response:
    """The account gets a personal workspace. 409 when the address has an account already."""
    if not call.context.settings.registration:
        raise Problem(403, "Registration is closed: ask an administrator for an account.")
    password_hash = await passwords.hash(call.body["password"])
    async with lease(call.context) as connection, connection.transaction():
        user = await accounts.register(connection, call.body["email"], password_hash, call.body["name"])
        await audit.record(connection, user.id, "user.register", f"user:{user.id}", call.address)
    return answer(public(user), 201)


@operation(
    "Sign in",
    tag="auth",
    body=Login,
    answers={200: Tokens},
    signed_in=False,
    database=Database.NONE,
    limit="login",
)
async def login(call: Call) -> web.Response:
    """401 for a wrong address and a wrong password alike."""
    user = await accounts.verify_login(call.context.pool, call.body["email"], call.body["password"])
    main = call.context.tokens.announce_main()
    async with lease(call.context) as connection, connection.transaction():
        token = await refresh.open_family(connection, user.id, call.context.tokens.settings.refresh_ttl, main)
        await audit.record(connection, user.id, "user.login", f"user:{user.id}", call.address)
    return _tokens(call.context, user.id, token, main)


@operation("Get new tokens", tag="auth", body=RefreshToken, answers={200: Tokens}, signed_in=False, limit="login")
async def renew(call: Call) -> web.Response:
    """Spends the refresh token and gives the next one. Using one twice revokes all that came from the same sign-in."""
    ttl = call.context.tokens.settings.refresh_ttl
    main = call.context.tokens.announce_main()
    try:
        user_id, token = await refresh.rotate(call.connection, call.body["refresh_token"], ttl, main)
    except refresh.Reused as reused:
        # Whoever holds the sign-in, thief or not, is cut off.
        await permissions_changed.tell(call.connection, reused.user_id)
        raise
    return _tokens(call.context, user_id, token, main)


@operation("Sign out", tag="auth", body=SignOut, answers={204: None}, signed_in=False, database=Database.WRITE)
async def logout(call: Call) -> web.Response:
    """Revokes the refresh token and all refresh and main tokens that came from the same sign-in: REST refuses them at
    once, and the connections that they opened are closed within a second.

    With `everywhere`, the same for all of the user's sign-ins. API tokens stay: each can be revoked by itself.
    """
    user_id = await refresh.revoke(call.connection, call.body["refresh_token"])
    if user_id is not None:
        everywhere: bool = call.body["everywhere"]
        if everywhere:
            await revocation.revoke_all(call.connection, user_id, with_api_tokens=False)
        await permissions_changed.tell(call.connection, user_id)
        await audit.record(
            call.connection, user_id, "user.logout", f"user:{user_id}", call.address, everywhere=everywhere
        )
    return nothing()


@operation("Swap a main token for a short one", tag="auth", body=Swap, body_required=False, answers={200: ShortToken})
async def swap(call: Call) -> web.Response:
    """The short token opens one connection to /ws, once, within a minute."""
    short = call.context.tokens.issue_short(call.identity, call.body.get("channels"))
    return answer({"short_token": short, "expires_in": int(call.context.tokens.settings.short_ttl)})
