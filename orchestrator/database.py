"""PostgreSQL: the pool, the schema check, listening, and leadership by advisory lock.

asyncpg raises many kinds of errors when the server is away; `UNAVAILABLE` names them all, so that a request can be
answered 503 and a loop can back off, and nothing else is mistaken for an outage.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import asyncpg
import orjson
import structlog

import migrations
from orchestrator.errors import SchemaOutdated, SettingsError, Unreachable
from orchestrator.settings import DatabaseSettings

log = structlog.get_logger("database")

Pool: TypeAlias = asyncpg.Pool
Connection: TypeAlias = asyncpg.Connection

# The server is away, going away, or cannot take one more: the same statement may succeed later.
UNAVAILABLE: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.QueryCanceledError,
    # Two waited for each other's rows, and we were the one to go.
    asyncpg.TransactionRollbackError,
)

# Bitmap and sequential scans read all rows of a key before a LIMIT can end them, and are planned for keys of average
# size: for a workspace that has half of all sessions that is most of the table (docs/performance.md). "off" makes the
# planner avoid them where there is an index; it does not forbid them.
_PLANNER = {"enable_bitmapscan": "off", "enable_seqscan": "off"}

# Of a holder whose machine has died the server hears within 25 seconds, and gives its locks to another.
_KEEPALIVE = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"}


async def open_pool(settings: DatabaseSettings, *, name: str) -> Pool:
    """A pool of connections whose jsonb comes and goes as Python objects.

    `name` is what `pg_stat_activity` shows. Raises SettingsError when the URL is wrong or the server refuses it,
    Unreachable when none answers.
    """
    try:
        return await asyncpg.create_pool(
            settings.url,
            min_size=1,
            max_size=settings.pool_size,
            timeout=settings.timeout,
            command_timeout=settings.timeout,
            init=prepare,
            # Nobody leaves session state (SET, LISTEN, cursors) behind on a pooled connection, so that the round trip
            # which would undo it is spared. What needs such state opens a connection of its own: `connect`.
            reset=_nothing_to_reset,
            server_settings=_PLANNER | {"application_name": name},
        )
    except (ValueError, asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
        raise SettingsError(f"DATABASE_URL: {error}") from error
    except UNAVAILABLE as error:
        raise Unreachable(f"DATABASE_URL: no PostgreSQL answers there ({error or type(error).__name__})") from error


async def _nothing_to_reset(connection: Connection) -> None:
    pass


async def connect(settings: DatabaseSettings, *, name: str) -> Connection:
    """One connection outside the pool, for LISTEN and advisory locks. Raises what is in `UNAVAILABLE`."""
    connection = await asyncpg.connect(
        settings.url,
        timeout=settings.timeout,
        # Our side hears nothing of a server whose machine has died: who leads or holds must not wait for it.
        command_timeout=settings.timeout,
        server_settings=_PLANNER | _KEEPALIVE | {"application_name": name},
    )
    try:
        await prepare(connection)
    except BaseException:
        # Nobody else could: the server went away, or the caller was cancelled, before it had the connection.
        connection.terminate()
        raise
    return connection


async def prepare(connection: Connection) -> None:
    """Let jsonb come and go as Python objects."""
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        format="binary",
        encoder=lambda value: b"\x01" + orjson.dumps(value),
        decoder=lambda value: orjson.loads(value[1:]),
    )


async def require_schema(pool: Pool) -> None:
    """Raise SchemaOutdated, saying what to run, when the database lacks migrations."""
    async with pool.acquire() as connection:
        missing = await migrations.pending(connection)
    if missing:
        raise SchemaOutdated(
            f"the database lacks {len(missing)} migration(s), from {missing[0]} on: run `cluster-code migrate:up`"
        )


class Wakeup:
    """A hint that there may be work: set by NOTIFY, waited for with a poll's deadline, cleared by who wakes."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """Wake whoever waits, now or at its next wait."""
        self._event.set()

    async def wait(self, timeout: float) -> None:
        """Return at the next hint, or after `timeout` seconds without one."""
        try:
            async with asyncio.timeout(timeout):
                await self._event.wait()
        except TimeoutError:
            return
        finally:
            self._event.clear()


async def listen(settings: DatabaseSettings, wakeups: dict[str, Wakeup]) -> None:
    """Set each wakeup when its channel is notified, for ever; every one after a reconnect, since hints were missed."""
    failures = 0
    while True:
        try:
            connection = await connect(settings, name="cluster-code listen")
            try:
                ended = asyncio.Event()
                connection.add_termination_listener(lambda _, ended=ended: ended.set())
                for channel, wakeup in wakeups.items():
                    await connection.add_listener(channel, lambda *_, wakeup=wakeup: wakeup.set())
                    wakeup.set()
                failures = 0
                await ended.wait()
            finally:
                connection.terminate()
        except UNAVAILABLE as error:
            failures += 1
            log.warning("listening failed", error=str(error) or type(error).__name__, failures=failures)
        await asyncio.sleep(backoff(failures))


@asynccontextmanager
async def leadership(settings: DatabaseSettings, key: int) -> AsyncIterator[Connection]:
    """Hold the advisory lock `key` on a connection of its own; waits until it is free.

    Losing the connection loses the lead: the body must do its work through the connection given, so that it fails at
    once when the lead is gone. Raises what is in `UNAVAILABLE`; cancelling gives the lock back.
    """
    connection = await connect(settings, name="cluster-code leader")
    try:
        # Trying again and again, since a wait inside the server would run into the connection's own deadline.
        while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", key):  # noqa: ASYNC110
            await asyncio.sleep(1.0)
        yield connection
    finally:
        # Ends the session and with it the lock, whatever state the connection is in.
        connection.terminate()


def backoff(failures: int, *, base: float = 0.2, cap: float = 10.0) -> float:
    """Seconds to wait after so many failures in a row: full jitter, so that many clients do not come back at once."""
    return random.uniform(0, min(cap, base * 2 ** min(failures, 16)))


async def guard(name: str, iteration: Callable[[], Awaitable[None]]) -> None:
    """Repeat `iteration` for ever, backing off while the database is away. Any other error ends it, and is raised."""
    failures = 0
    while True:
        try:
            await iteration()
            failures = 0
        except UNAVAILABLE as error:
            failures += 1
            log.warning("database away", task=name, error=str(error) or type(error).__name__, failures=failures)
            await asyncio.sleep(backoff(failures))
