from __future__ import annotations

import asyncio

import asyncpg
import pytest

from auth import accounts, refresh
from auth.errors import Unauthenticated
from orchestrator.database import Pool
from tests.integration.auth.conftest import MakeUser

MONTH = 30 * 86400.0


async def refusal(connection: asyncpg.Connection, token: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await refresh.rotate(connection, token, MONTH)
    assert not token or token not in str(caught.value)
    return str(caught.value)


async def test_each_use_gives_the_next_token(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()
    token = await refresh.open_family(connection, user.id, MONTH)
    seen = {token}
    for _ in range(3):
        user_id, token = await refresh.rotate(connection, token, MONTH)
        assert user_id == user.id
        seen.add(token)
    assert len(seen) == 4
    assert all(token.startswith("ccr_") and len(token) == 47 for token in seen)
    assert await connection.fetchval("SELECT count(DISTINCT family) FROM refresh_tokens") == 1
    stored = await connection.fetchval("SELECT string_agg(refresh_tokens::text, ' ') FROM refresh_tokens")
    assert not any(token in stored for token in seen)


async def test_a_reuse_revokes_the_family_and_no_other(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()
    stolen = await refresh.open_family(connection, user.id, MONTH)
    other = await refresh.open_family(connection, user.id, MONTH)
    _, held = await refresh.rotate(connection, stolen, MONTH)
    assert "was used before" in await refusal(connection, stolen)
    assert await refusal(connection, held) == "The refresh token was revoked: sign in again."
    assert await refusal(connection, stolen) == "The refresh token was revoked: sign in again."
    await refresh.rotate(connection, other, MONTH)


async def test_of_concurrent_uses_one_wins_and_the_others_are_reuses(pool: Pool, make_user: MakeUser) -> None:
    user = await make_user()
    async with pool.acquire() as connection:
        token = await refresh.open_family(connection, user.id, MONTH)

    async def rotate() -> object:
        async with pool.acquire() as connection:
            return await refresh.rotate(connection, token, MONTH)

    results = await asyncio.gather(*(rotate() for _ in range(8)), return_exceptions=True)
    won = [result for result in results if isinstance(result, tuple)]
    lost = [str(result) for result in results if isinstance(result, Unauthenticated)]
    assert (len(won), len(lost)) == (1, 7)
    assert sum("was used before" in sentence for sentence in lost) == 1
    async with pool.acquire() as connection:
        assert "revoked" in await refusal(connection, won[0][1])


async def test_within_a_transaction_rotation_is_a_mistake_of_ours(
    connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    token = await refresh.open_family(connection, (await make_user()).id, MONTH)
    async with connection.transaction():
        with pytest.raises(RuntimeError, match="outside of a transaction"):
            await refresh.rotate(connection, token, MONTH)


@pytest.mark.parametrize("garbage", ["", "ccr_", "cca_" + "x" * 43, "ccr_" + "x" * 42, "ccr_" + "é" * 43, "ccr_\ud800"])
async def test_what_is_no_refresh_token_is_refused_for_its_looks(garbage: str) -> None:
    with pytest.raises(Unauthenticated, match="This is no refresh token: it is malformed"):
        refresh._digest(garbage)


async def test_unknown_expired_and_disabled_are_told_apart(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()
    assert await refusal(connection, "ccr_" + "x" * 43) == "The refresh token is not known: sign in again."
    expired = await refresh.open_family(connection, user.id, -1)
    assert await refusal(connection, expired) == "The refresh token has expired: sign in again."
    token = await refresh.open_family(connection, user.id, MONTH)
    await connection.execute("UPDATE users SET is_disabled = true")
    assert "disabled" in await refusal(connection, token)
    await connection.execute("UPDATE users SET is_disabled = false")
    await refresh.rotate(connection, token, MONTH)


async def test_signing_out_revokes_the_family(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()
    first = await refresh.open_family(connection, user.id, MONTH)
    _, second = await refresh.rotate(connection, first, MONTH)
    assert await refresh.revoke(connection, first) == user.id
    assert "revoked" in await refusal(connection, second)
    assert await refresh.revoke(connection, second) == user.id
    assert await refresh.revoke(connection, "ccr_" + "x" * 43) is None


async def test_a_new_password_revokes_what_a_rotation_under_way_has_made(
    pool: Pool, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    token = await refresh.open_family(connection, user.id, MONTH)

    async def change_password() -> None:
        async with pool.acquire() as other:
            await accounts.update(other, user.id, password_hash="another")

    # What `rotate` does, held open at its end.
    async with connection.transaction():
        outcome = await refresh._rotate(connection, refresh._digest(token), MONTH)
        assert isinstance(outcome, tuple)
        changing = asyncio.create_task(change_password())
        async with asyncio.timeout(5):
            while not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
                await asyncio.sleep(0.01)
    await changing
    assert "revoked" in await refusal(connection, outcome[1])


async def test_purge_deletes_what_has_expired(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()
    await refresh.open_family(connection, user.id, -1)
    kept = await refresh.open_family(connection, user.id, MONTH)
    assert await refresh.purge(connection) == 1
    assert await refresh.purge(connection) == 0
    await refresh.rotate(connection, kept, MONTH)


async def test_a_token_that_is_purged_while_its_rotation_waits_is_not_known(
    pool: Pool, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    token = await refresh.open_family(connection, user.id, MONTH)
    family = await connection.fetchval("SELECT family::text FROM refresh_tokens")

    async def rotate() -> str:
        async with pool.acquire() as other:
            return await refusal(other, token)

    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", family)
        rotating = asyncio.create_task(rotate())
        async with asyncio.timeout(5):
            while not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
                await asyncio.sleep(0.01)
        await connection.execute("DELETE FROM refresh_tokens")
    assert "not known" in await rotating
