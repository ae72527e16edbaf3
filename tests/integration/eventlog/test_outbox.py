from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

import asyncpg
import orjson
import pytest

from orchestrator.database import Pool, Wakeup, listen
from orchestrator.errors import LogUnavailable
from orchestrator.eventlog import outbox
from orchestrator.eventlog.contract import Entry
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.events import Event
from orchestrator.settings import DatabaseSettings
from tests.integration.eventlog.contract import following, grown, numbered, numbers_of


class FailingLog(MemoryLog):
    """Fails as a real log may: before it has the events, or after it has them."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[str] = []
        self.published = asyncio.Event()

    async def publish(self, events: Sequence[Event]) -> None:
        failure = self.failures.pop(0) if self.failures else None
        if failure == "before":
            raise LogUnavailable("staged: not taken")
        await super().publish(events)
        self.published.set()
        if failure == "after":
            raise LogUnavailable("staged: taken, not confirmed")
        if failure == "hang":
            await asyncio.Event().wait()


@asynccontextmanager
async def relaying(
    settings: DatabaseSettings, log: MemoryLog, *, poll: float = 60.0, hints: bool = True, batch: int = 500
) -> AsyncIterator[asyncio.Task[None]]:
    wakeup = Wakeup()
    tasks = [asyncio.create_task(outbox.relay(settings, log, wakeup, poll, batch=batch), name="relay")]
    if hints:
        tasks.append(asyncio.create_task(listen(settings, {"outbox": wakeup}), name="listen"))
    try:
        yield tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def unique(entries: Sequence[Entry]) -> list[Entry]:
    """As readers do it: the first of each id."""
    seen: dict[str, Entry] = {}
    for entry in entries:
        seen.setdefault(entry.event_id, entry)
    return list(seen.values())


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.01)


async def leader(connection: asyncpg.Connection) -> int | None:
    return await connection.fetchval(
        """SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted
            AND (classid::bigint << 32 | objid::bigint) = $1
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())""",
        outbox.LEADER_KEY,
    )


async def test_events_of_a_committed_transaction_are_published_in_order_and_deleted(
    pool: Pool, database_settings: DatabaseSettings, connection: asyncpg.Connection
) -> None:
    log = MemoryLog()
    events = [Event("a.b", "session:1", {"n": "\0 \u2028 \U0001f600", "x": [1, None]}), *numbered(range(20))]
    async with relaying(database_settings, log), following(log, 0) as entries:
        async with connection.transaction():
            await outbox.add(connection, *events)
            assert (await outbox.lag(connection))[0] == 21
        await grown(entries, 21)
        assert [entry.event_id for entry in entries] == [event.id for event in events]
        assert [orjson.loads(entry.body) for entry in entries] == [orjson.loads(event.body()) for event in events]

        async def empty() -> bool:
            return await outbox.lag(connection) == (0, 0.0)

        await eventually(empty)


async def test_nothing_is_published_of_a_transaction_that_is_rolled_back(
    database_settings: DatabaseSettings, connection: asyncpg.Connection
) -> None:
    log = MemoryLog()
    async with relaying(database_settings, log), following(log, 0) as entries:
        transaction = connection.transaction()
        await transaction.start()
        await outbox.add(connection, *numbered([1]))
        await transaction.rollback()
        await outbox.add(connection)
        await outbox.add(connection, *numbered([2]))
        await grown(entries, 1)
        assert numbers_of(entries) == [2]


async def test_lag_tells_number_and_age(connection: asyncpg.Connection) -> None:
    assert await outbox.lag(connection) == (0, 0.0)
    await outbox.add(connection, *numbered([1, 2]))
    await connection.execute("UPDATE outbox SET created_at = now() - interval '1 minute' WHERE data = '{\"n\":1}'")
    count, age = await outbox.lag(connection)
    assert count == 2
    assert 59 < age < 70


async def test_a_hint_spares_the_wait_for_the_poll(
    database_settings: DatabaseSettings, connection: asyncpg.Connection
) -> None:
    log = MemoryLog()
    async with relaying(database_settings, log, poll=3600), following(log, 0) as entries:
        for number in range(20):
            await outbox.add(connection, *numbered([number]))
            await grown(entries, number + 1)


async def test_without_hints_the_poll_finds_events(
    database_settings: DatabaseSettings, connection: asyncpg.Connection
) -> None:
    log = MemoryLog()
    async with relaying(database_settings, log, poll=0.05, hints=False), following(log, 0) as entries:
        for number in range(3):
            await outbox.add(connection, *numbered([number]))
            await grown(entries, number + 1)


@pytest.mark.parametrize("failure", ["before", "after"])
async def test_a_publication_that_fails_is_repeated_with_the_same_ids(
    failure: str, database_settings: DatabaseSettings, connection: asyncpg.Connection
) -> None:
    log = FailingLog()
    log.failures = [failure, failure]
    await outbox.add(connection, *numbered(range(5)))
    async with relaying(database_settings, log, poll=0.05, batch=2), following(log, 0) as entries:

        async def done() -> bool:
            return await outbox.lag(connection) == (0, 0.0)

        await eventually(done)
        await outbox.add(connection, *numbered([5]))
        async with asyncio.timeout(10):
            while 5 not in numbers_of(entries):
                await asyncio.sleep(0.001)
        assert numbers_of(unique(entries)) == [0, 1, 2, 3, 4, 5]
        assert (len(entries) > 6) == (failure == "after")


async def test_a_relay_that_is_killed_between_publishing_and_deleting_loses_nothing(
    database_settings: DatabaseSettings, connection: asyncpg.Connection
) -> None:
    log = FailingLog()
    log.failures = ["hang"]
    await outbox.add(connection, *numbered(range(3)))
    async with relaying(database_settings, log):
        await asyncio.wait_for(log.published.wait(), 10)
    assert (await outbox.lag(connection))[0] == 3
    async with relaying(database_settings, log), following(log, 0) as entries:
        await grown(entries, 6)
        assert numbers_of(unique(entries)) == [0, 1, 2]


async def test_one_of_several_relays_leads_and_another_takes_over(
    database_settings: DatabaseSettings, connection: asyncpg.Connection
) -> None:
    log = MemoryLog()
    relays = relaying(database_settings, log, poll=0.05), relaying(database_settings, log, poll=0.05)
    async with relays[0], relays[1], following(log, 0) as entries:
        published = 0
        for _ in range(3):
            pid = 0

            async def led() -> bool:
                nonlocal pid
                pid = await leader(connection) or 0
                return pid != 0

            await eventually(led)
            await connection.execute("SELECT pg_terminate_backend($1)", pid)
            await outbox.add(connection, *numbered(range(published, published + 10)))
            published += 10
            async with asyncio.timeout(20):
                while len(unique(entries)) < published:
                    await asyncio.sleep(0.005)
        assert numbers_of(unique(entries)) == list(range(published))


async def test_a_relay_outlives_an_outage_of_its_log_and_its_database(
    database_settings: DatabaseSettings, connection: asyncpg.Connection
) -> None:
    wrong = DatabaseSettings(url="postgresql://nobody@127.0.0.1:1/none", timeout=1.0)
    log = MemoryLog()
    async with relaying(wrong, log, hints=False) as task:
        await asyncio.sleep(0.1)
        assert not task.done()


@pytest.mark.random
async def test_concurrent_transactions_keep_the_order_of_each_and_of_each_row(
    pool: Pool, database_settings: DatabaseSettings, connection: asyncpg.Connection
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    log = MemoryLog()
    await connection.execute("CREATE TABLE states (id int PRIMARY KEY, version int NOT NULL)")
    await connection.execute("INSERT INTO states SELECT n, 0 FROM generate_series(1, 3) AS n")

    async def work() -> None:
        for _ in range(25):
            row = draw.randint(1, 3)
            async with pool.acquire() as own, own.transaction():
                version = await own.fetchval(
                    "UPDATE states SET version = version + 1 WHERE id = $1 RETURNING version", row
                )
                await outbox.add(own, *(Event("a", f"row:{row}", {"n": version * 2 + half}) for half in (0, 1)))

    async with relaying(database_settings, log, batch=7), following(log, 0) as entries:
        await asyncio.gather(*(work() for _ in range(6)))
        await grown(entries, 300)
        for row in range(1, 4):
            own = numbers_of([entry for entry in entries if entry.channel == f"row:{row}"])
            assert own == list(range(2, 2 + len(own)))


async def test_an_id_that_is_no_uuid_is_refused(connection: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.DataError):
        await outbox.add(connection, Event("a", "b:1", {}, "nonsense"))
    await outbox.add(connection, Event("a", "b:1", {}, str(uuid4())))
