"""One operation of the API: what it takes, who may call it, what it answers; declared once, at its handler.

    @operation("Make a workspace", tag="workspaces", body=NewWorkspace, answers={201: Workspace}, …)
    async def create(call: Call) -> web.Response: ...

The declaration parses the request, signs the caller in, opens the transaction, and describes the operation in the
OpenAPI document, so that none of these can say something else than the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal
from uuid import UUID

import orjson
from aiohttp import web
from marshmallow import Schema, ValidationError
from webargs import core
from webargs.aiohttpparser import AIOHTTPParser

from auth.errors import Forbidden, Unauthenticated
from auth.permissions import Identity, Scope, has_scope
from gateway.context import CONTEXT, Context
from gateway.fields import MAX_ID
from gateway.problems import Problem
from gateway.ratelimit import LIMITS, Limit, limited_address
from orchestrator.database import Connection
from orchestrator.events import MAX_NAME_LENGTH

REQUEST_ID = web.RequestKey("request_id", str)
ADDRESS = web.RequestKey("address", str)
# The id of the signed-in user, for the log.
USER_ID = web.RequestKey("user_id", int)
# The `RateLimit-*` headers of the answer.
RATE_HEADERS = web.RequestKey("rate_headers", dict[str, str])

# Seconds that the body of a request may take to arrive.
_BODY_DEADLINE = 30.0
# The longest `Authorization` that is looked at: more than any token, less than what costs.
_MAX_BEARER = 8192


class Database(Enum):
    """What an operation needs of the database while its handler runs."""

    # Nothing, or it acquires connections itself: it waits for other things too.
    NONE = "none"
    # A connection; each statement is its own transaction.
    READ = "read"
    # A connection in a transaction, committed when the handler returns and rolled back when it raises.
    WRITE = "write"


class PathKind(Enum):
    """What a variable part of a path is."""

    ID = "id"
    UUID = "uuid"
    CHANNEL = "channel"


@dataclass(frozen=True, slots=True)
class Operation:
    """The declaration of an operation. `answers`: the schema of each answer that says yes; None: no body."""

    summary: str
    tag: str
    answers: Mapping[int, type[Schema] | None]
    description: str = ""
    body: Schema | None = None
    body_required: bool = True
    query: Schema | None = None
    path: Mapping[str, PathKind] = field(default_factory=dict)
    signed_in: bool = True
    scope: Scope = Scope.READ
    database: Database = Database.READ
    # A stricter limit for each address than that of all requests: one of `ratelimit.Limits`.
    limit: Literal["login", "hooks"] | None = None
    # The body is not parsed, but given to the handler as it came (`Call.raw`); so many bytes of it at most.
    raw: int | None = None
    # Media types in which a client may have the answer 200 instead of JSON, each with its schema; None: text.
    formats: Mapping[str, type[Schema] | None] = field(default_factory=dict)
    # Request headers that it reads, each as an OpenAPI parameter: `description` and `schema`.
    headers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class Call:
    """One request, ready to be handled."""

    request: web.Request
    context: Context
    body: dict[str, Any]
    query: dict[str, Any]
    path: dict[str, Any]
    # The body, for operations that declare `raw`.
    raw: bytes = b""
    _connection: Connection | None = None
    _identity: Identity | None = None

    @property
    def connection(self) -> Connection:
        """The connection, for operations that declare `Database.READ` or `WRITE`."""
        assert self._connection is not None, "the operation declares Database.NONE"  # noqa: S101  A slip of ours.
        return self._connection

    @property
    def identity(self) -> Identity:
        """Who calls, for operations that are `signed_in`."""
        assert self._identity is not None, "the operation declares signed_in=False"  # noqa: S101  A slip of ours.
        return self._identity

    @property
    def address(self) -> str:
        """The client's address."""
        return self.request[ADDRESS]


