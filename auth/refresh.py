"""Refresh tokens: opaque, used once, each use gives the next. The tokens that descend from one sign-in are a family.

A spent token that is shown again means that two parties hold it, and nobody can tell which of them is the thief: the
whole family is revoked (RFC 9700, 4.14.2). That holds for two uses at the same moment as well: exactly one of them gets
the next token, the other counts as a reuse. A client with several tabs refreshes in one of them.

Only the SHA-256 of a token is stored: it is 256 random bits, so there is nothing to guess and no need for a slow hash.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from enum import Enum, auto
from uuid import UUID, uuid4

import asyncpg

from auth.errors import Unauthenticated

PREFIX = "ccr_"
_LENGTH = len(PREFIX) + 43


class Reused(Unauthenticated):
    """A spent token was shown again: all that came from its sign-in is void now. What it has opened is to be closed."""

    def __init__(self, message: str, user_id: int) -> None:
        super().__init__(message)
        self.user_id = user_id


class _Refusal(Enum):
    UNKNOWN = auto()
    EXPIRED = auto()
    REVOKED = auto()
    REUSED = auto()
    DISABLED = auto()


_SENTENCES = {
    _Refusal.UNKNOWN: "The refresh token is not known: sign in again.",
    _Refusal.EXPIRED: "The refresh token has expired: sign in again.",
    _Refusal.REVOKED: "The refresh token was revoked: sign in again.",
    _Refusal.REUSED: "The refresh token was used before, so all of the same sign-in are revoked now: sign in again.",
    _Refusal.DISABLED: "This account is disabled: ask an administrator.",
}


@dataclass(frozen=True, slots=True)
class Main:
    """The main token that is issued together with a refresh token."""

    # Its `jti`.
    token_id: str
    # Unix seconds until which somebody may believe it.
    expires_at: float


async def open_family(connection: asyncpg.Connection, user_id: int, ttl: float, main: Main | None = None) -> str:
    """The first refresh token of a sign-in, good for `ttl` seconds. `main` is issued with it, and revoked with it."""
    return await _insert(connection, uuid4(), user_id, ttl, main)


async def rotate(connection: asyncpg.Connection, token: str, ttl: float, main: Main | None = None) -> tuple[int, str]:
    """Spend the token. Returns `(user_id, next_token)`, the next one being good for `ttl` seconds from now.

    `main` is issued with the next one, and revoked with it.

    Raises Unauthenticated, saying whether the token is unknown, expired or revoked; and Reused, having revoked the
    family. That must last although an error is raised, so this makes its own transaction and commits before it raises:
    calling it within a transaction is a RuntimeError. Cancelling rolls back; the token then is still good.
    """
    if connection.is_in_transaction():
        raise RuntimeError("refresh.rotate commits by itself: call it outside of a transaction")
    async with connection.transaction():
        outcome = await _rotate(connection, _digest(token), ttl, main)
    match outcome:
        case _Refusal():
            raise Unauthenticated(_SENTENCES[outcome])
        case int():
            raise Reused(_SENTENCES[_Refusal.REUSED], outcome)
        case _:
            return outcome


async def revoke(connection: asyncpg.Connection, token: str) -> int | None:
    """Revoke the token's family and its main tokens: sign out. Returns whose it was; None for one that is not known."""
    async with connection.transaction():
        found = await _lock_family(connection, _digest(token))
        if found is None:
            return None
        family, user_id, _ = found
        await _revoke_family(connection, family)
        return user_id


async def revoke_sign_in(connection: asyncpg.Connection, user_id: int, main_token_id: str) -> bool:
    """Revoke the family that the main token came from, and all its main tokens. False: it came from no sign-in.

    Lock the user's row first (`SELECT FOR UPDATE`): no rotation slips through.
    """
    family = await connection.fetchval(
        "SELECT family FROM refresh_tokens WHERE user_id = $1 AND main_token_id = $2", user_id, main_token_id
    )
    if family is None:
        return False
    await _revoke_family(connection, family)
    return True


