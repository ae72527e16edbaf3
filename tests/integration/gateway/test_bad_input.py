"""Whatever is sent to whichever route, the answer is a problem document that says what was wrong, and never a 5xx."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from io import BytesIO
from typing import Any
from uuid import uuid4

import orjson
from aiohttp import web

from gateway.operation import operation_of
from gateway.routes import operations, routes
from tests.integration.gateway.conftest import Api, Person

API = [route for route in operations() if route.path.startswith("/api/v1")]
WITH_BODY = [route for route in API if (declared := operation_of(route.handler)) and declared.body]
WITH_QUERY = [route for route in API if (declared := operation_of(route.handler)) and declared.query]
WITH_PATH = [route for route in API if "{" in route.path]


def path_of(route: web.RouteDef, value: object = 1) -> str:
    """The route's path with every variable part replaced."""
    return "/".join(str(value) if part.startswith("{") else part for part in route.path.split("/"))


def problems(answer: Any, status: int) -> Iterator[str]:
    """What is wrong with an answer that should be a problem document of this status."""
    if answer.status != status:
        yield f"status {answer.status}, not {status}: {answer.body[:200]!r}"
    elif answer.headers["Content-Type"] != "application/problem+json":
        yield f"content type {answer.headers['Content-Type']}"
    elif not {"type", "title", "status", "detail", "request_id"} <= set(answer.json):
        yield f"keys {sorted(answer.json)}"
    elif answer.json["status"] != status or answer.json["request_id"] != answer.headers["X-Request-ID"]:
        yield f"document {answer.json}"


async def check(api: Api, who: Person, cases: Iterator[tuple[str, str, dict[str, Any], int]]) -> None:
    """Send each case `(method, path, options, expected status)` and report all that are answered otherwise."""
    wrong = []
    for method, path, options, status in cases:
        answer = await api.call(method, path, who, **options)
        wrong += [f"{method} {path} {str(options)[:80]}: {problem}" for problem in problems(answer, status)]
    assert wrong == []


def raw(body: bytes, content_type: str = "application/json") -> dict[str, Any]:
    return {"data": body, "headers": {"Content-Type": content_type}}


MALFORMED = [
    b"1e999", b"{", b"}", b"{'a': 1}", b'{"a": NaN}', b"\xff\xfe", b'{"name": "\xed\xa0\x80"}', b'{"name": "\\ud800"}',
    b"[" * 2000, b'{"a": 1} x', b"nul", b"\x00",
]  # fmt: skip


async def test_a_body_that_is_no_json_is_400(api: Api, root: Person) -> None:
    await check(
        api, root, ((route.method, path_of(route), raw(body), 400) for route in WITH_BODY for body in MALFORMED)
    )


async def test_a_body_that_is_missing_is_422(api: Api, root: Person) -> None:
    needed = [route for route in WITH_BODY if (declared := operation_of(route.handler)) and declared.body_required]
    # The swap of tokens takes none, too, and so does a deployment of an app as it is.
    assert len(needed) == len(WITH_BODY) - 2
    await check(api, root, ((route.method, path_of(route), {}, 422) for route in needed))


async def test_a_body_of_another_type_is_415(api: Api, root: Person) -> None:
    types = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml"]
    await check(
        api,
        root,
        ((route.method, path_of(route), raw(b'{"name": "x"}', kind), 415) for route in WITH_BODY for kind in types),
    )


async def test_a_body_that_is_no_object_is_422(api: Api, root: Person) -> None:
    bodies = [b"[]", b"null", b"1", b'"text"', b"true", b'[{"name": "x"}]', b"-1"]
    await check(api, root, ((route.method, path_of(route), raw(body), 422) for route in WITH_BODY for body in bodies))


async def test_unknown_fields_and_parameters_are_422_at_their_name(api: Api, root: Person) -> None:
    odd = "; DROP TABLE users --"
    for route in WITH_BODY:
        answer = await api.call(route.method, path_of(route), root, {odd: 1})
        assert answer.status == 422, route
        assert odd in answer.errors, route
    for route in WITH_QUERY:
        answer = await api.call(route.method, path_of(route), root, params={odd: "1"})
        assert answer.status == 422, route
        assert list(answer.errors) == [odd], route


