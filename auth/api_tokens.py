"""Personal API tokens: opaque, named, scoped, perhaps expiring. Only their SHA-256 is stored; the secret shows once."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from auth import channels as patterns
from auth.errors import Forbidden, NotVisible, Taken, Unacceptable, Unauthenticated
from auth.names import clean
from auth.permissions import Identity, Scope, has_scope

PREFIX = "cca_"
_LENGTH = len(PREFIX) + 43
_COLUMNS = "id, user_id, name, scopes, channels, created_at, expires_at, last_used_at"


@dataclass(frozen=True, slots=True)
class ApiToken:
    """A token as its owner sees it in the list: everything but the secret."""

    id: int
    user_id: int
    name: str
    scopes: tuple[str, ...]
    channels: tuple[str, ...]
    created_at: datetime
    # None: never.
    expires_at: datetime | None
    # To the minute: it is not written more often. None: not used yet.
    last_used_at: datetime | None


async def create(
    connection: asyncpg.Connection,
    user_id: int,
    name: str,
    scopes: Collection[str],
    channels: Sequence[str] = (),
    expires_at: datetime | None = None,
    *,
    by: Identity | None = None,
) -> tuple[ApiToken, str]:
    """Make a token; returns it and its secret, which cannot be had again. `expires_at` has a time zone.

    `by` is who asks: nobody hands out more than they hold, neither a scope nor a channel. Without it (an operator's
    command) channels can be given to administrators only, who may subscribe to all of them anyhow.
    Raises Forbidden for that, Unacceptable for a wrong value, Taken(field="name") when the user has one of that name.
    """
    name = clean(name, field="name")
    _check_scopes(scopes)
    channels = patterns.check_patterns(channels)
    _check_grant(by, scopes, channels, is_admin=await _is_admin(connection, user_id))
    secret = PREFIX + secrets.token_urlsafe(32)
    row = await connection.fetchrow(
        f"""INSERT INTO api_tokens (user_id, name, token_hash, scopes, channels, expires_at)
            VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (user_id, name) DO NOTHING RETURNING {_COLUMNS}""",  # noqa: S608  A constant.
        user_id,
        name,
        _digest(secret),
        [scope.value for scope in Scope if scope in scopes],
        list(channels),
        expires_at,
    )
    if row is None:
        raise Taken(f"You have an API token named {name!r} already: choose another name, or delete it.", field="name")
    return _token(row), secret


async def list_for(connection: asyncpg.Connection, user_id: int) -> list[ApiToken]:
    """A user's tokens, newest first, expired ones included."""
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM api_tokens WHERE user_id = $1 ORDER BY id DESC",  # noqa: S608  A constant.
        user_id,
    )
    return [_token(row) for row in rows]


async def delete(connection: asyncpg.Connection, user_id: int, id: int) -> None:  # noqa: A002  The column's name.
    """Revoke a token of this user. Raises NotVisible when there is none of that id."""
    if (
        await connection.fetchval("DELETE FROM api_tokens WHERE user_id = $1 AND id = $2 RETURNING id", user_id, id)
        is None
    ):
        raise NotVisible("There is no such API token.")


async def authenticate(connection: asyncpg.Connection, secret: str) -> Identity:
    """Who holds the token. One query, and once a minute a second, which notes the use. Raises Unauthenticated."""
    if len(secret) != _LENGTH or not secret.isascii():
        raise Unauthenticated("The API token is malformed.")
    row = await connection.fetchrow(
        """SELECT t.id, t.scopes, t.channels, extract(epoch FROM t.expires_at)::float8 AS expires_at,
                  t.expires_at <= now() AS is_expired,
                  coalesce(t.last_used_at < now() - interval '1 minute', true) AS is_use_unnoted,
                  u.id AS user_id, u.email, u.is_admin, u.is_disabled
             FROM api_tokens t JOIN users u ON u.id = t.user_id WHERE t.token_hash = $1""",
        _digest(secret),
    )
    if row is None:
        raise Unauthenticated("The API token is not known: it was revoked, or never issued.")
    if row["is_expired"]:
        raise Unauthenticated("The API token has expired.")
    if row["is_disabled"]:
        raise Unauthenticated("This account is disabled: ask an administrator.")
    if row["is_use_unnoted"]:
        await connection.execute("UPDATE api_tokens SET last_used_at = now() WHERE id = $1", row["id"])
    return Identity(
        user_id=row["user_id"],
        email=row["email"],
        is_admin=row["is_admin"],
        scopes=frozenset(row["scopes"]),
        channels=tuple(row["channels"]),
        expires_at=row["expires_at"],
        token_id=f"api:{row['id']}",
    )


async def _is_admin(connection: asyncpg.Connection, user_id: int) -> bool:
    is_admin: bool | None = await connection.fetchval("SELECT is_admin FROM users WHERE id = $1", user_id)
    if is_admin is None:
        raise NotVisible("There is no such user.")
    return is_admin


def _check_scopes(scopes: Collection[str]) -> None:
    known = ", ".join(Scope)
    if not scopes:
        raise Unacceptable(f"A token without scopes could do nothing: name some of {known}.", field="scopes")
    for scope in scopes:
        if scope not in list(Scope):
            raise Unacceptable(f"{scope[:50]!r} is no scope; the scopes are {known}.", field="scopes")


def _check_grant(by: Identity | None, scopes: Collection[str], channels: Sequence[str], *, is_admin: bool) -> None:
    if by is not None:
        for scope in scopes:
            if not has_scope(by, Scope(scope)):
                raise Forbidden(
                    f"The token that you use lacks the scope {scope!r}, so that it cannot give it to another."
                )
    if is_admin if by is None else by.is_admin and has_scope(by, Scope.ADMIN):
        return
    for channel in channels:
        if by is None or not patterns.covers(by.channels, channel):
            raise Forbidden(f"The token that you use does not name the channel {channel!r}, so that it cannot give it.")


def _token(row: asyncpg.Record) -> ApiToken:
    return ApiToken(**{**row, "scopes": tuple(row["scopes"]), "channels": tuple(row["channels"])})


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
