"""The outbox: events that a transaction makes go into a table within it, and from there into the log, in order.

At least once: an event is deleted after the log has confirmed it, so that a relay which dies between the two leaves it
to be published again, with the same id, by which readers drop the repeat. Events of one transaction keep their order;
so do those of transactions that wait for one another's row locks, which is how one object's states follow each other.
"""

from __future__ import annotations

import asyncpg
import orjson

from orchestrator.database import Connection, Wakeup
from orchestrator.eventlog.contract import EventLog
from orchestrator.eventlog.relay import Relaying
from orchestrator.eventlog.relay import relay as relay_rows
from orchestrator.events import Event
from orchestrator.settings import DatabaseSettings

# The advisory lock of the one relay that works.
LEADER_KEY = 0x6F7574626F78
# Events published and deleted at once.
_BATCH = 500


async def add(connection: asyncpg.Connection, *events: Event) -> None:
    """Put events into the outbox, in the caller's transaction: they are published if, and after, that is committed.

    An event's id must be a UUID. The order of the arguments is the order in the log.
    """
    if not events:
        return
    await connection.execute(
        """INSERT INTO outbox (event_id, event_type, channel, data)
           SELECT event_id, event_type, channel, data
             FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[])
                  WITH ORDINALITY AS new (event_id, event_type, channel, data, place)
            ORDER BY place""",
        [event.id for event in events],
        [event.event_type for event in events],
        [event.channel for event in events],
        [orjson.dumps(event.data).decode() for event in events],
    )


async def relay(
    settings: DatabaseSettings,
    event_log: EventLog,
    wakeup: Wakeup,
    poll_interval: float,
    relaying: Relaying | None = None,
    *,
    batch: int = _BATCH,
) -> None:
    """Carry the outbox into the log, for ever, whenever this process leads.

    `wakeup` is to be set by NOTIFY on `outbox` (see `database.listen`); without it the table is looked at every
    `poll_interval` seconds. No outage of the database or the log ends it. Cancelling gives up the lead; what
    was published and not deleted yet is published again.
    """

    async def carry(connection: Connection) -> int:
        return await relay_batch(connection, event_log, limit=batch, timeout=settings.timeout)

    await relay_rows("outbox", settings, LEADER_KEY, carry, wakeup, poll_interval, relaying or Relaying())


async def relay_batch(
    connection: asyncpg.Connection, event_log: EventLog, *, limit: int = _BATCH, timeout: float = 5.0
) -> int:
    """Publish the oldest events and delete them; how many. Raises LogUnavailable, and what is in `UNAVAILABLE`."""
    rows = await connection.fetch(
        "SELECT id, event_id, event_type, channel, data FROM outbox ORDER BY id LIMIT $1", limit, timeout=timeout
    )
    if not rows:
        return 0
    # A fragment is written as it is: the JSON is neither parsed nor made again.
    await event_log.publish(
        [
            Event(row["event_type"], row["channel"], orjson.Fragment(row["data"]), str(row["event_id"]))  # type: ignore[arg-type]
            for row in rows
        ]
    )
    await connection.execute(
        "DELETE FROM outbox WHERE id = ANY($1::bigint[])", [row["id"] for row in rows], timeout=timeout
    )
    return len(rows)


async def lag(connection: asyncpg.Connection) -> tuple[int, float]:
    """How many events wait, and for how many seconds the oldest has."""
    row = await connection.fetchrow(
        """SELECT count(*) AS waiting,
                  coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8 AS age
             FROM outbox"""
    )
    return row["waiting"], max(0.0, row["age"])
