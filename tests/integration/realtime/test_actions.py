from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import migrations
from orchestrator.database import open_pool
from orchestrator.settings import DatabaseSettings
from scripts.embedded import embedded_postgres
from tests.integration.realtime.client import Client, Closed
from tests.integration.realtime.conftest import Gateway, Stage


async def connected(stage: Stage, name: str = "ann", **fields: Any) -> Client:
    client = stage.client(await stage.user(name, **fields))
    await client.connect()
    return client


async def test_subscribe_and_unsubscribe_are_answered_with_the_id(stage: Stage) -> None:
    user = await stage.user("ann")
    session = await stage.session_in(await stage.workspace(user))
    client = stage.client(user)
    await client.connect()
    channel = f"session:{session}"
    await stage.publish("other:1", 1)
    await client.send({"action": "subscribe", "channel": channel, "id": "first"})
    assert await client.receive() == {
        "event_type": "subscribed",
        "channel": channel,
        "data": {"position": f"{stage.log.epoch}:1", "recovered": True, "replayed": 0, "id": "first"},
    }
    await stage.publish(channel, 2)
    assert (await client.receive())["offset"] == 2
    await client.send({"action": "unsubscribe", "channel": channel, "id": "second"})
    assert await client.receive() == {"event_type": "unsubscribed", "channel": channel, "data": {"id": "second"}}
    await stage.publish(channel, 3)
    await client.send({"action": "ping"})
    assert await client.receive() == {"event_type": "pong", "channel": f"user:{user.user_id}", "data": {}}


async def test_what_is_wrong_is_answered_and_the_connection_stays(stage: Stage) -> None:
    client = await connected(stage)
    for sent, code, temporary in (
        ("{", "malformed", False),
        ({"action": "dance", "id": "x"}, "unknown_action", False),
        ({"action": "subscribe", "channel": "nonsense", "id": "x"}, "unknown_channel", False),
        ({"action": "subscribe", "channel": "", "id": "x"}, "unknown_channel", False),
        ({"action": "subscribe", "channel": "a" * 60_000, "id": "x"}, "unknown_channel", False),
        ({"action": "subscribe", "channel": "session:1; DROP TABLE users", "id": "x"}, "unknown_channel", False),
        ({"action": "subscribe", "channel": "session:999", "id": "x"}, "not_found", False),
        ({"action": "subscribe", "channel": "user:999", "id": "x"}, "forbidden", False),
        ({"action": "refresh", "token": "nonsense", "id": "x"}, "token_invalid", False),
        ({"action": "refresh", "token": "\0ä", "id": "x"}, "token_invalid", False),
    ):
        await client.send(sent)
        answer = await client.receive()
        assert answer["event_type"] == "error"
        assert 0 < len(answer["channel"]) <= 200
        assert answer["data"].pop("message")
        expected = {"code": code, "temporary": temporary}
        assert answer["data"] == (expected if code == "malformed" else {**expected, "id": "x"})
    await client.send({"action": "ping", "id": "\0\U0001f600"})
    assert (await client.receive())["data"] == {"id": "\0\U0001f600"}


async def test_an_unsubscription_from_what_was_never_subscribed_is_answered(stage: Stage) -> None:
    client = await connected(stage)
    await client.send({"action": "unsubscribe", "channel": "session:77"})
    assert (await client.receive())["event_type"] == "unsubscribed"


async def test_an_unsubscription_from_no_channel_or_from_ones_own_is_refused(stage: Stage) -> None:
    user = await stage.user("ann")
    client = stage.client(user)
    await client.connect()
    own = f"user:{user.user_id}"
    expected = {"nonsense": "unknown_channel", "": "unknown_channel", "a" * 1000: "unknown_channel", own: "forbidden"}
    for channel, code in expected.items():
        await client.send({"action": "unsubscribe", "channel": channel})
        answer = await client.receive()
        assert (answer["event_type"], answer["data"]["code"]) == ("error", code)
    await stage.publish(own, 1)
    assert (await client.receive())["data"] == {"n": 1}


async def test_the_tenth_malformed_frame_closes_4501(stage: Stage) -> None:
    client = await connected(stage)
    for _ in range(9):
        await client.send("[]")
        assert (await client.receive())["event_type"] == "error"
    await client.send({"action": "ping"})
    assert (await client.receive())["event_type"] == "pong"
    await client.send("[]")
    assert (await client.receive())["event_type"] == "error"
    with pytest.raises(Closed) as end:
        await client.receive()
    assert end.value.code == 4501
    assert stage.hub.closes == {4501: 1}


async def test_a_binary_frame_closes_4501(stage: Stage) -> None:
    client = await connected(stage)
    await client.socket.send_bytes(b'{"action":"ping"}')
    await client.socket.send_str('{"action":"ping"}')
    assert await client.closed() == 4501
    assert [message["event_type"] for message in client.controls] == ["connected"]


