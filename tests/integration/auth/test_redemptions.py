from __future__ import annotations

import asyncio
import random

import asyncpg
import pytest

from auth.errors import Unauthenticated
from auth.permissions import Identity
from auth.redemptions import Redemptions
from auth.tokens import ShortGrant, Tokens, TokenSettings
from orchestrator.database import Pool
from tests.integration.auth.conftest import MakeUser


async def spent(redemptions: Redemptions, *tokens: str) -> list[object]:
    return await asyncio.gather(*(redemptions.redeem(token) for token in tokens), return_exceptions=True)


async def test_tokens_of_one_moment_are_spent_together_and_each_is_answered_for_itself(
    tokens: Tokens, pool: Pool, make_user: MakeUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, ben, gone = [await make_user(f"{name}@example.org") for name in ("ann", "ben", "gone")]
    async with pool.acquire() as connection:
        await connection.execute("UPDATE users SET is_disabled = true WHERE id = $1", gone.id)
    short = {user.id: tokens.issue_short(Identity(user.id, user.email, is_admin=False)) for user in (ann, ben, gone)}
    nobody = tokens.issue_short(Identity(1 << 40, "nobody@example.org", is_admin=False))
    sizes: list[int] = []
    redeem = tokens.redeem_many

    async def counted(connection: asyncpg.Connection, shorts: list) -> list:
        sizes.append(len(shorts))
        return await redeem(connection, shorts)

    monkeypatch.setattr(tokens, "redeem_many", counted)
    redemptions = Redemptions(pool, tokens, 5.0)
    shown = [short[ann.id], short[ben.id], short[ann.id], short[gone.id], nobody, "nonsense"]
    first, second, again, disabled, unknown, malformed = await spent(redemptions, *shown)
    assert isinstance(first, ShortGrant)
    assert isinstance(second, ShortGrant)
    assert (first.identity.user_id, second.identity.user_id) == (ann.id, ben.id)
    assert first.valid_from is not None
    for refused, word in ((again, "used"), (disabled, "disabled"), (unknown, "not exist"), (malformed, "malformed")):
        assert isinstance(refused, Unauthenticated)
        assert word in str(refused)
    assert sizes == [5]
    (later,) = await spent(redemptions, short[ben.id])
    assert isinstance(later, Unauthenticated)
    assert redemptions._task is None


@pytest.mark.random
async def test_of_many_tokens_shown_to_two_gateways_at_once_in_any_order_each_wins_once(
    settings: TokenSettings, pool: Pool, make_user: MakeUser
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    user = await make_user()
    gateways = [Redemptions(pool, Tokens(settings), 10.0) for _ in range(2)]
    issuer = Tokens(settings)
    for _ in range(5):
        shorts = [issuer.issue_short(Identity(user.id, user.email, is_admin=False)) for _ in range(60)]
        orders = [draw.sample(shorts, len(shorts)) for _ in gateways]
        results = await asyncio.gather(*(spent(at, *order) for at, order in zip(gateways, orders, strict=True)))
        won = [
            token
            for order, answers in zip(orders, results, strict=True)
            for token, answer in zip(order, answers, strict=True)
            if isinstance(answer, ShortGrant)
        ]
        assert sorted(won) == sorted(shorts)
        assert all(isinstance(answer, ShortGrant | Unauthenticated) for answers in results for answer in answers)


async def test_what_the_database_says_is_told_to_all_who_wait_and_to_nobody_after(
    tokens: Tokens, pool: Pool, make_user: MakeUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = await make_user()
    shorts = [tokens.issue_short(Identity(user.id, user.email, is_admin=False)) for _ in range(4)]
    redemptions = Redemptions(pool, tokens, 5.0)

    async def away(*_: object) -> list:
        raise asyncpg.ConnectionDoesNotExistError("staged")

    with monkeypatch.context() as patched:
        patched.setattr(tokens, "redeem_many", away)
        answers = await spent(redemptions, *shorts[:3])
    assert [type(answer) for answer in answers] == [asyncpg.ConnectionDoesNotExistError] * 3
    assert isinstance(await redemptions.redeem(shorts[3]), ShortGrant)


async def test_who_stops_waiting_takes_nothing_from_the_others(tokens: Tokens, pool: Pool, make_user: MakeUser) -> None:
    user = await make_user()
    shorts = [tokens.issue_short(Identity(user.id, user.email, is_admin=False)) for _ in range(3)]
    redemptions = Redemptions(pool, tokens, 5.0)
    waiting = [asyncio.create_task(redemptions.redeem(token)) for token in shorts]
    await asyncio.sleep(0)
    waiting[1].cancel()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [ShortGrant, asyncio.CancelledError, ShortGrant]
