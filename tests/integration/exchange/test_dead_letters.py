"""What other services publish that is no event: put away once, however many gateways meet it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiormq
import pytest

from gateway.realtime.feed import Feed
from gateway.realtime.history import History
from gateway.realtime.hub import Hub
from gateway.settings import RealtimeSettings
from orchestrator.database import Connection, Pool, Wakeup
from orchestrator.errors import LogUnavailable
from orchestrator.eventlog import dead_letters
from orchestrator.eventlog.contract import DeadLetter, Entry
from orchestrator.eventlog.dead_letters import DeadLetters
from orchestrator.eventlog.rabbitmq import RabbitLog
from orchestrator.settings import DatabaseSettings
from tests.integration.eventlog.rabbit import PATIENCE, opened, plainly, send


def invalid(offset: int, body: bytes = b"nonsense") -> Entry:
    return Entry(offset, f"id-{offset}", "app.event", "", body, "not JSON")


class Queue:
    """Stands for RabbitMQ's queue where only the relay is looked at: takes what it is given, or refuses."""

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []
        self.refuses = False

    async def dead_letter(self, letters: Any) -> None:
        if self.refuses:
            raise LogUnavailable("away")
        self.letters += letters

    async def consume(self, *_: Any) -> None:
        raise NotImplementedError


async def test_an_entry_is_noted_once_and_published_once(connection: Connection) -> None:
    queue = Queue()
    for _ in range(3):
        await dead_letters.write(connection, [("e1", invalid(1)), ("e1", invalid(2, b"x" * 5000))])
    # The same place in another log is another entry.
    await dead_letters.write(connection, [("e2", invalid(1))])
    assert await dead_letters.count(connection) == (3, 3)
    queue.refuses = True
    with pytest.raises(LogUnavailable):
        await dead_letters.relay_batch(connection, queue)
    queue.refuses = False
    assert [await dead_letters.relay_batch(connection, queue) for _ in range(2)] == [3, 0]
    assert {(one.epoch, one.offset, one.event_id, one.routing_key) for one in queue.letters} == {
        ("e1", 1, "id-1", "app.event"), ("e1", 2, "id-2", "app.event"), ("e2", 1, "id-1", "app.event"),
    }  # fmt: skip
    assert {len(one.body) for one in queue.letters} == {8, 5000}
    assert await dead_letters.count(connection) == (3, 0)
    # What is kept for the list is short.
    assert await connection.fetchval("SELECT max(length(body)) FROM dead_letters") == 1024


async def test_large_ones_are_published_some_at_a_time(connection: Connection) -> None:
    queue = Queue()
    await dead_letters.write(connection, [("e", invalid(offset, b"x" * (1 << 20))) for offset in range(1, 11)])
    counts = []
    while counts[-1:] != [0]:
        counts.append(await dead_letters.relay_batch(connection, queue))
    assert counts == [4, 4, 2, 0]
    assert [one.offset for one in queue.letters] == list(range(1, 11))


async def test_what_postgresql_cannot_hold_is_noted_all_the_same(connection: Connection) -> None:
    entry = Entry(1, "a\0b", "key\0\udcff", "", b"\0\xff", "bad: \0")
    await dead_letters.write(connection, [("e", entry)])
    (found,) = await dead_letters.newest(connection, 10)
    assert (found.position, found.body, found.reason) == ("e:1", b"\0\xff", "bad: �")


async def test_old_ones_are_purged_once_they_are_in_their_queue(connection: Connection) -> None:
    await dead_letters.write(connection, [("e", invalid(1)), ("e", invalid(2))])
    await connection.execute("UPDATE dead_letters SET created_at = now() - interval '2 hours'")
    await connection.execute("UPDATE dead_letters SET published_at = now() WHERE log_offset = 1")
    assert await dead_letters.purge(connection, 10_000, limit=10) == 0
    assert await dead_letters.purge(connection, 3600, limit=10) == 1
    assert await connection.fetchval("SELECT log_offset FROM dead_letters") == 2


