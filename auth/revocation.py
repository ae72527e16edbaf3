"""Taking tokens back before their time: one, or all that a user was issued until now.

A main token is looked up at each use, so that it ends on all gateways with the transaction that revokes it. What it has
opened already is closed by whoever is told that the user's permissions have changed.
"""

from __future__ import annotations

import asyncpg

from auth import api_tokens, refresh
from auth.claims import API_PREFIX, api_token_id
from auth.errors import NotVisible


async def revoke_token(connection: asyncpg.Connection, user_id: int, token_id: str) -> None:
    """Void one token of the user: a main token, with the sign-in that it came from and all short tokens behind it, or
    an API token (`api:{id}`). In one transaction.

    `token_id` is that of `Identity`. Raises NotVisible when there is no such user or API token. Whether a main token of
    that id was ever issued is not known: it is void from now on in any case.
    """
    if token_id.startswith(API_PREFIX):
        number = api_token_id(token_id)
        if number is None:
            raise NotVisible("There is no such API token.")
        await api_tokens.delete(connection, user_id, number)
        return
    async with connection.transaction():
        if await connection.fetchval("SELECT id FROM users WHERE id = $1 FOR UPDATE", user_id) is None:
            raise NotVisible("There is no such user.")
        if not await refresh.revoke_sign_in(connection, user_id, token_id):
            await connection.execute(
                "INSERT INTO revoked_tokens VALUES ($1, $2, 'infinity') ON CONFLICT DO NOTHING", user_id, token_id
            )


async def revoke_all(connection: asyncpg.Connection, user_id: int, *, with_api_tokens: bool) -> None:
    """Void every main, short and refresh token that the user was issued until now. In one transaction.

    Raises NotVisible when there is no such user.
    """
    async with connection.transaction():
        found = await connection.fetchval(
            "UPDATE users SET tokens_valid_from = clock_timestamp() WHERE id = $1 RETURNING id", user_id
        )
        if found is None:
            raise NotVisible("There is no such user.")
        await refresh.revoke_all(connection, user_id)
        if with_api_tokens:
            await connection.execute("DELETE FROM api_tokens WHERE user_id = $1", user_id)


async def revoked_among(connection: asyncpg.Connection, user_id: int, token_ids: list[str]) -> set[str]:
    """Those of the user's main tokens that were revoked one by one."""
    rows = await connection.fetch(
        "SELECT token_id FROM revoked_tokens WHERE user_id = $1 AND token_id = ANY($2::text[])", user_id, token_ids
    )
    return {row["token_id"] for row in rows}


async def purge(connection: asyncpg.Connection) -> int:
    """Forget the revoked tokens that have expired by now; returns how many."""
    status: str = await connection.execute("DELETE FROM revoked_tokens WHERE expires_at < now()")
    return int(status.rpartition(" ")[2])
