"""What happens around every handler."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from structlog.testing import capture_logs

import migrations
from auth import errors as identity
from auth.tokens import TokenSettings
from gateway.api import users
from gateway.app import build
from gateway.context import CONTEXT
from gateway.operation import Call
from orchestrator import errors as domain
from orchestrator.database import open_pool
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.settings import DatabaseSettings
from scripts.embedded import embedded_postgres
from tests.integration.gateway.conftest import SECRET, SETTINGS, Answer, Api, Person, Serve


async def test_a_good_request_id_is_kept_and_another_replaced(api: Api) -> None:
    for given in ("a", "Az09._-", "x" * 64):
        answer = await api.call("GET", "/nope", headers={"X-Request-ID": given})
        assert answer.headers["X-Request-ID"] == answer.json["request_id"] == given
    for given in ("", "x" * 65, "a b", "a;b", "<script>", "é"):
        answer = await api.call("GET", "/nope", headers={"X-Request-ID": given})
        assert answer.headers["X-Request-ID"] != given
        assert len(answer.headers["X-Request-ID"]) == 32


async def test_answers_say_nothing_of_the_server_and_are_not_sniffed(api: Api) -> None:
    for path in ("/health", "/nope", "/", "/ws", "/api/docs/style.css"):
        answer = await api.call("GET", path)
        assert answer.headers["Server"] == "cluster-code"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def raising(api: Api, monkeypatch: pytest.MonkeyPatch, ann: Person, error: Exception) -> Answer:
    """What a request is answered whose handler raises `error`."""

    async def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(users.accounts, "get", fail)
    return await api.call("GET", "/api/v1/users/me", ann)


ERRORS: list[tuple[Exception, int, dict[str, str], dict[str, list[str]]]] = [
    (identity.Unauthenticated("a"), 401, {"WWW-Authenticate": "Bearer"}, {}),
    (identity.Forbidden("a"), 403, {}, {}),
    (identity.NotVisible("a"), 404, {}, {}),
    (identity.Taken("a", field="f"), 409, {}, {"f": ["a"]}),
    (identity.Unacceptable("a", field="f"), 422, {}, {"f": ["a"]}),
    (identity.IssuerUnavailable("a"), 503, {"Retry-After": "5"}, {}),
    (domain.NotFound("a"), 404, {}, {}),
    (domain.Conflict("a"), 409, {}, {}),
    (domain.Conflict("a", retry_after=7), 409, {"Retry-After": "7"}, {}),
    (domain.Invalid("a", field="f"), 422, {}, {"f": ["a"]}),
    (domain.LogUnavailable("a"), 503, {"Retry-After": "1"}, {}),
    (OSError("secret host"), 503, {"Retry-After": "1"}, {}),
    (TimeoutError(), 503, {"Retry-After": "1"}, {}),
    (asyncpg.InterfaceError("pool is closed"), 503, {"Retry-After": "1"}, {}),
    (asyncpg.DeadlockDetectedError("deadlock"), 503, {"Retry-After": "1"}, {}),
    (asyncpg.DataError("wrong value"), 500, {}, {}),
    (web.HTTPGone(), 410, {}, {}),
    (ValueError("secret"), 500, {}, {}),
    (KeyError("secret"), 500, {}, {}),
]


async def test_every_error_has_its_problem_document(api: Api, monkeypatch: pytest.MonkeyPatch, ann: Person) -> None:
    for error, status, headers, errors in ERRORS:
        answer = await raising(api, monkeypatch, ann, error)
        assert (answer.status, answer.json["status"], answer.errors) == (status, status, errors), repr(error)
        assert headers.items() <= dict(answer.headers).items()
        assert "secret" not in answer.body.decode()


async def test_an_error_of_ours_is_logged_with_its_traceback_and_told_to_nobody(
    api: Api, monkeypatch: pytest.MonkeyPatch, ann: Person
) -> None:
    with capture_logs() as logs:
        answer = await raising(api, monkeypatch, ann, ValueError("the reason"))
    [record] = [one for one in logs if one["log_level"] == "error"]
    assert str(record["exc_info"]) == "the reason"
    assert record["request_id"] == answer.json["request_id"]
    assert "the reason" not in answer.json["detail"]


async def test_the_log_never_holds_a_query(api: Api, ann: Person) -> None:
    short = (await api.call("POST", "/auth", ann)).json["short_token"]
    with capture_logs() as logs:
        await api.call("GET", f"/ws?token={short}")
        await api.call("GET", f"/nope?token={short}", ann)
    assert [one["path"] for one in logs if one["event"] == "request"] == ["/ws", "/nope"]
    assert short not in str(logs)
    assert ann.token not in str(logs)


async def test_refusals_are_logged_at_info_and_successes_at_debug(api: Api, ann: Person) -> None:
    with capture_logs() as logs:
        await api.call("GET", "/api/v1/users/me", ann)
        await api.call("GET", "/api/v1/users/me")
    assert [(one["log_level"], one["status"], one["user_id"]) for one in logs] == [
        ("debug", 200, ann.id), ("info", 401, None),
    ]  # fmt: skip


async def test_without_a_database_requests_are_503_and_come_back_with_it() -> None:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="cluster-code-tests-"))
        server = await stack.enter_async_context(embedded_postgres(Path(folder), options={"fsync": "off"}))
        url = await server.create_database("test")
        await asyncio.to_thread(migrations.apply, url)
        database = DatabaseSettings(url=url)
        pool = await stack.enter_async_context(await open_pool(database, name="test"))
        log = MemoryLog()
        stack.push_async_callback(log.close)
        app = build(SETTINGS, TokenSettings(secret=SECRET), pool, log, database)
        client = await stack.enter_async_context(TestClient(TestServer(app)))
        api = Api(client, pool, app[CONTEXT])
        ann = await api.person()
        assert (await api.call("GET", "/api/v1/users/me", ann)).status == 200

        await server.stop()
        answers = [await api.call("GET", "/api/v1/users/me", ann) for _ in range(3)]
        assert {(answer.status, answer.headers["Retry-After"]) for answer in answers} == {(503, "1")}
        assert (await api.call("GET", "/health")).status == 200
        ready = await api.call("GET", "/ready")
        assert (ready.status, ready.json["database"]["state"], ready.json["providers"]) == (503, "down", {})
        assert b"cluster_code_database_up 0.0" in (await api.call("GET", "/metrics")).body

        await server.start()
        async with asyncio.timeout(10):
            while (await api.call("GET", "/api/v1/users/me", ann)).status != 200:
                await asyncio.sleep(0.05)


async def test_a_request_waits_for_a_connection_no_longer_than_the_timeout(database_url: str) -> None:
    settings = DatabaseSettings(url=database_url, pool_size=1, timeout=0.2)
    pool = await open_pool(settings, name="test")
    log = MemoryLog()
    try:
        app = build(SETTINGS, TokenSettings(secret=SECRET), pool, log, settings)
        async with TestClient(TestServer(app)) as client:
            api = Api(client, pool, app[CONTEXT])
            ann = await api.person()
            async with pool.acquire():
                answer = await api.call("GET", "/api/v1/users/me", ann)
            assert answer.status == 503
            assert (await api.call("GET", "/api/v1/users/me", ann)).status == 200
    finally:
        await log.close()
        await pool.close()


async def test_a_body_that_does_not_come_is_408_and_holds_no_connection(
    api: Api, ann: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.operation._BODY_DEADLINE", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.port)
    writer.write(b"POST /api/v1/workspaces HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n")
    writer.write(f"Authorization: Bearer {ann.token}\r\n\r\n{{".encode())
    async with asyncio.timeout(5):
        assert b" 408 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


PREFLIGHT = {"Origin": "https://ide.example.org", "Access-Control-Request-Method": "PUT"}


async def test_without_configuration_no_origin_is_allowed(api: Api) -> None:
    answer = await api.call("GET", "/health", headers={"Origin": "https://ide.example.org"})
    assert not [name for name in answer.headers if name.startswith("Access-Control")]


async def test_an_allowed_origin_may_call_and_another_may_not(serve: Serve) -> None:
    api = await serve(cors_origins=["https://ide.example.org"])
    allowed = await api.call("OPTIONS", "/api/v1/sessions", headers=PREFLIGHT)
    assert allowed.status == 204
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://ide.example.org"
    assert "PUT" in allowed.headers["Access-Control-Allow-Methods"]
    assert "Authorization" in allowed.headers["Access-Control-Allow-Headers"]
    assert allowed.headers["Vary"] == "Origin"
    refused = await api.call("OPTIONS", "/api/v1/sessions", headers={**PREFLIGHT, "Origin": "https://evil.example.org"})
    assert "Access-Control-Allow-Origin" not in refused.headers
    # Even what is refused must be readable to the page that asked.
    error = await api.call("GET", "/api/v1/sessions", headers={"Origin": "https://ide.example.org"})
    assert (error.status, error.headers["Access-Control-Allow-Origin"]) == (401, "https://ide.example.org")
    assert "X-Request-ID" in error.headers["Access-Control-Expose-Headers"]
    plain = await api.call("GET", "/health")
    assert "Access-Control-Allow-Origin" not in plain.headers
    assert plain.headers["Vary"] == "Origin"


async def test_any_origin_can_be_allowed(serve: Serve) -> None:
    api = await serve(cors_origins=["*"])
    answer = await api.call("OPTIONS", "/auth", headers=PREFLIGHT)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Credentials" not in answer.headers


async def test_options_without_a_preflight_is_405(api: Api) -> None:
    assert (await api.call("OPTIONS", "/api/v1/sessions")).status == 405


async def test_an_address_is_limited(serve: Serve) -> None:
    api = await serve(rate_limit_address="2/hour")
    answers = [await api.call("GET", "/health") for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert [answer.headers["RateLimit-Remaining"] for answer in answers] == ["1", "0", "0"]
    assert int(answers[2].headers["Retry-After"]) > 0
    assert answers[2].json["title"] == "Too Many Requests"


async def test_addresses_behind_a_trusted_proxy_are_limited_each(serve: Serve) -> None:
    api = await serve(rate_limit_address="1/hour", trusted_proxies=1)
    for address, expected in (("192.0.2.1", 200), ("192.0.2.2", 200), ("192.0.2.1", 429)):
        answer = await api.call("GET", "/health", headers={"X-Forwarded-For": f"10.0.0.1, {address}"})
        assert answer.status == expected


async def test_a_user_is_limited_wherever_it_calls_from(serve: Serve) -> None:
    api = await serve(rate_limit_user="2/hour")
    ann, bob = await api.person(), await api.person()
    assert [(await api.call("GET", "/api/v1/users/me", ann)).status for _ in range(3)] == [200, 200, 429]
    assert (await api.call("GET", "/api/v1/users/me", bob)).headers["RateLimit-Limit"] == "2"


async def test_guessing_passwords_is_limited_more_strictly(serve: Serve) -> None:
    api = await serve(rate_limit_login="2/hour", rate_limit_address="1000/hour")
    login = {"email": "ann@example.test", "password": "guess"}
    answers = [await api.call("POST", "/api/v1/auth/login", json=login) for _ in range(3)]
    assert [answer.status for answer in answers] == [401, 401, 429]
    for path in ("register", "refresh"):
        assert (await api.call("POST", f"/api/v1/auth/{path}", json=login)).status == 429
    assert (await api.call("GET", "/health")).status == 200


async def test_a_handler_that_needs_what_it_did_not_declare_says_so(api: Api) -> None:
    call = Call(make_mocked_request("GET", "/"), replace(api.context), {}, {}, {})
    lookups: list[Callable[[], object]] = [lambda: call.connection, lambda: call.identity]
    for lookup in lookups:
        with pytest.raises(AssertionError, match="declares"):
            lookup()