@pytest.mark.parametrize("size", [65_537, 65_538, 1_000_000])
async def test_a_frame_over_64_kib_closes_4501(stage: Stage, size: int) -> None:
    client = await connected(stage)
    await client.socket.send_str("x" * size)
    assert await client.closed() == 4501


async def test_a_frame_of_64_kib_is_read(stage: Stage) -> None:
    client = await connected(stage)
    frame = json.dumps({"action": "ping", "id": ""})
    await client.send(frame.replace('""', '"' + "x" * (65_536 - len(frame)) + '"'))
    assert (await client.receive())["event_type"] == "pong"


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("reserved bits", b"\xf1\x80\0\0\0\0"),
        ("unknown opcode", b"\x83\x80\0\0\0\0"),
        ("fragmented control frame", b"\x09\x80\0\0\0\0"),
        ("close code that none may send", b"\x88\x82\0\0\0\0\x03\xed"),
        ("length beyond 2**63", b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0"),
        ("noise", bytes(range(256)) * 64),
    ],
)
async def test_garbage_on_the_socket_ends_that_connection_only(stage: Stage, name: str, sent: bytes) -> None:
    client, other = await connected(stage), await connected(stage, "ben")
    client.socket._writer.transport.write(sent)
    assert await client.closed() in (1002, 1009, 4501, 1006, None), name
    await other.send({"action": "ping"})
    assert (await other.receive())["event_type"] == "pong"


async def test_text_that_is_no_utf_8_closes_1007(stage: Stage) -> None:
    client = await connected(stage)
    await client.socket.send_frame(b'{"action":"ping","id":"\xff"}', aiohttp.WSMsgType.TEXT)
    assert await client.closed() == 1007


async def test_a_websocket_ping_is_answered_with_its_payload(stage: Stage) -> None:
    user = await stage.user("ann")
    websocket = await stage.session.ws_connect(
        stage.url, params={"token": stage.tokens.issue_short(user)}, autoping=False
    )
    await websocket.receive()
    await websocket.ping(b"payload")
    answer = await websocket.receive()
    assert (answer.type, answer.data) == (aiohttp.WSMsgType.PONG, b"payload")
    await websocket.close()


async def test_a_close_is_answered_and_counted(stage: Stage) -> None:
    client = await connected(stage)
    await client.socket.close(code=1001)
    assert client.socket.close_code == 1000
    await stage.until(lambda: not stage.hub.by_user)
    again = await connected(stage, "ben")
    await again.socket.close(code=4999)
    await stage.until(lambda: not stage.hub.by_user)
    lost = await connected(stage, "cid")
    lost.cut()
    await stage.until(lambda: not stage.hub.by_user)
    assert stage.hub.closes == {1001: 1, 1005: 1, 1006: 1}


async def test_one_channel_too_many_closes_4505(gateway: Gateway) -> None:
    async with gateway(channels_per_connection=3) as stage:
        client = await connected(stage, channels=("app:*",))
        for number in (1, 2, 2, 3):
            await client.subscribe(f"app:{number}")
        assert await client.closed() == 4505
        assert client.channels[1:] == ["app:1", "app:2"]


async def test_a_narrowed_token_narrows_the_connection(stage: Stage) -> None:
    user = await stage.user("ann")
    workspace = await stage.workspace(user)
    one, two = await stage.session_in(workspace), await stage.session_in(workspace)
    client = stage.client(user, [f"session:{one}"])
    await client.connect()
    for channel, answer in ((f"session:{one}", "subscribed"), (f"session:{two}", "error"), ("broadcast", "error")):
        await client.subscribe(channel)
        assert (await client.receive())["event_type"] == answer
    await stage.publish(f"user:{user.user_id}", 1)
    assert (await client.receive())["channel"] == f"user:{user.user_id}"


async def test_refresh_extends_the_connection(gateway: Gateway) -> None:
    async with gateway(expiry_notice=30.0, ping_interval=0.4) as stage:
        now = time.time()
        user = await stage.user("ann", expires_at=now + 2)
        client = stage.client(user)
        await client.connect()
        expiring = await client.until("expiring")
        assert expiring["channel"] == f"user:{user.user_id}"
        assert expiring["data"].keys() == {"expires_at"}
        longer = stage.tokens.issue_short(type(user)(user.user_id, user.email, False, expires_at=now + 1000))
        await client.send({"action": "refresh", "token": longer, "id": "r"})
        answer = await client.until("pong")
        assert answer["data"] == {
            "expires_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + 1000)),
            "id": "r",
        }
        (connection,) = stage.hub.connections.values()
        assert connection.expires_at == now + 1000
        await stage.until(lambda: time.time() > now + 2.2)
        assert connection.closed is None
        await client.send({"action": "refresh", "token": longer, "id": "again"})
        answer = await client.until("error")
        assert (answer["data"]["code"], answer["data"]["id"]) == ("token_invalid", "again")


