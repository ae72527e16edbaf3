from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from auth.errors import AuthError, NotVisible
from auth.tokens import ShortGrant, Tokens
from gateway.realtime import authorization, recovery
from orchestrator.eventlog import outbox
from orchestrator.events import GATEWAY, PERMISSIONS_CHANGED, Event
from tests.integration.realtime.conftest import Gateway, Stage


async def changed(stage: Stage, user_id: int) -> None:
    await stage.log.publish([Event(PERMISSIONS_CHANGED, GATEWAY, {"user_id": user_id})])


async def test_members_see_the_sessions_and_workspaces_that_they_belong_to(stage: Stage) -> None:
    viewer, owner, stranger = await stage.user("v"), await stage.user("o"), await stage.user("s")
    admin = await stage.user("admin", is_admin=True)
    workspace = await stage.workspace(viewer)
    await stage.pool.execute("INSERT INTO workspace_members VALUES ($1, $2, 'owner')", workspace, owner.user_id)
    session = await stage.session_in(workspace)
    names = [f"session:{session}", f"workspace:{workspace}"]
    async with stage.pool.acquire() as connection:
        for identity in (viewer, owner, admin, replace(viewer, scopes=frozenset({"read"}))):
            for name in names:
                await authorization.may_subscribe(connection, identity, name)
            refused = await authorization.refusals(connection, identity, [*names, "session:999", "workspace:999"])
            assert {name: type(error) for name, error in refused.items()} == {
                "session:999": NotVisible,
                "workspace:999": NotVisible,
            }
        for name in names:
            with pytest.raises(NotVisible):
                await authorization.may_subscribe(connection, stranger, name)
            with pytest.raises(AuthError):
                await authorization.may_subscribe(connection, viewer, name, narrowed=("other:1",))


async def test_a_removed_member_stops_receiving_within_a_second(stage: Stage) -> None:
    user, other = await stage.user("ann"), await stage.user("ben")
    workspace = await stage.workspace(user, other)
    channel = f"session:{await stage.session_in(workspace)}"
    clients = [stage.client(user), stage.client(user), stage.client(other)]
    await clients[0].connect(channels=[channel])
    await clients[1].connect()
    await clients[2].connect(channels=[channel])
    await stage.pool.execute("DELETE FROM workspace_members WHERE user_id = $1", user.user_id)
    began = asyncio.get_running_loop().time()
    await changed(stage, user.user_id)
    assert await clients[0].closed() == 4507
    assert asyncio.get_running_loop().time() - began < 1
    # The one that has lost nothing stays, and so does the other member.
    await stage.publish(f"user:{user.user_id}", 1)
    await stage.publish(channel, 2)
    assert (await clients[1].receive())["data"] == {"n": 1}
    assert (await clients[2].receive())["data"] == {"n": 2}
    assert stage.hub.closes == {4507: 1}


async def test_a_change_that_takes_nothing_away_closes_nothing(stage: Stage) -> None:
    user = await stage.user("ann")
    workspace = await stage.workspace(user)
    client = stage.client(user)
    await client.connect(channels=[f"workspace:{workspace}", "broadcast"])
    await stage.pool.execute("UPDATE workspace_members SET role = 'owner'")
    await changed(stage, user.user_id)
    await changed(stage, 999)
    await stage.until(lambda: stage.hub.generation == 2 and not stage.hub.changed_users)
    await client.send({"action": "ping"})
    assert (await client.receive())["event_type"] == "pong"


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE users SET is_disabled = true WHERE id = $1",
        "DELETE FROM users WHERE id = $1",
        "UPDATE users SET tokens_valid_from = now() WHERE id = $1",
    ],
)
async def test_a_user_who_is_gone_or_whose_tokens_are_void_is_closed_4500(stage: Stage, change: str) -> None:
    user = await stage.user("ann")
    client = stage.client(user)
    await client.connect()
    await stage.pool.execute(change, user.user_id)
    await changed(stage, user.user_id)
    assert await client.closed() == 4500