WRONG = [
    None, True, 0, -1, 1.5, 2**63, 2**64, 10**30, 1e308, "", " ", "\x00", "a\x00b", "x" * 70_000, [], {}, [None], [[]],
    {"a": {"b": 1}}, [1, "a"],
]  # fmt: skip


async def test_a_value_of_a_wrong_type_or_size_is_never_an_error_of_ours(api: Api, root: Person) -> None:
    failed = []
    for route in WITH_BODY:
        declared = operation_of(route.handler)
        assert declared is not None
        assert declared.body is not None
        for name in declared.body.fields:
            for value in WRONG:
                body = orjson.dumps({name: value}) if not isinstance(value, int) or abs(value) < 2**63 else b""
                body = body or f'{{"{name}": {value}}}'.encode()
                answer = await api.call(route.method, path_of(route), root, **raw(body))
                if answer.status not in (200, 400, 401, 403, 404, 422):
                    failed.append((route.method, route.path, name, str(value)[:20], answer.status))
    assert failed == []


async def test_a_wrong_query_is_422(api: Api, root: Person) -> None:
    values = ["", "-1", "0", "x", "1.5", "9" * 30, "1e3", "%00", "\N{ARABIC-INDIC DIGIT ONE}", "true", "' OR 1=1 --"]
    cases = []
    for route in WITH_QUERY:
        declared = operation_of(route.handler)
        assert declared is not None
        assert declared.query is not None
        for name in declared.query.fields:
            if name in ("q", "service", "container", "channel"):
                continue
            fine = {"after": ("0",), "tail": ("0",), "since": ("0",), "follow": ("true",)}.get(name, ())
            cases += [
                (route.method, path_of(route), {"params": {name: value}}, 422) for value in values if value not in fine
            ]
    await check(api, root, iter(cases))


async def test_an_id_that_cannot_be_is_404(api: Api, root: Person) -> None:
    values = [
        "0",
        "-1",
        "9223372036854775808",
        "9" * 40,
        "1.0",
        "abc",
        "%00",
        "1%20",
        "+1",
        "%F0%9F%98%80",
        "1;2",
        "0x1",
    ]
    values += ["..%2F..", "%D9%A1", "'%20OR%201=1"]
    body = {"json": {"name": "x"}}
    await check(
        api,
        root,
        (
            (route.method, path_of(route, value), body if route.method in ("PUT", "POST") else {}, 404)
            for route in WITH_PATH
            for value in values
        ),
    )


async def test_an_object_that_is_not_there_is_404(api: Api, root: Person) -> None:
    bodies = {"PUT": {"name": "x"}, "POST": {}}
    cases = []
    for route in WITH_PATH:
        if "{project_uuid}" in route.path:
            continue
        body = bodies.get(route.method)
        if "members" in route.path and body is not None:
            body = {"role": "viewer"} if route.method == "PUT" else {"role": "viewer", "user_id": 1}
        if "users" in route.path and body is not None:
            body = {"name": "x"}
        if route.path.endswith("/machine-config"):
            body = {"machine_config": "x"}
        if "{provider_id}" in route.path and body is not None:
            body = {"name": "x", "kind": "local"}
        if "{machine_config_id}" in route.path and body is not None:
            body = {"name": "x", "provider": "here"}
        if "{app_id}" in route.path and route.method == "PUT":
            body = {"auto_deploy": True}
        options = {"json": body} if body is not None else {}
        cases.append((route.method, path_of(route, 2**63 - 1), options, 404))
    await check(api, root, iter(cases))


