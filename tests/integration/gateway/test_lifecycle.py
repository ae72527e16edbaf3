"""Starting, ending, and what the gateway asks of others."""

from __future__ import annotations

import asyncio
import errno
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from structlog.testing import capture_logs

import migrations
from auth.errors import IssuerUnavailable
from auth.tokens import TokenSettings
from gateway.api import users
from gateway.app import FEED, Outside, build, listening, until_failure
from gateway.context import CONTEXT
from gateway.realtime.hub import Hub
from gateway.settings import RealtimeSettings
from orchestrator.database import Pool
from orchestrator.errors import SchemaOutdated, SettingsError
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.settings import DatabaseSettings
from tests.conftest import no_task_left
from tests.integration.gateway.conftest import SECRET, SETTINGS, Api, Person, Serve
from tests.unit.realtime.wire import Wire, connection, join


@asynccontextmanager
async def application(pool: Pool, database: DatabaseSettings, **changes: object) -> AsyncIterator[web.Application]:
    log = MemoryLog()
    try:
        settings = replace(SETTINGS, port=0, **changes)  # type: ignore[arg-type]
        yield build(settings, TokenSettings(secret=SECRET), pool, log, database)
    finally:
        await log.close()


async def test_it_listens_and_leaves_nothing_behind(pool: Pool, database_settings: DatabaseSettings) -> None:
    async with no_task_left(), application(pool, database_settings) as app, aiohttp.ClientSession() as client:
        async with listening(app, app[CONTEXT].settings) as port:
            url = f"http://127.0.0.1:{port}/health"
            assert (await client.get(url)).status == 200
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.get(url)


async def test_an_older_schema_is_told_before_anybody_is_served(
    pool: Pool, database_settings: DatabaseSettings
) -> None:
    await asyncio.to_thread(migrations.rollback, database_settings.url)
    async with no_task_left(), application(pool, database_settings) as app:
        with pytest.raises(SchemaOutdated, match=r"lacks 1 migration\(s\), from \d{4}\.\w+ on: run `cluster"):
            async with listening(app, app[CONTEXT].settings):
                pytest.fail("it listens")


