from __future__ import annotations

import asyncio
import time

import pytest

from gateway.problems import Problem
from gateway.realtime.admission import require_origin
from tests.integration.realtime.conftest import Gateway, Stage


async def test_the_first_frame_tells_everything(stage: Stage) -> None:
    user = await stage.user("ann", expires_at=time.time() + 3600.5)
    client = stage.client(user)
    data = await client.connect()
    expires = data.pop("expires_at")
    assert data.pop("connection_id")
    assert data == {
        "position": f"{stage.log.epoch}:0",
        "channels": [f"user:{user.user_id}"],
        "ping_interval": 25,
        "recovered": True,
    }
    assert expires == time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(user.expires_at))
    assert client.controls[0]["channel"] == f"user:{user.user_id}"
    await stage.publish(f"user:{user.user_id}", 1)
    assert await client.receive() == {
        "event_type": "test.event",
        "channel": f"user:{user.user_id}",
        "data": {"n": 1},
        "offset": 1,
    }


async def test_the_token_may_come_as_a_subprotocol(stage: Stage) -> None:
    client = stage.client(await stage.user("ann"))
    assert (await client.connect(subprotocol=True))["expires_at"] is None


async def test_channels_of_the_query_are_subscribed_at_once(stage: Stage) -> None:
    user = await stage.user("ann")
    session = await stage.session_in(await stage.workspace(user))
    client = stage.client(user)
    data = await client.connect(channels=[f"session:{session}", "broadcast", f"session:{session}", ""])
    assert data["channels"] == [f"user:{user.user_id}", f"session:{session}", "broadcast"]
    await stage.publish(f"session:{session}", 1)
    assert (await client.receive())["channel"] == f"session:{session}"


async def test_a_short_token_opens_one_connection_once(stage: Stage) -> None:
    token = stage.tokens.issue_short(await stage.user("ann"))
    websocket = await stage.session.ws_connect(stage.url, params={"token": token})
    status, problem, _ = await stage.refused(params={"token": token})
    assert status == 401
    assert "used" in problem["detail"]
    await websocket.close()


@pytest.mark.parametrize(
    "query", ["", "?token=", "?token=nonsense", "?token=%00", "?token=%ff%fe", "?token=%ed%a0%80", "?token=ä"]
)
async def test_a_token_that_is_missing_or_malformed_is_401(stage: Stage, query: str) -> None:
    status, problem, _ = await stage.refused(query)
    assert status == 401
    assert problem["status"] == 401


async def test_a_malformed_token_in_a_subprotocol_is_401(stage: Stage) -> None:
    for token in (b"x", b"\xff\xfe", b"a" * 5000):
        header = (b"cluster-code.v1, bearer." + token).decode("utf-8", "surrogateescape")
        status, _, _ = await stage.refused(headers={"Sec-WebSocket-Protocol": header})
        assert status == 401


async def test_a_main_token_is_no_short_token(stage: Stage) -> None:
    user = await stage.user("ann")
    assert (await stage.refused(params={"token": stage.tokens.issue_main(user.user_id)}))[0] == 401


async def test_a_disabled_user_is_401(stage: Stage) -> None:
    user = await stage.user("ann")
    token = stage.tokens.issue_short(user)
    await stage.pool.execute("UPDATE users SET is_disabled = true")
    assert (await stage.refused(params={"token": token}))[0] == 401


async def test_a_token_that_may_not_read_is_403(stage: Stage) -> None:
    token = stage.tokens.issue_short(await stage.user("ann", scopes=frozenset()))
    status, problem, _ = await stage.refused(params={"token": token})
    assert status == 403
    assert "scope" in problem["detail"]


@pytest.mark.parametrize(
    "channel", ["session:1", "nonsense", "cluster", "gateway", "session:99999999999999999999", "a" * 5000]
)
async def test_a_channel_that_may_not_be_seen_is_403(stage: Stage, channel: str) -> None:
    await stage.session_in(await stage.workspace())
    token = stage.tokens.issue_short(await stage.user("ann"))
    status, problem, _ = await stage.refused(params={"token": token, "channels": f"broadcast,{channel}"})
    assert status == 403
    assert problem["errors"].keys() == {"channels"}


async def test_too_many_channels_are_403(gateway: Gateway) -> None:
    async with gateway(channels_per_connection=3) as stage:
        user = await stage.user("ann", channels=("app:*",))
        assert len((await stage.client(user).connect(channels=["app:1", "app:2"]))["channels"]) == 3
        token = stage.tokens.issue_short(user)
        assert (await stage.refused(params={"token": token, "channels": "app:1,app:2,app:3"}))[0] == 403