async def test_a_body_over_the_limit_is_413(api: Api, root: Person) -> None:
    body = b'{"name": "' + b"x" * (1 << 20) + b'"}'

    async def chunks() -> Any:
        yield body

    for route in WITH_BODY:
        answer = await api.call(route.method, path_of(route), root, **raw(body) | {"data": BytesIO(body)})
        assert list(problems(answer, 413)) == [], route
    chunked = await api.call("POST", "/api/v1/workspaces", root, **{**raw(b""), "data": chunks()})
    assert list(problems(chunked, 413)) == []


async def test_without_a_token_every_operation_is_401_whatever_else_is_wrong(api: Api) -> None:
    for route in API:
        declared = operation_of(route.handler)
        assert declared is not None
        if declared.signed_in:
            value: object = uuid4() if "uuid" in route.path else 1
            answer = await api.call(route.method, path_of(route, value), **raw(b"{"), params={"page": "x"})
            assert list(problems(answer, 401)) == [], route


async def test_unknown_addresses_and_methods_are_problem_documents(api: Api, root: Person) -> None:
    for path in (
        "/nope",
        "/api",
        "/api/v1",
        "/api/v1/",
        "/api/v2/sessions",
        "/api/v1/sessions/1/2/3",
        "/%2e%2e/etc/passwd",
    ):
        assert list(problems(await api.call("GET", path, root), 404)) == [], path
    methods: dict[str, set[str]] = {}
    for route in routes():
        allowed = methods.setdefault(path_of(route), set())
        allowed |= {"GET", "HEAD"} if route.method == "GET" else {route.method}
    for path in sorted(methods):
        answer = await api.call("PATCH", path, root)
        assert list(problems(answer, 405)) == [], path
        assert set(answer.headers["Allow"].split(", ")) <= methods[path] | {"GET", "HEAD", "PUT", "DELETE", "POST"}


ODD_REQUESTS = [
    (b"GET /api/v1/users?q=\xff HTTP/1.1", b"", {b"400"}),
    (b"GET /api/v1/users/\xff HTTP/1.1", b"", {b"400", b"404"}),
    (b"GET /api/v1/sessions?status=\xed\xa0\x80 HTTP/1.1", b"", {b"400"}),
    (b"GET /api/v1/users?%FF=1 HTTP/1.1", b"", {b"422"}),
    (b"GET /api/v1/users?q=%ED%A0%80 HTTP/1.1", b"", {b"200", b"422"}),
    (b"GET /api/v1/users?q=a HTTP/1.1", b"X-Request-ID: \xff\xfe\r\n", {b"200"}),
    (b"GET /api/v1/users/me HTTP/1.1", b"Authorization: Bearer \xff\xfe\r\n", {b"401"}),
    (b"POST /api/v1/sessions HTTP/1.1", b"Idempotency-Key: \xff\r\nContent-Length: 0\r\n", {b"422"}),
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1", b"", {b"400"}),
    (b"\x16\x03\x01 HTTP/1.1", b"", {b"400"}),
]


async def test_odd_bytes_in_a_request_are_no_error_of_ours(api: Api, root: Person) -> None:
    for line, header, expected in ODD_REQUESTS:
        assert await status_of(api, root, line, header) in expected, line


async def status_of(api: Api, root: Person, line: bytes, header: bytes) -> bytes:
    """Send a request as these bytes; the status of its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.port)
    token = b"" if header.startswith(b"Authorization") else b"Authorization: Bearer " + root.token.encode() + b"\r\n"
    try:
        writer.write(line + b"\r\nHost: x\r\nConnection: close\r\n" + token + header + b"\r\n")
        async with asyncio.timeout(5):
            status = await reader.readline()
            await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
    return status.split()[1]


async def test_metacharacters_are_kept_verbatim(api: Api, root: Person) -> None:
    for name in ("' OR '1'='1", "$(touch /tmp/x)", "`id`", "%s%n", "{0.__class__}", "<script>", "a\\", "\u202e"):
        made = await api.call("POST", "/api/v1/workspaces", root, {"name": name})
        assert (made.status, made.json["name"]) == (201, name)
        assert (await api.call("GET", made.headers["Location"], root)).json["name"] == name
