"""Entries of the event log that are no events: from the gateways, which all meet them, into the queue of dead letters.

    gateway: `DeadLetters.add` ──> table dead_letters, one row an entry ──> leading orchestrator: `relay` ──> RabbitMQ

The table's key is the entry's place in the log. So however many gateways read it, and however often one that starts
reads it again, it is one row, and is published once; twice, with the same message id, when the relay dies between the
publishing and the note of it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog

from orchestrator.database import Connection, Pool, Wakeup, guard
from orchestrator.eventlog.contract import DeadLetter, Entry, Exchange
from orchestrator.eventlog.relay import Relaying
from orchestrator.eventlog.relay import relay as relay_rows
from orchestrator.settings import DatabaseSettings
from orchestrator.text import clean

log = structlog.get_logger("dead letters")

# The advisory lock of the one relay that works.
LEADER_KEY = 0x64656164
# What waits in a gateway while the database is away: entries, and bytes of them.
MAX_WAITING = 1000
MAX_WAITING_BYTES = 16 << 20
# Rows written, published or deleted at once.
_BATCH = 100
# Rows that are kept, whoever floods us.
MOST = 100_000
# Bytes of bodies published at once, and one body more: RabbitMQ has to confirm them within a call's deadline.
_BATCH_BYTES = 4 << 20
# Bytes of a body that are kept once it is in RabbitMQ.
_KEPT = 1024
# Bytes. AMQP's routing keys and message ids have no more.
_NAME = 255
_REASON = 1000


@dataclass(frozen=True, slots=True)
class Recorded:
    """A dead letter as it is listed. `body` is its beginning; `published_at` None: it is not in RabbitMQ yet."""

    position: str
    routing_key: str
    reason: str
    body: bytes
    created_at: datetime
    published_at: datetime | None


class DeadLetters:
    """Takes entries from the feed, and writes them down while `run` runs. Belongs to one event loop."""

    def __init__(self, pool: Pool) -> None:
        # For the metrics: entries that came while too many waited for the database.
        self.dropped = 0
        self._pool = pool
        self._waiting: deque[tuple[str, Entry]] = deque()
        self._bytes = 0
        self._some = asyncio.Event()

    def add(self, epoch: str, entry: Entry, reason: str = "") -> None:
        """Take an entry of that epoch; `reason` if the entry does not tell it itself. Returns at once."""
        if len(self._waiting) >= MAX_WAITING or self._bytes + len(entry.body) > MAX_WAITING_BYTES:
            self.dropped += 1
            return
        if reason:
            entry = Entry(entry.offset, entry.event_id, entry.event_type, "", entry.body, reason)
        self._bytes += len(entry.body)
        self._waiting.append((epoch, entry))
        self._some.set()

    async def run(self) -> None:
        """Write down what is added, for ever. What waits when this is cancelled is met again by the next start."""
        await guard("dead letters", self.iterate)

    async def iterate(self) -> None:
        """Wait for entries, and write a batch of them. Raises what is in `database.UNAVAILABLE`: they wait on."""
        await self._some.wait()
        batch = [self._waiting[place] for place in range(min(_BATCH, len(self._waiting)))]
        async with self._pool.acquire() as connection:
            await write(connection, batch)
        for _ in batch:
            self._bytes -= len(self._waiting.popleft()[1].body)
        if not self._waiting:
            self._some.clear()


async def write(connection: Connection, letters: Sequence[tuple[str, Entry]]) -> None:
    """Note entries, each with its epoch, that are not noted yet, and wake the relay."""
    await connection.execute(
        """WITH added AS (
               INSERT INTO dead_letters (epoch, log_offset, event_id, routing_key, reason, body)
               SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::bytea[])
                   ON CONFLICT DO NOTHING RETURNING 1)
           SELECT pg_notify('dead_letters', '') FROM added LIMIT 1""",
        [epoch for epoch, _ in letters],
        [entry.offset for _, entry in letters],
        [clean(entry.event_id, _NAME) for _, entry in letters],
        [clean(entry.event_type, _NAME) for _, entry in letters],
        [clean(entry.invalid, _REASON) for _, entry in letters],
        [entry.body for _, entry in letters],
    )


async def relay(
    settings: DatabaseSettings,
    exchange: Exchange,
    wakeup: Wakeup,
    poll_interval: float,
    relaying: Relaying | None = None,
) -> None:
    """Carry them into RabbitMQ, for ever, whenever this process leads. `wakeup`: NOTIFY on `dead_letters`."""

    async def carry(connection: Connection) -> int:
        return await relay_batch(connection, exchange)

    await relay_rows("dead letters", settings, LEADER_KEY, carry, wakeup, poll_interval, relaying or Relaying())


async def relay_batch(connection: Connection, exchange: Exchange) -> int:
    """Publish the oldest and note that; how many. Raises LogUnavailable, and what is in `UNAVAILABLE`."""
    rows = await connection.fetch(
        """WITH oldest AS (
               SELECT * FROM dead_letters WHERE published_at IS NULL ORDER BY created_at, log_offset, epoch LIMIT $1)
           SELECT epoch, log_offset, event_id, routing_key, reason, body
             FROM (SELECT *, sum(length(body)) OVER (ORDER BY created_at, log_offset, epoch) - length(body) AS before
                     FROM oldest) AS added_up
            WHERE before < $2 ORDER BY created_at, log_offset, epoch""",
        _BATCH,
        _BATCH_BYTES,
    )
    if not rows:
        return 0
    await exchange.dead_letter(
        [
            DeadLetter(row["body"], row["reason"], row["routing_key"], row["log_offset"], row["event_id"], row["epoch"])
            for row in rows
        ]
    )
    await connection.execute(
        """UPDATE dead_letters SET published_at = now(), body = substring(body FOR $3)
            WHERE (epoch, log_offset) IN (SELECT * FROM unnest($1::text[], $2::bigint[]))""",
        [row["epoch"] for row in rows],
        [row["log_offset"] for row in rows],
        _KEPT,
    )
    log.warning("dead letters were put away", count=len(rows))
    return len(rows)


async def purge(connection: Connection, retention: float, *, limit: int, most: int = MOST) -> int:
    """Delete up to `limit` rows of published ones: older than `retention` seconds, or beyond the `most` newest.

    None of the last hour, so that a starting gateway finds what it reads again. Returns how many it were.
    """
    result: str = await connection.execute(
        """DELETE FROM dead_letters WHERE ctid = ANY (ARRAY(
               SELECT ctid FROM dead_letters
                WHERE created_at <= greatest(
                          now() - make_interval(secs => $1),
                          least(now() - interval '1 hour', coalesce(
                                (SELECT created_at FROM dead_letters ORDER BY created_at DESC OFFSET $3 LIMIT 1),
                                '-infinity')))
                  AND published_at IS NOT NULL LIMIT $2))""",
        retention,
        limit,
        most,
    )
    return int(result.split()[-1])


async def count(connection: Connection) -> tuple[int, int]:
    """How many there are, and how many of them are not in RabbitMQ yet."""
    row = await connection.fetchrow(
        "SELECT count(*) AS all, count(*) FILTER (WHERE published_at IS NULL) AS waiting FROM dead_letters"
    )
    return row["all"], row["waiting"]


async def newest(connection: Connection, limit: int) -> list[Recorded]:
    """The newest, newest first."""
    rows = await connection.fetch(
        """SELECT epoch || ':' || log_offset AS position, routing_key, reason, substring(body FOR $2) AS body,
                  created_at, published_at
             FROM dead_letters ORDER BY created_at DESC, log_offset DESC LIMIT $1""",
        limit,
        _KEPT,
    )
    return [Recorded(**row) for row in rows]