async def test_connections_beyond_the_users_limit_are_429(gateway: Gateway) -> None:
    async with gateway(connections_per_user=2) as stage:
        user, other = await stage.user("ann"), await stage.user("ben")
        first, second = stage.client(user), stage.client(user)
        await first.connect()
        await second.connect()
        status, _, headers = await stage.refused(params={"token": stage.tokens.issue_short(user)})
        assert status == 429
        assert int(headers["Retry-After"]) > 0
        await stage.client(other).connect()
        await first.close()
        await stage.until(lambda: stage.hub.by_user[user.user_id] == 1)
        await first.connect()


async def test_a_draining_server_is_503(stage: Stage) -> None:
    await stage.hub.drain()
    status, _, headers = await stage.refused(params={"token": stage.tokens.issue_short(await stage.user("ann"))})
    assert status == 503
    assert int(headers["Retry-After"]) > 0


async def test_a_server_that_has_not_read_the_log_is_503(stage: Stage) -> None:
    stage.context.feed.ready = False
    status, problem, headers = await stage.refused()
    assert (status, "starting" in problem["detail"], "Retry-After" in headers) == (503, True, True)


async def test_a_request_that_is_no_handshake_is_400_and_spends_no_token(stage: Stage) -> None:
    token = stage.tokens.issue_short(await stage.user("ann"))
    for headers in ({"Upgrade": "h2c"}, {"Sec-WebSocket-Version": "7.5"}, {"Sec-WebSocket-Key": "short"}):
        assert (await stage.refused(params={"token": token}, headers=headers))[0] == 400
    websocket = await stage.session.ws_connect(stage.url, params={"token": token})
    await websocket.close()


async def test_other_subprotocols_alone_are_400_and_the_token_is_not_logged(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    token = stage.tokens.issue_short(await stage.user("ann"))
    assert (await stage.refused(headers={"Sec-WebSocket-Protocol": f"bearer.{token}"}))[0] == 400
    assert token not in caplog.text


async def test_pages_of_other_origins_are_refused(gateway: Gateway) -> None:
    async with gateway(cors_origins=["https://ide.example.org"]) as stage:
        user = await stage.user("ann")
        own = f"http://{stage.server.host}:{stage.server.port}"
        for origin in (own, "https://ide.example.org"):
            websocket = await stage.session.ws_connect(
                stage.url, params={"token": stage.tokens.issue_short(user)}, origin=origin
            )
            await websocket.close()
        for origin in ("https://evil.example.org", "null"):
            status, _, _ = await stage.refused(
                params={"token": stage.tokens.issue_short(user)}, headers={"Origin": origin}
            )
            assert status == 403


@pytest.mark.parametrize(
    ("origin", "host", "allowed", "passes"),
    [
        (None, "a.org", [], True),
        ("https://a.org", "a.org", [], True),
        ("https://A.org", "a.ORG", [], True),
        ("https://a.org", "a.org:443", [], True),
        ("https://a.org:443", "a.org", [], True),
        ("http://a.org", "a.org:80", [], True),
        ("http://a.org:8080", "a.org:8080", [], True),
        ("http://[::1]:8080", "[::1]:8080", [], True),
        ("http://a.org:8080", "a.org", [], False),
        ("http://a.org", "a.org:8080", [], False),
        ("https://a.org", "b.org", [], False),
        ("https://a.org.evil.org", "a.org", [], False),
        ("null", "a.org", [], False),
        ("", "a.org", [], False),
        ("https://", "", [], False),
        ("file:///etc", "", [], False),
        ("https://a.org:nonsense", "a.org", [], False),
        ("https://[", "a.org", [], False),
        ("https://b.org", "a.org", ["https://b.org"], True),
        ("https://b.org", "a.org", ["*"], True),
    ],
)
def test_an_origin_passes_when_it_is_the_host_or_allowed(
    origin: str | None, host: str, allowed: list[str], passes: bool
) -> None:
    if passes:
        require_origin(origin, host, allowed)
    else:
        with pytest.raises(Problem) as caught:
            require_origin(origin, host, allowed)
        assert caught.value.status == 403


async def test_connected_comes_first_however_near_the_end_is(stage: Stage) -> None:
    user = await stage.user("ann", expires_at=time.time() + 20)
    history = stage.context.history
    # An offset that this gateway has not read yet is waited for.
    query = f"?token={stage.tokens.issue_short(user)}&since={history.epoch}:{history.head + 5000}"
    async with asyncio.timeout(10), stage.session.ws_connect(stage.url + query) as socket:
        first, second = await socket.receive_json(), await socket.receive_json()
    assert (first["event_type"], second["event_type"]) == ("connected", "expiring")
    assert first["data"]["recovered"] is False


async def test_the_ping_interval_is_a_whole_number_where_it_is_one(stage: Stage) -> None:
    token = stage.tokens.issue_short(await stage.user("ann"))
    async with stage.session.ws_connect(f"{stage.url}?token={token}") as socket:
        assert '"ping_interval":25,' in await socket.receive_str()