async def test_an_authorisation_that_ends_closes_4005(gateway: Gateway) -> None:
    async with gateway(ping_interval=0.4) as stage:
        client = await connected(stage, expires_at=time.time() + 1)
        assert await client.closed() == 4005
        assert [message["event_type"] for message in client.controls] == ["connected", "expiring"]


async def test_a_refresh_with_anothers_token_or_one_that_may_not_read_changes_nothing(stage: Stage) -> None:
    ann, ben = await stage.user("ann"), await stage.user("ben")
    client = stage.client(ann)
    await client.connect()
    blind = type(ann)(ann.user_id, ann.email, False, scopes=frozenset())
    for identity, code in ((ben, "token_invalid"), (blind, "forbidden")):
        await client.send({"action": "refresh", "token": stage.tokens.issue_short(identity)})
        assert (await client.receive())["data"]["code"] == code
    (connection,) = stage.hub.connections.values()
    assert connection.identity.user_id == ann.user_id
    assert connection.identity.scopes is None


async def test_a_refresh_with_a_narrower_token_takes_subscriptions_away(stage: Stage) -> None:
    user = await stage.user("ann")
    client = stage.client(user)
    await client.connect(channels=["broadcast"])
    await client.send({"action": "refresh", "token": stage.tokens.issue_short(user, ["app:1"])})
    assert await client.closed() == 4507


async def test_no_pong_closes_4012(gateway: Gateway) -> None:
    async with gateway(ping_interval=0.2, pong_timeout=0.2) as stage:
        user = await stage.user("ann")
        mute = await stage.session.ws_connect(
            stage.url, params={"token": stage.tokens.issue_short(user)}, autoping=False
        )
        fine = await connected(stage, "ben")
        # aiohttp answers pings while somebody reads.
        reading = asyncio.create_task(fine.receive(20))
        kinds = []
        while (frame := await mute.receive(10)).type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.PING):
            kinds.append(frame.type)
        assert kinds[0] is aiohttp.WSMsgType.TEXT
        assert aiohttp.WSMsgType.PING in kinds
        assert mute.close_code == 4012
        (connection,) = stage.hub.connections.values()
        for _ in range(2):
            await stage.until(lambda: connection.pong_due is not None)
            await stage.until(lambda: connection.pong_due is None)
        await fine.send({"action": "ping"})
        assert (await reading)["event_type"] == "pong"
        assert stage.hub.closes == {4012: 1}


async def test_without_the_database_sockets_stay_and_subscribing_fails_for_now(
    gateway: Gateway, tmp_path: Path
) -> None:
    async with embedded_postgres(tmp_path) as postgres:
        await asyncio.to_thread(migrations.apply, postgres.url())
        pool = await open_pool(DatabaseSettings(url=postgres.url(), timeout=2.0), name="test")
        async with gateway(pool=pool) as stage:
            user = await stage.user("ann", channels=("app:*",))
            session = await stage.session_in(await stage.workspace(user))
            client = stage.client(user)
            await client.connect()
            token = stage.tokens.issue_short(user)
            await postgres.stop()
            await client.send({"action": "subscribe", "channel": f"session:{session}", "id": "s"})
            answer = await client.receive()
            assert answer["channel"] == f"session:{session}"
            assert answer["data"].pop("message")
            assert answer["data"] == {"code": "unavailable", "temporary": True, "id": "s"}
            await client.send({"action": "refresh", "token": token})
            assert (await client.receive())["data"]["temporary"] is True
            assert (await stage.refused(params={"token": token}))[0] == 503
            # What the database need not be asked for goes on.
            await client.subscribe("app:1")
            assert (await client.receive())["event_type"] == "subscribed"
            await stage.publish("app:1", 1)
            assert (await client.receive())["data"] == {"n": 1}
            stage.hub.permissions_changed(user.user_id)
            await asyncio.sleep(0.1)
            await postgres.start()
            await stage.until(lambda: not stage.hub.changed_users)
            await client.subscribe(f"session:{session}")
            assert (await client.receive())["event_type"] == "subscribed"
            await client.send({"action": "refresh", "token": token})
            assert (await client.receive())["event_type"] == "pong"
        pool.terminate()


async def test_an_error_of_ours_asks_the_client_to_come_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await connected(stage)

    async def broken(*_: object) -> None:
        raise RuntimeError("staged")

    monkeypatch.setattr("gateway.realtime.actions.handle", broken)
    await client.send({"action": "ping"})
    assert await client.closed() == 4011
    await stage.until(lambda: not stage.hub.by_user)