Endpoint = Callable[[Call], Awaitable[web.StreamResponse]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def operation(
    summary: str,
    *,
    tag: str,
    answers: Mapping[int, type[Schema] | None],
    body: type[Schema] | None = None,
    query: type[Schema] | None = None,
    scope: Scope | None = None,
    database: Database = Database.READ,
    **options: Any,
) -> Callable[[Endpoint], Handler]:
    """Declare an operation. `scope` defaults to what `database` suggests: `write` for WRITE, else `read`."""

    def declare(endpoint: Endpoint) -> Handler:
        declared = Operation(
            summary,
            tag,
            answers,
            body=body() if body else None,
            query=query() if query else None,
            scope=scope or (Scope.WRITE if database is Database.WRITE else Scope.READ),
            database=database,
            description=(endpoint.__doc__ or "").strip(),
            **options,
        )
        no_query = declared.query.load({}) if declared.query else {}

        async def handle(request: web.Request) -> web.StreamResponse:
            return await _handle(declared, endpoint, no_query, request)

        handle.__name__ = handle.__qualname__ = endpoint.__name__
        handle.__module__ = endpoint.__module__
        handle.operation = declared  # type: ignore[attr-defined]
        return handle

    return declare


def operation_of(handler: Handler) -> Operation | None:
    """The declaration of a handler, or None when it has none (pages, the WebSocket)."""
    return getattr(handler, "operation", None)


async def _handle(
    declared: Operation, endpoint: Endpoint, no_query: dict[str, Any], request: web.Request
) -> web.StreamResponse:
    context = request.app[CONTEXT]
    call = Call(request, context, {}, no_query, _path(declared, request))
    if declared.limit:
        limit: Limit = getattr(request.app[LIMITS], declared.limit)
        request[RATE_HEADERS] = limit.take(limited_address(call.address))
    # Before anything else is taken: a client that sends slowly must not hold a connection to the database.
    if declared.raw is not None:
        call.raw = await _read_raw(request, declared.raw)
    elif request.body_exists:
        await _read(request, context.settings.body_limit)
    if declared.database is Database.NONE:
        if declared.signed_in:
            async with lease(context) as connection:
                await _sign_in(declared, call, connection)
        await _parse(declared, call)
        return await endpoint(call)
    async with lease(context) as connection:
        if declared.signed_in:
            await _sign_in(declared, call, connection)
        await _parse(declared, call)
        call._connection = connection  # noqa: SLF001  Made here, read by handlers.
        if declared.database is Database.READ:
            return await endpoint(call)
        async with connection.transaction():
            return await endpoint(call)


@asynccontextmanager
async def lease(context: Context) -> AsyncIterator[Connection]:
    """A connection of the pool. Raises what is in `database.UNAVAILABLE`, TimeoutError when none is free for long."""
    async with asyncio.timeout(context.database_timeout):
        connection = await context.pool.acquire()
    try:
        yield connection
    finally:
        await context.pool.release(connection)


async def _sign_in(declared: Operation, call: Call, connection: Connection) -> None:
    identity = await call.context.tokens.authenticate(connection, bearer(call.request))
    call._identity = identity  # noqa: SLF001  Made here, read by handlers.
    call.request[USER_ID] = identity.user_id
    limits = call.request.app[LIMITS]
    if headers := limits.user.take(str(identity.user_id)):
        call.request[RATE_HEADERS] = headers
    if identity.scopes is not None and not has_scope(identity, declared.scope):
        raise Forbidden(f"This token lacks the scope {declared.scope.value!r} that this operation takes.")


def bearer(request: web.Request) -> str:
    """The token of `Authorization: Bearer` (RFC 6750, section 2.1). Raises Unauthenticated."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("Sign in first: the header Authorization: Bearer {token} is missing.")
    if not token or len(token) > _MAX_BEARER or not token.isascii() or not token.isprintable() or " " in token:
        raise Unauthenticated("The bearer token is malformed.")
    return token


async def _read(request: web.Request, limit: int) -> None:
    async with _arriving(request, limit):
        await request.read()


async def _read_raw(request: web.Request, limit: int) -> bytes:
    """The body, and never more of it than may be: aiohttp's own limit is one for all requests."""
    body = bytearray()
    async with _arriving(request, limit):
        async for chunk in request.content.iter_any():
            body += chunk
            if len(body) > limit:
                raise web.HTTPRequestEntityTooLarge(limit)
    return bytes(body)


@asynccontextmanager
async def _arriving(request: web.Request, limit: int) -> AsyncIterator[None]:
    """Raises HTTPRequestEntityTooLarge, and Problem 408 for a body that takes too long."""
    if (request.content_length or 0) > limit:
        raise web.HTTPRequestEntityTooLarge(limit)
    try:
        async with asyncio.timeout(_BODY_DEADLINE):
            yield
    except TimeoutError as error:
        raise Problem(408, f"The body did not arrive within {_BODY_DEADLINE:.0f} s.") from error


def _path(declared: Operation, request: web.Request) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, kind in declared.path.items():
        text = request.match_info[name]
        value = _PARSERS[kind](text)
        if value is None:
            raise Problem(404, "There is nothing at this address.")
        values[name] = value
    return values


def _parse_id(text: str) -> int | None:
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        return None
    value = int(text)
    return value if 1 <= value <= MAX_ID else None


def _parse_uuid(text: str) -> UUID | None:
    try:
        return UUID(text) if len(text) == 36 else None
    except ValueError:
        return None


def _parse_channel(text: str) -> str | None:
    # Bytes that are no UTF-8 come as surrogates.
    return text if len(text) <= MAX_NAME_LENGTH and text.isprintable() else None


_PARSERS: dict[PathKind, Callable[[str], Any]] = {
    PathKind.ID: _parse_id,
    PathKind.UUID: _parse_uuid,
    PathKind.CHANNEL: _parse_channel,
}


async def _parse(declared: Operation, call: Call) -> None:
    if declared.query is not None and call.request.query_string:
        call.query = await _parser.parse(declared.query, call.request, location="query")
    if declared.body is None:
        return
    if await call.request.read():
        call.body = await _parser.parse(declared.body, call.request, location="json")
    elif declared.body_required:
        raise Problem(422, "A JSON body is needed.", errors={"body": ["Missing."]})


class _Parser(AIOHTTPParser):
    """webargs with orjson, problem documents, and the schemas' own refusal of unknown fields."""

    DEFAULT_UNKNOWN_BY_LOCATION: dict[str, str | None] = {}  # noqa: RUF012  A constant of the parent's.

    async def load_json(self, req: web.Request, schema: Schema) -> Any:
        """The body as Python objects. Raises Problem 415 for another content type and 400 for what is no JSON."""
        if not core.is_json(req.content_type):
            raise Problem(415, "The body must be JSON: send Content-Type: application/json.")
        try:
            return orjson.loads(await req.read())
        except orjson.JSONDecodeError as error:
            raise Problem(400, f"The body is no JSON: {error}.") from error

    def handle_error(self, error: ValidationError, req: web.Request, schema: Schema, **_: Any) -> Any:
        """Turn what the schema says into a problem document."""
        messages: dict[str, Any] = error.normalized_messages()  # type: ignore[no-untyped-call]
        raise invalid(messages) from error


_parser = _Parser()


def invalid(messages: Mapping[str, Any]) -> Problem:
    """Problem 422 from marshmallow's messages by field (below the location that webargs adds)."""
    errors: dict[str, list[str]] = {}
    for found in messages.values():
        _flatten(found, "", errors)
    return Problem(422, "Some values are wrong: see errors.", errors=errors)


def _flatten(messages: Any, path: str, into: dict[str, list[str]]) -> None:
    if isinstance(messages, Mapping):
        for key, value in messages.items():
            step = "" if key == "_schema" else str(key)
            _flatten(value, f"{path}.{step}" if path and step else path or step, into)
    else:
        into.setdefault(path or "body", []).extend(map(str, messages))


def answer(
    document: Any, status: int = 200, *, location: str | None = None, headers: Mapping[str, str] | None = None
) -> web.Response:
    """A JSON answer that no cache keeps: what the API says is for its caller alone. Moments are RFC 3339 in UTC."""
    body = orjson.dumps(document, _write, orjson.OPT_UTC_Z)
    response = web.Response(body=body, status=status, content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    if location:
        response.headers["Location"] = location
    if headers:
        response.headers.update(headers)
    return response


def text(body: bytes | AsyncIterator[bytes]) -> web.Response:
    """An answer of plain text in UTF-8, that no cache keeps either; in parts, each made when the one before is sent."""
    return web.Response(body=body, content_type="text/plain", charset="utf-8", headers={"Cache-Control": "no-store"})


def _write(value: Any) -> str:
    """asyncpg's UUIDs are of a class of their own, which orjson does not know."""
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


def nothing() -> web.Response:
    """204."""
    return web.Response(status=204)


def page(items: Sequence[Any], total: int, query: Mapping[str, Any], *, exact: bool = True) -> dict[str, Any]:
    """A page of a list, as every list answers it."""
    return {
        "items": items,
        "pagination": {
            "page": query["page"],
            "page_size": query["page_size"],
            "total": total,
            "total_pages": -(-total // query["page_size"]),
            "total_is_exact": exact,
        },
    }
