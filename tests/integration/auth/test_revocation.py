from __future__ import annotations

import time

import asyncpg
import jwt
import pytest

from auth import accounts, api_tokens, refresh, revocation
from auth.accounts import User
from auth.errors import NotVisible, Unauthenticated
from auth.tokens import Tokens
from tests.integration.auth.conftest import SECRET, identity

MONTH = 30 * 86400.0


async def sign_in(connection: asyncpg.Connection, tokens: Tokens, user: User) -> tuple[str, str]:
    """A main token and the refresh token that came with it."""
    main = tokens.announce_main()
    renewable = await refresh.open_family(connection, user.id, MONTH, main)
    return tokens.issue_main(user.id, token_id=main.token_id), renewable


async def refusal(connection: asyncpg.Connection, tokens: Tokens, token: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await tokens.authenticate(connection, token)
    return str(caught.value)


async def test_a_revoked_main_token_ends_with_its_short_tokens_and_no_other_does(
    connection: asyncpg.Connection, tokens: Tokens, ann: User
) -> None:
    first, second = tokens.issue_main(ann.id), tokens.issue_main(ann.id)
    who = await tokens.authenticate(connection, first)
    short, other = tokens.issue_short(who), tokens.issue_short(who)
    await revocation.revoke_token(connection, ann.id, who.token_id)
    await revocation.revoke_token(connection, ann.id, who.token_id)
    assert await refusal(connection, tokens, first) == "The token was revoked: sign in again."
    for redeem in (
        tokens.redeem_short(connection, short),
        tokens.redeem_stream(connection, other, "a", comes_back=False),
    ):
        with pytest.raises(Unauthenticated, match=r"revoked"):
            await redeem
    assert (await tokens.authenticate(connection, second)).user_id == ann.id
    # Its end is not known here: it is kept.
    assert await revocation.purge(connection) == 0


async def test_another_users_token_of_the_same_id_is_none_of_it(
    connection: asyncpg.Connection, tokens: Tokens, ann: User, bob: User
) -> None:
    token = tokens.issue_main(ann.id)
    token_id = (await tokens.authenticate(connection, token)).token_id
    await revocation.revoke_token(connection, bob.id, token_id)
    assert (await tokens.authenticate(connection, token)).user_id == ann.id


async def test_revoking_a_main_token_ends_the_sign_in_that_it_came_from(
    connection: asyncpg.Connection, tokens: Tokens, ann: User
) -> None:
    first, renewable = await sign_in(connection, tokens, ann)
    other, other_renewable = await sign_in(connection, tokens, ann)
    main = tokens.announce_main()
    _, renewable = await refresh.rotate(connection, renewable, MONTH, main)
    second = tokens.issue_main(ann.id, token_id=main.token_id)
    await revocation.revoke_token(connection, ann.id, (await tokens.authenticate(connection, first)).token_id)
    for token in (first, second):
        assert await refusal(connection, tokens, token) == "The token was revoked: sign in again."
    with pytest.raises(Unauthenticated, match=r"was revoked"):
        await refresh.rotate(connection, renewable, MONTH)
    assert (await tokens.authenticate(connection, other)).user_id == ann.id
    await refresh.rotate(connection, other_renewable, MONTH)
    assert await connection.fetchval("SELECT count(*) FROM revoked_tokens WHERE expires_at < now() + '2 hours'") == 2
    await connection.execute("UPDATE revoked_tokens SET expires_at = now() - interval '1 second'")
    assert await revocation.purge(connection) == 2


async def test_signing_out_and_a_reused_refresh_token_void_the_main_tokens_too(
    connection: asyncpg.Connection, tokens: Tokens, ann: User
) -> None:
    token, renewable = await sign_in(connection, tokens, ann)
    await refresh.revoke(connection, renewable)
    assert "revoked" in await refusal(connection, tokens, token)
    token, renewable = await sign_in(connection, tokens, ann)
    await refresh.rotate(connection, renewable, MONTH)
    with pytest.raises(Unauthenticated, match=r"used before"):
        await refresh.rotate(connection, renewable, MONTH)
    assert "revoked" in await refusal(connection, tokens, token)


@pytest.mark.parametrize("with_api_tokens", [False, True])
async def test_all_that_was_issued_until_now_is_void_and_what_comes_is_good(
    connection: asyncpg.Connection, tokens: Tokens, ann: User, bob: User, with_api_tokens: bool
) -> None:
    token, renewable = await sign_in(connection, tokens, ann)
    bobs, _ = await sign_in(connection, tokens, bob)
    _, secret = await api_tokens.create(connection, ann.id, "ci", ["read"])
    await revocation.revoke_all(connection, ann.id, with_api_tokens=with_api_tokens)
    assert "revoked" in await refusal(connection, tokens, token)
    with pytest.raises(Unauthenticated):
        await refresh.rotate(connection, renewable, MONTH)
    if with_api_tokens:
        assert "revoked" in await refusal(connection, tokens, secret)
    else:
        assert (await tokens.authenticate(connection, secret)).user_id == ann.id
    assert (await tokens.authenticate(connection, bobs)).user_id == bob.id
    assert (await tokens.authenticate(connection, tokens.issue_main(ann.id))).user_id == ann.id


async def test_an_api_token_is_revoked_by_its_id(connection: asyncpg.Connection, tokens: Tokens, ann: User) -> None:
    made, secret = await api_tokens.create(connection, ann.id, "ci", ["read"])
    await revocation.revoke_token(connection, ann.id, f"api:{made.id}")
    assert "revoked" in await refusal(connection, tokens, secret)


@pytest.mark.parametrize("token_id", ["api:1", "api:x", "api:", "api:99999999999999999999"])
async def test_what_is_no_api_token_cannot_be_revoked(connection: asyncpg.Connection, ann: User, token_id: str) -> None:
    with pytest.raises(NotVisible):
        await revocation.revoke_token(connection, ann.id, token_id)


async def test_nobodys_tokens_cannot_be_revoked(connection: asyncpg.Connection) -> None:
    with pytest.raises(NotVisible):
        await revocation.revoke_token(connection, 999, "x")
    with pytest.raises(NotVisible):
        await revocation.revoke_all(connection, 999, with_api_tokens=True)


async def test_revocations_go_with_their_user(connection: asyncpg.Connection, ann: User, bob: User) -> None:
    await connection.execute("UPDATE users SET is_admin = true WHERE id = $1", bob.id)
    await revocation.revoke_token(connection, ann.id, "x")
    await accounts.delete(connection, ann.id)
    assert await connection.fetchval("SELECT count(*) FROM revoked_tokens") == 0


@pytest.mark.parametrize("jti", ["", "x" * 201, "a\x00b", "\n"])
async def test_a_token_whose_id_cannot_be_kept_is_refused(
    connection: asyncpg.Connection, tokens: Tokens, ann: User, jti: str
) -> None:
    claims = jwt.decode(tokens.issue_main(ann.id), SECRET, algorithms=["HS256"], audience="cluster-code")
    token = jwt.encode({**claims, "jti": jti}, SECRET, "HS256")
    assert "'jti'" in await refusal(connection, tokens, token)


async def test_a_stream_comes_back_from_its_own_address_with_the_token_that_opened_it(
    connection: asyncpg.Connection, tokens: Tokens, ann: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tokens.issue_short(identity(ann))
    grant = await tokens.redeem_stream(connection, short, "192.0.2.1", comes_back=False)
    again = await tokens.redeem_stream(connection, short, "192.0.2.1", comes_back=True)
    assert again == grant
    for address, comes_back in (("192.0.2.1", False), ("192.0.2.2", True)):
        with pytest.raises(Unauthenticated, match=r"used before"):
            await tokens.redeem_stream(connection, short, address, comes_back=comes_back)
    with pytest.raises(Unauthenticated, match=r"used before"):
        await tokens.redeem_short(connection, short)

    # Long after its own end, which is that of opening something new.
    now = grant_time = time.time()
    monkeypatch.setattr("auth.tokens.time.time", lambda: now)
    now = grant_time + 3600
    assert await tokens.redeem_stream(connection, short, "192.0.2.1", comes_back=True) == grant
    now = grant_time + 86401
    with pytest.raises(Unauthenticated, match=r"too long"):
        await tokens.redeem_stream(connection, short, "192.0.2.1", comes_back=True)
    now = grant_time + 3600
    await tokens.end_stream(connection, grant.jti)
    with pytest.raises(Unauthenticated, match=r"used before"):
        await tokens.redeem_stream(connection, short, "192.0.2.1", comes_back=True)


async def test_coming_back_opens_nothing_by_itself(
    connection: asyncpg.Connection, tokens: Tokens, ann: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has only heard of a token that was never used, or has opened a WebSocket, gains nothing by coming back."""
    websocket, unused = tokens.issue_short(identity(ann)), tokens.issue_short(identity(ann))
    await tokens.redeem_short(connection, websocket)
    with pytest.raises(Unauthenticated, match=r"used before"):
        await tokens.redeem_stream(connection, websocket, "a", comes_back=True)
    later = time.time() + 61
    monkeypatch.setattr("auth.tokens.time.time", lambda: later)
    for comes_back in (True, False):
        with pytest.raises(Unauthenticated, match=r"expired"):
            await tokens.redeem_stream(connection, unused, "a", comes_back=comes_back)
