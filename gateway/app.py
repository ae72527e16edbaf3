"""The composition root of the gateway: every part is made, opened and closed here, in one order and the reverse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import structlog
from aiohttp import web

from auth.errors import IssuerUnavailable
from auth.tokens import Tokens, TokenSettings
from gateway import garbage
from gateway.context import CONTEXT, Context
from gateway.metrics import METRICS, Metrics
from gateway.middleware import edge, stamp
from gateway.port import listen
from gateway.ratelimit import LIMITS, Limits
from gateway.realtime import inquiries
from gateway.realtime.archive import Archive
from gateway.realtime.feed import Feed
from gateway.realtime.history import History
from gateway.realtime.hub import Hub
from gateway.realtime.replicas import Replicas
from gateway.realtime.sse import Encoder
from gateway.routes import routes
from gateway.settings import GatewaySettings
from orchestrator.database import Pool, require_schema
from orchestrator.eventlog.contract import EventLog
from orchestrator.settings import DatabaseSettings

log = structlog.get_logger("gateway")

# Seconds, and bytes, that an outside issuer's answer may take.
_OUTSIDE_DEADLINE = 5.0
_OUTSIDE_LIMIT = 1 << 20

# Seconds between two looks whether the feed has caught up.
_LOOK = 0.05

# The feed's task: ends only when the application does, or when something is wrong that nothing here can mend.
FEED: web.AppKey[asyncio.Task[None]] = web.AppKey("feed_task")


def build(
    settings: GatewaySettings,
    token_settings: TokenSettings,
    pool: Pool,
    log: EventLog,
    database_settings: DatabaseSettings,
) -> web.Application:
    """The application. The pool and the log are open, stay the caller's, and are closed by it after the application.

    Raises SettingsError for a wrong rate limit or SECRETS_KEY, ValueError for wrong settings of tokens.
    """
    outside = Outside()
    history = History(log.epoch, settings.realtime.history_seconds, settings.realtime.history_bytes)
    hub = Hub(settings.realtime)
    feed = Feed(log, history, hub, pool)
    replicas = Replicas(log, feed)
    inquiries.answer(replicas, hub)
    context = Context(
        settings=settings,
        pool=pool,
        tokens=Tokens(token_settings, outside.fetch_json),
        log=log,
        history=history,
        archive=Archive(log, history, settings.realtime),
        hub=hub,
        feed=feed,
        replicas=replicas,
        encoder=Encoder(history),
        database_timeout=database_settings.timeout,
    )
    app = web.Application(middlewares=[edge(settings)], client_max_size=settings.body_limit)
    app[CONTEXT] = context
    app[LIMITS] = Limits(settings)
    app[METRICS] = Metrics(context)
    app.add_routes(routes())
    app.on_response_prepare.append(stamp(settings))
    app.on_startup.append(_schema_is_current)
    app.cleanup_ctx.append(outside.opened)
    app.cleanup_ctx.append(_tokens_closed)
    app.cleanup_ctx.append(_feed_running)
    return app


class Outside:
    """The client for an outside issuer's keys. Opened with the application, since it belongs to its loop."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def opened(self, _: web.Application) -> AsyncIterator[None]:
        """Open while the application runs."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_OUTSIDE_DEADLINE)) as self._session:
            yield

    async def fetch_json(self, url: str) -> dict[str, Any]:
        """The JSON object at `url`, within 5 s and 1 MiB. Raises IssuerUnavailable with what went wrong."""
        if self._session is None:
            raise IssuerUnavailable("The gateway has not started yet.")
        try:
            async with self._session.get(url, raise_for_status=True) as answer:
                document = orjson.loads(await _read(answer))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise IssuerUnavailable(f"The issuer's keys cannot be fetched: {type(error).__name__}.") from error
        if not isinstance(document, dict):
            raise IssuerUnavailable("The issuer's keys are no JSON object.")
        return document


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > _OUTSIDE_LIMIT:
            raise ValueError("too large")
    return bytes(body)


async def _schema_is_current(app: web.Application) -> None:
    """Raise SchemaOutdated before anybody is served: half of the requests would fail in ways that tell nothing."""
    await require_schema(app[CONTEXT].pool)


async def _tokens_closed(app: web.Application) -> AsyncIterator[None]:
    yield
    await app[CONTEXT].tokens.close()


async def _feed_running(app: web.Application) -> AsyncIterator[None]:
    feed = asyncio.create_task(_follow(app[CONTEXT]), name="gateway feed")
    feed.add_done_callback(_tell_end)
    app[FEED] = feed
    yield
    feed.cancel()
    await asyncio.wait([feed])


async def _follow(context: Context) -> None:
    """Follow the log, and be one of the replicas. Ends when one of the two does, and raises what has ended it."""
    tasks = [
        asyncio.create_task(context.feed.run(), name="gateway: feed"),
        asyncio.create_task(context.replicas.run(), name="gateway: replicas"),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _tell_end(feed: asyncio.Task[None]) -> None:
    if not feed.cancelled() and (error := feed.exception()):
        log.critical("the feed has ended: no event reaches anybody", exc_info=error)


async def _drain(app: web.Application) -> None:
    """Let the connections go, in the time that so many take, and the grace. The runner gives requests the grace again.

    What a supervisor grants must be more than both: README.md says how to reckon it.
    """
    context = app[CONTEXT]
    try:
        async with asyncio.timeout(context.hub.drain_seconds + context.settings.shutdown_grace):
            await context.hub.drain()
    except TimeoutError:
        log.warning("some connections did not end in time", left=len(context.hub.connections))


@asynccontextmanager
async def listening(app: web.Application, settings: GatewaySettings, *, reuse_port: bool = False) -> AsyncIterator[int]:
    """Serve `app` while the body runs; yields the port. At the end: drain, no new connections, finish, close.

    `reuse_port`: the port is shared with other processes; this one takes its part of the connections once it has
    caught up with the event log. Raises SettingsError when the address cannot be listened on, SchemaOutdated when the
    database lacks migrations. The body should watch `app[FEED]`: see `until_failure`.
    """
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, shutdown_timeout=settings.shutdown_grace, keepalive_timeout=75
    )
    try:
        await runner.setup()
        if reuse_port:
            await _caught_up(app)
        await listen(runner, settings, reuse_port=reuse_port)
        try:
            with garbage.settled():
                yield int(runner.addresses[0][1])
        finally:
            # Still listening: who comes now is told (503), and finds another replica.
            await _drain(app)
    finally:
        await runner.cleanup()


async def _caught_up(app: web.Application) -> None:
    """Return when the feed has, or has ended."""
    while not app[CONTEXT].feed.ready and not app[FEED].done():  # noqa: ASYNC110  The feed wakes nobody.
        await asyncio.sleep(_LOOK)


async def until_failure(app: web.Application) -> None:
    """Wait, for ever if all is well; raises what ended the feed, after which this process is of no use."""
    await asyncio.shield(app[FEED])