async def test_a_port_in_use_is_one_clear_line(pool: Pool, database_settings: DatabaseSettings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with application(pool, database_settings) as app:
            with pytest.raises(SettingsError, match=f"PORT: 127.0.0.1:{port} is in use"):
                async with listening(app, replace(app[CONTEXT].settings, port=port)):
                    pytest.fail("it listens")


@pytest.mark.parametrize(("number", "line"), [(errno.EACCES, "PORT: this user"), (errno.EADDRNOTAVAIL, "HOST: cannot")])
async def test_an_address_that_cannot_be_had_is_one_clear_line(
    pool: Pool, database_settings: DatabaseSettings, monkeypatch: pytest.MonkeyPatch, number: int, line: str
) -> None:
    async def refuse(_: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(web.TCPSite, "start", refuse)
    async with application(pool, database_settings) as app:
        with pytest.raises(SettingsError, match=line):
            async with listening(app, app[CONTEXT].settings):
                pytest.fail("it listens")


async def test_sockets_are_drained_and_requests_finish(
    pool: Pool, database_settings: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    get = users.accounts.get

    async def slow(*arguments: object) -> object:
        begun.set()
        await go_on.wait()
        return await get(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(users.accounts, "get", slow)
    async with application(pool, database_settings) as app, aiohttp.ClientSession() as client:
        served = asyncio.Event()

        async def serve() -> None:
            async with listening(app, app[CONTEXT].settings) as port:
                ports.append(port)
                served.set()
                await stop.wait()

        ports: list[int] = []
        stop = asyncio.Event()
        server = asyncio.create_task(serve())
        await served.wait()
        url = f"http://127.0.0.1:{ports[0]}"
        api = Api(None, pool, app[CONTEXT])  # type: ignore[arg-type]
        ann = await api.person()
        headers = {"Authorization": f"Bearer {ann.token}"}
        async with client.post(f"{url}/auth", headers=headers) as answer:
            short = (await answer.json())["short_token"]
        ws = await client.ws_connect(f"{url}/ws?token={short}")
        await ws.receive()

        async def request() -> int:
            async with client.get(f"{url}/api/v1/users/me", headers=headers) as answer:
                return answer.status

        slow_request = asyncio.create_task(request())
        await begun.wait()
        stop.set()
        async with asyncio.timeout(5):
            message = await ws.receive()
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 4001)
            go_on.set()
            assert await slow_request == 200
            await server
        await ws.close()


async def test_who_comes_during_the_drain_is_told_503(
    pool: Pool, database_settings: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    draining, go_on = asyncio.Event(), asyncio.Event()
    async with application(pool, database_settings) as app, aiohttp.ClientSession() as client:
        hub = app[CONTEXT].hub
        drain = hub.drain

        async def slowly() -> None:
            await drain()
            draining.set()
            await go_on.wait()

        monkeypatch.setattr(hub, "drain", slowly)

        async def visit(port: int) -> tuple[int, str]:
            await draining.wait()
            async with client.get(f"http://127.0.0.1:{port}/ws") as answer:
                go_on.set()
                return answer.status, answer.headers["Retry-After"]

        async with asyncio.timeout(5), listening(app, app[CONTEXT].settings) as port:
            visitor = asyncio.create_task(visit(port))
        assert await visitor == (503, "1")


async def test_a_drain_that_takes_too_long_is_cut_short(
    pool: Pool, database_settings: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with application(pool, database_settings, shutdown_grace=0.05) as app:
        monkeypatch.setattr(app[CONTEXT].hub, "drain", asyncio.Event().wait)
        monkeypatch.setattr(Hub, "drain_seconds", 0.0)
        with capture_logs() as logs:
            async with asyncio.timeout(5), listening(app, app[CONTEXT].settings):
                pass
    assert "some connections did not end in time" in [one["event"] for one in logs]


async def test_a_drain_gets_the_time_that_its_connections_need(
    pool: Pool, database_settings: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.realtime.hub.CLOSE_TIMEOUT", 0.1)
    realtime = RealtimeSettings(drain_rate=50)
    async with application(pool, database_settings, shutdown_grace=2.0, realtime=realtime) as app:
        hub, wires = app[CONTEXT].hub, [Wire() for _ in range(150)]
        with capture_logs() as logs:
            async with listening(app, app[CONTEXT].settings):
                for wire in wires:
                    # Not looked at by the sweep: nobody there would answer a ping.
                    one = join(hub, connection("session:1", wire=wire, due=math.inf))
                    # A client that answers the close frame at once.
                    wire.on_write = partial(asyncio.get_running_loop().call_soon, hub.end, one)
    # Longer than the grace.
    assert [wire.close_code for wire in wires] == [4001] * 150
    assert "some connections did not end in time" not in [one["event"] for one in logs]


async def test_a_replica_that_breaks_ends_the_process_too(
    pool: Pool, database_settings: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise RuntimeError("no replica")

    async with application(pool, database_settings) as app:
        monkeypatch.setattr(app[CONTEXT].replicas, "run", fail)
        async with no_task_left(), listening(app, app[CONTEXT].settings):
            with pytest.raises(RuntimeError, match="no replica"):
                await until_failure(app)


async def test_the_end_of_the_feed_is_told_and_raised(
    pool: Pool, database_settings: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise RuntimeError("the feed broke")

    async with application(pool, database_settings) as app:
        monkeypatch.setattr(app[CONTEXT].feed, "run", fail)
        with capture_logs() as logs:
            async with listening(app, app[CONTEXT].settings):
                with pytest.raises(RuntimeError, match="the feed broke"):
                    await until_failure(app)
    assert [one["log_level"] for one in logs if "feed has ended" in one["event"]] == ["critical"]


async def test_waiting_for_the_feed_may_be_given_up(pool: Pool, database_settings: DatabaseSettings) -> None:
    async with application(pool, database_settings) as app, listening(app, app[CONTEXT].settings):
        waiting = asyncio.create_task(until_failure(app))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not app[FEED].done()


Answerer = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def fetched(answerer: Answerer) -> object:
    """What comes of fetching an issuer's keys from a server that answers so."""
    app = web.Application()
    app.router.add_get("/jwks", answerer)
    outside = Outside()
    async with TestServer(app) as server:
        opened = outside.opened(app)
        await anext(opened)
        try:
            return await outside.fetch_json(str(server.make_url("/jwks")))
        finally:
            await anext(opened, None)


async def test_an_issuers_keys_are_fetched() -> None:
    async def keys(_: web.Request) -> web.Response:
        return web.json_response({"keys": []})

    assert await fetched(keys) == {"keys": []}


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(status=500, text="secret"),
        lambda: web.Response(text="secret, no json"),
        lambda: web.json_response(["secret"]),
        lambda: web.Response(body=b'{"a": "' + b"x" * (1 << 20) + b'"}'),
    ],
    ids=["error", "no json", "no object", "too large"],
)
async def test_keys_that_cannot_be_had_are_an_outage_of_the_issuer(answer: Callable[[], web.Response]) -> None:
    async def respond(_: web.Request) -> web.Response:
        return answer()

    with pytest.raises(IssuerUnavailable) as outage:
        await fetched(respond)
    assert "secret" not in str(outage.value)


async def test_keys_are_not_fetched_before_the_application_runs() -> None:
    with pytest.raises(IssuerUnavailable):
        await Outside().fetch_json("http://127.0.0.1:1/")


async def test_an_outside_issuer_that_is_away_is_503(serve: Serve) -> None:
    import jwt
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    settings = TokenSettings(
        secret=SECRET, oidc_issuer="https://id.test", oidc_audience="us", oidc_jwks_url="http://127.0.0.1:1/jwks"
    )
    api = await serve(settings)
    token = jwt.encode(
        {"iss": "https://id.test", "aud": "us", "sub": "x", "exp": 9999999999}, Ed25519PrivateKey.generate(), "EdDSA",
        headers={"kid": "1"},
    )  # fmt: skip
    answer = await api.call("GET", "/api/v1/users/me", token)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")


async def test_people_of_two_gateways_share_nothing_but_the_database(serve: Serve) -> None:
    one, two = await serve(), await serve()
    ann: Person = await one.person()
    assert (await two.call("GET", "/api/v1/users/me", ann)).status == 200
    assert one.context.hub is not two.context.hub