async def test_a_deleted_api_token_closes_what_it_has_opened(stage: Stage) -> None:
    user = await stage.user("ann")
    number = await stage.pool.fetchval(
        "INSERT INTO api_tokens (user_id, name, token_hash, scopes) VALUES ($1, 't', 'h', '{}') RETURNING id",
        user.user_id,
    )
    by_token, by_main = stage.client(replace(user, token_id=f"api:{number}")), stage.client(user)
    await by_token.connect()
    await by_main.connect()
    await changed(stage, user.user_id)
    await stage.until(lambda: stage.hub.generation == 1 and not stage.hub.changed_users)
    await by_token.send({"action": "ping"})
    assert (await by_token.receive())["event_type"] == "pong"
    await stage.pool.execute("DELETE FROM api_tokens")
    await changed(stage, user.user_id)
    assert await by_token.closed() == 4500
    await by_main.send({"action": "ping"})
    assert (await by_main.receive())["event_type"] == "pong"


async def test_an_administrator_who_is_one_no_more_loses_the_cluster(stage: Stage) -> None:
    admin = await stage.user("ann", is_admin=True)
    client = stage.client(admin)
    await client.connect(channels=["cluster"])
    await stage.pool.execute("UPDATE users SET is_admin = false")
    await changed(stage, admin.user_id)
    assert await client.closed() == 4507


async def test_a_change_told_between_check_and_subscription_is_not_missed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = await stage.user("ann")
    workspace = await stage.workspace(user)
    may_subscribe = authorization.may_subscribe

    async def removed_right_after(*arguments: object) -> None:
        await may_subscribe(*arguments)  # type: ignore[arg-type]
        await stage.pool.execute("DELETE FROM workspace_members")
        generation = stage.hub.generation
        await changed(stage, user.user_id)
        await stage.until(lambda: stage.hub.generation > generation and not stage.hub.changed_users)

    monkeypatch.setattr(authorization, "may_subscribe", removed_right_after)
    client = stage.client(user)
    await client.connect()
    await client.subscribe(f"workspace:{workspace}")
    assert await client.closed() == 4507


async def test_a_change_told_while_a_subscription_catches_up_ends_it_at_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_PATIENCE", 60.0)
    user = await stage.user("ann")
    channel = f"workspace:{await stage.workspace(user)}"
    client = stage.client(user)
    await client.connect()
    await client.send({"action": "subscribe", "channel": channel, "since": f"{stage.log.epoch}:1000"})
    await stage.until(lambda: stage.context.history._waiting)
    await stage.pool.execute("DELETE FROM workspace_members")
    await changed(stage, user.user_id)
    assert await client.closed() == 4507
    stage.context.history.skip(1000)


async def test_a_change_told_during_the_handshake_is_not_missed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    user = await stage.user("ann")
    workspace = await stage.workspace(user)
    refusals = authorization.refusals

    async def removed_right_after(*arguments: object) -> dict[str, AuthError]:
        refused = await refusals(*arguments)  # type: ignore[arg-type]
        if stage.hub.generation == 0:
            await stage.pool.execute("DELETE FROM workspace_members")
            await changed(stage, user.user_id)
            await stage.until(lambda: stage.hub.generation)
        return refused

    monkeypatch.setattr(authorization, "refusals", removed_right_after)
    client = stage.client(user)
    await client.connect(channels=[f"workspace:{workspace}"])
    assert await client.closed() == 4507


async def test_the_event_of_a_removal_may_come_through_the_outbox(gateway: Gateway) -> None:
    async with gateway() as stage:
        user = await stage.user("ann")
        workspace = await stage.workspace(user)
        client = stage.client(user)
        await client.connect(channels=[f"workspace:{workspace}"])
        async with stage.pool.acquire() as connection:
            async with connection.transaction():
                await connection.execute("DELETE FROM workspace_members")
                await outbox.add(connection, Event(PERMISSIONS_CHANGED, GATEWAY, {"user_id": user.user_id}))
            assert await outbox.relay_batch(connection, stage.log) == 1
        assert await client.closed() == 4507


async def test_tokens_that_are_void_right_after_a_refresh_keep_no_connection(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = await stage.user("ann")
    client = stage.client(user)
    await client.connect()
    redeem = Tokens.redeem_short

    async def void_right_after(*arguments: Any) -> ShortGrant:
        grant = await redeem(*arguments)
        await stage.pool.execute("UPDATE users SET tokens_valid_from = clock_timestamp()")
        return grant

    monkeypatch.setattr(Tokens, "redeem_short", void_right_after)
    await client.send({"action": "refresh", "token": stage.tokens.issue_short(user)})
    assert (await client.receive())["event_type"] == "pong"
    await changed(stage, user.user_id)
    assert await client.closed() == 4500
