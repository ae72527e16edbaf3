from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import count

import asyncpg
import pytest

from auth import accounts, api_tokens
from auth.errors import Forbidden, NotVisible, Taken, Unacceptable, Unauthenticated
from auth.permissions import Identity
from auth.tokens import Tokens
from tests.integration.auth.conftest import MakeUser


async def test_an_api_token_stands_for_its_user_within_its_scopes(
    tokens: Tokens, connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user(is_admin=True)
    expires_at = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    token, secret = await api_tokens.create(connection, user.id, " ci ", ["write", "read"], ["app:*"], expires_at)
    assert secret.startswith("cca_")
    assert len(secret) == 47
    assert (token.name, token.scopes, token.channels, token.expires_at) == (
        "ci", ("read", "write"), ("app:*",), expires_at,
    )  # fmt: skip
    assert await tokens.authenticate(connection, secret) == Identity(
        user_id=user.id,
        email=user.email,
        is_admin=True,
        scopes=frozenset({"read", "write"}),
        channels=("app:*",),
        expires_at=expires_at.timestamp(),
        token_id=f"api:{token.id}",
    )
    stored = await connection.fetchval("SELECT api_tokens::text FROM api_tokens")
    assert secret not in stored


async def test_its_use_is_noted_once_a_minute(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()
    token, secret = await api_tokens.create(connection, user.id, "ci", ["read"])
    assert token.last_used_at is None

    async def last_used_at() -> datetime | None:
        return (await api_tokens.list_for(connection, user.id))[0].last_used_at

    await api_tokens.authenticate(connection, secret)
    first = await last_used_at()
    assert first is not None
    await api_tokens.authenticate(connection, secret)
    assert await last_used_at() == first
    await connection.execute("UPDATE api_tokens SET last_used_at = last_used_at - interval '61 seconds'")
    await api_tokens.authenticate(connection, secret)
    assert await last_used_at() > first


async def test_an_expired_a_deleted_and_a_disabled_users_token_are_refused_with_the_reason(
    connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    user = await make_user()
    past = datetime.now(UTC) - timedelta(seconds=1)
    _, expired = await api_tokens.create(connection, user.id, "expired", ["read"], expires_at=past)
    with pytest.raises(Unauthenticated, match="has expired"):
        await api_tokens.authenticate(connection, expired)
    token, secret = await api_tokens.create(connection, user.id, "ci", ["read"])
    await accounts.update(connection, user.id, is_disabled=True)
    with pytest.raises(Unauthenticated, match="disabled"):
        await api_tokens.authenticate(connection, secret)
    await accounts.update(connection, user.id, is_disabled=False)
    await api_tokens.authenticate(connection, secret)
    await api_tokens.delete(connection, user.id, token.id)
    with pytest.raises(Unauthenticated, match="not known"):
        await api_tokens.authenticate(connection, secret)


async def test_tokens_are_listed_and_deleted_by_their_owner_only(
    connection: asyncpg.Connection, make_user: MakeUser
) -> None:
    ann, bob = await make_user(), await make_user("bob@example.org")
    first, _ = await api_tokens.create(connection, ann.id, "first", ["read"])
    second, _ = await api_tokens.create(connection, ann.id, "second", ["admin"])
    await api_tokens.create(connection, bob.id, "first", ["read"])
    assert await api_tokens.list_for(connection, ann.id) == [second, first]
    with pytest.raises(NotVisible):
        await api_tokens.delete(connection, bob.id, first.id)
    await api_tokens.delete(connection, ann.id, first.id)
    with pytest.raises(NotVisible):
        await api_tokens.delete(connection, ann.id, first.id)
    assert await api_tokens.list_for(connection, ann.id) == [second]


async def test_a_name_is_used_once_by_each_user(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()
    await api_tokens.create(connection, user.id, "ci", ["read"])
    with pytest.raises(Taken) as caught:
        await api_tokens.create(connection, user.id, "ci", ["read"])
    assert caught.value.field == "name"


async def test_a_token_with_nonsense_is_not_made(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()
    for arguments, field in (
        ({"name": "a\x00b"}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["read", "root"]}, "scopes"),
        ({"channels": ["app"]}, "channels"),
    ):
        with pytest.raises(Unacceptable) as caught:
            await api_tokens.create(connection, user.id, **({"name": "ci", "scopes": ["read"]} | arguments))
        assert caught.value.field == field
    with pytest.raises(NotVisible):
        await api_tokens.create(connection, user.id + 1, "ci", ["read"])


async def test_nobody_hands_out_more_than_they_hold(connection: asyncpg.Connection, make_user: MakeUser) -> None:
    user = await make_user()

    numbers = count(1)

    async def create(by: Identity | None, scopes: list[str], channels: list[str]) -> None:
        await api_tokens.create(connection, user.id, f"token {next(numbers)}", scopes, channels, by=by)

    narrow = Identity(user.id, user.email, False, frozenset({"write"}), ("app:*",))
    await create(narrow, ["read", "write"], ["app:7", "app:*"])
    with pytest.raises(Forbidden, match="scope 'admin'"):
        await create(narrow, ["read", "admin"], [])
    with pytest.raises(Forbidden, match="channel 'build:7'"):
        await create(narrow, ["read"], ["build:7"])
    with pytest.raises(Forbidden, match="channel"):
        await create(None, ["read"], ["app:7"])
    await create(None, ["admin"], [])
    await create(Identity(user.id, user.email, is_admin=True), ["admin"], ["build:*"])