async def revoke_all(connection: asyncpg.Connection, user_id: int) -> None:
    """Revoke all of a user's refresh tokens. Lock the user's row first (`UPDATE users`): no rotation slips through."""
    await connection.execute(
        "UPDATE refresh_tokens SET revoked_at = now() WHERE user_id = $1 AND revoked_at IS NULL", user_id
    )


async def purge(connection: asyncpg.Connection) -> int:
    """Delete the tokens that have expired; returns how many. Until then a reuse can be told from a guess."""
    status: str = await connection.execute(
        """DELETE FROM refresh_tokens WHERE id IN (
               SELECT id FROM refresh_tokens WHERE expires_at < now() FOR UPDATE SKIP LOCKED)"""
    )
    return int(status.rpartition(" ")[2])


async def _rotate(
    connection: asyncpg.Connection, digest: bytes, ttl: float, main: Main | None = None
) -> tuple[int, str] | int | _Refusal:
    found = await _lock_family(connection, digest)
    if found is None:
        return _Refusal.UNKNOWN
    family, user_id, is_disabled = found
    # Read after the locks: whoever held them before us may have spent or revoked it.
    row = await connection.fetchrow(
        """SELECT id, used_at IS NOT NULL AS is_used, revoked_at IS NOT NULL AS is_revoked,
                  expires_at <= now() AS is_expired
             FROM refresh_tokens WHERE token_hash = $1""",
        digest,
    )
    if row is None:
        return _Refusal.UNKNOWN
    if row["is_revoked"]:
        return _Refusal.REVOKED
    if row["is_used"]:
        await _revoke_family(connection, family)
        return user_id
    if row["is_expired"]:
        return _Refusal.EXPIRED
    if is_disabled:
        return _Refusal.DISABLED
    await connection.execute("UPDATE refresh_tokens SET used_at = now() WHERE id = $1", row["id"])
    return user_id, await _insert(connection, family, user_id, ttl, main)


async def _lock_family(connection: asyncpg.Connection, digest: bytes) -> tuple[UUID, int, bool] | None:
    """Keep others from changing the family or its user until the transaction ends: `(family, user_id, is_disabled)`.

    The user's row is shared, so that a change of password, which writes it, waits for the rotation under way and then
    revokes what that made. The family's lock is an advisory one: rows locked one by one could deadlock.
    """
    row = await connection.fetchrow(
        """SELECT r.family, r.user_id, u.is_disabled FROM refresh_tokens r JOIN users u ON u.id = r.user_id
            WHERE r.token_hash = $1 FOR SHARE OF u""",
        digest,
    )
    if row is None:
        return None
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1::text, 0))", str(row["family"]))
    return row["family"], row["user_id"], row["is_disabled"]


async def _revoke_family(connection: asyncpg.Connection, family: UUID) -> None:
    await connection.execute(
        """WITH revoked AS (
               UPDATE refresh_tokens SET revoked_at = now() WHERE family = $1 AND revoked_at IS NULL)
           INSERT INTO revoked_tokens (user_id, token_id, expires_at)
           SELECT user_id, main_token_id, main_expires_at FROM refresh_tokens
            WHERE family = $1 AND main_expires_at > now()
           ON CONFLICT DO NOTHING""",
        family,
    )


async def _insert(connection: asyncpg.Connection, family: UUID, user_id: int, ttl: float, main: Main | None) -> str:
    token = PREFIX + secrets.token_urlsafe(32)
    await connection.execute(
        """INSERT INTO refresh_tokens (family, user_id, token_hash, expires_at, main_token_id, main_expires_at)
           VALUES ($1, $2, $3, now() + make_interval(secs => $4), $5, to_timestamp($6))""",
        family,
        user_id,
        _digest(token),
        float(ttl),
        main.token_id if main else None,
        main.expires_at if main else None,
    )
    return token


def _digest(token: str) -> bytes:
    if len(token) != _LENGTH or not token.startswith(PREFIX) or not token.isascii():
        raise Unauthenticated("This is no refresh token: it is malformed.")
    return hashlib.sha256(token.encode()).digest()