async def test_however_many_come_so_many_are_kept_but_all_of_the_last_hour(connection: Connection) -> None:
    await dead_letters.write(connection, [("e", invalid(offset)) for offset in range(1, 11)])
    await connection.execute("UPDATE dead_letters SET published_at = now()")
    assert await dead_letters.purge(connection, 1e6, limit=100, most=3) == 0
    await connection.execute("UPDATE dead_letters SET created_at = now() - log_offset * interval '2 hours'")
    assert await dead_letters.purge(connection, 1e6, limit=100, most=3) == 7
    assert await dead_letters.purge(connection, 1e6, limit=100) == 0


async def test_a_gateway_keeps_what_it_can_while_the_database_is_away(pool: Pool) -> None:
    letters = DeadLetters(pool)
    for offset in range(1, dead_letters.MAX_WAITING + 6):
        letters.add("e", invalid(offset))
    assert letters.dropped == 5
    await pool.execute("ALTER TABLE dead_letters RENAME TO elsewhere")
    with pytest.raises(Exception, match="dead_letters"):
        await letters.iterate()
    await pool.execute("ALTER TABLE elsewhere RENAME TO dead_letters")
    writing = asyncio.create_task(letters.run())
    await until(pool, "SELECT count(*) FROM dead_letters", dead_letters.MAX_WAITING)
    letters.add("e", invalid(5000, b"x" * (dead_letters.MAX_WAITING_BYTES + 1)))
    assert letters.dropped == 6
    writing.cancel()
    await asyncio.wait([writing])


async def until(pool: Pool, query: str, wanted: object) -> None:
    found = None
    try:
        async with asyncio.timeout(PATIENCE):
            while (found := await pool.fetchval(query)) != wanted:
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{query} gives {found!r}") from None


@asynccontextmanager
async def feeding(url: str, pool: Pool) -> AsyncIterator[Feed]:
    """A gateway's feed, once it has caught up."""
    async with opened(url) as log:
        hub = Hub(RealtimeSettings())
        feed = Feed(log, History(log.epoch, 600, 1 << 20), hub, pool)
        task = asyncio.create_task(feed.run())
        try:
            async with asyncio.timeout(PATIENCE):
                while not feed.ready:
                    await asyncio.sleep(0.01)
            yield feed
        finally:
            task.cancel()
            await asyncio.wait([task])


async def waiting(url: str) -> list[Any]:
    """What lies in the queue of dead letters, which is taken out."""
    found = []
    async with plainly(url) as channel:
        while True:
            message = await channel.basic_get("cluster-code.dead-letter", no_ack=True)
            if isinstance(message.delivery, aiormq.spec.Basic.GetEmpty):
                return found
            found.append(message)


@asynccontextmanager
async def relaying(log: RabbitLog, settings: DatabaseSettings) -> AsyncIterator[None]:
    task = asyncio.create_task(dead_letters.relay(settings, log, Wakeup(), 0.05))
    yield
    task.cancel()
    await asyncio.wait([task])


async def test_gateways_that_all_meet_it_and_start_again_put_it_away_once(
    amqp_url: str, pool: Pool, database_settings: DatabaseSettings
) -> None:
    async with opened(amqp_url) as log, relaying(log, database_settings):
        async with feeding(amqp_url, pool) as first, feeding(amqp_url, pool) as second:
            for number in range(3):
                await send(amqp_url, "app.broken", b"broken %d" % number, message_id=f"m{number}")
            await until(pool, "SELECT count(*) FROM dead_letters WHERE published_at IS NOT NULL", 3)
            async with asyncio.timeout(PATIENCE):
                while (first.invalid, second.invalid) != (3, 3):
                    await asyncio.sleep(0.01)
        # A gateway that starts reads the last minutes again.
        async with feeding(amqp_url, pool) as third:
            assert third.invalid == 3
            await send(amqp_url, "app.broken", b"broken 3", message_id="m3")
            await until(pool, "SELECT count(*) FROM dead_letters WHERE published_at IS NOT NULL", 4)
        epoch = log.epoch
    found = await waiting(amqp_url)
    assert [message.body for message in found] == [b"broken %d" % number for number in range(4)]
    assert [message.header.properties.message_id for message in found] == ["m0", "m1", "m2", "m3"]
    headers = found[0].header.properties.headers
    assert headers["routing-key"] == "app.broken"
    assert headers["reason"].startswith("not JSON")
    assert headers["epoch"] == epoch
