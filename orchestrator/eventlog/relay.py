"""Carrying rows of the database into RabbitMQ, by one leader: what the outbox and the dead letters have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from orchestrator.database import UNAVAILABLE, Connection, Wakeup, backoff, leadership
from orchestrator.errors import LogUnavailable
from orchestrator.settings import DatabaseSettings

log = structlog.get_logger("relay")


@dataclass(slots=True)
class Relaying:
    """What a relay is at: whether this process leads, and how many rows it has carried so far."""

    leads: bool = False
    rows: int = 0


async def relay(
    what: str,
    settings: DatabaseSettings,
    leader_key: int,
    carry: Callable[[Connection], Awaitable[int]],
    wakeup: Wakeup,
    poll_interval: float,
    relaying: Relaying,
) -> None:
    """Call `carry` for ever, whenever this process leads: it takes the next batch, and returns how many rows that were.

    When there is nothing left it is called again after `wakeup`, at the latest after `poll_interval` seconds. No
    outage of the database or of the log (LogUnavailable) ends this. Cancelling gives up the lead.
    `relaying` is told how it goes.
    """
    failures = 0
    while True:
        try:
            async with leadership(settings, leader_key) as connection:
                log.info("relaying", what=what)
                failures = 0
                relaying.leads = True
                try:
                    await _lead(what, connection, carry, wakeup, poll_interval, relaying)
                finally:
                    relaying.leads = False
        except UNAVAILABLE as error:
            failures += 1
            log.warning("the lead is lost", what=what, error=str(error) or type(error).__name__, failures=failures)
            await asyncio.sleep(backoff(failures))


async def _lead(
    what: str,
    connection: Connection,
    carry: Callable[[Connection], Awaitable[int]],
    wakeup: Wakeup,
    poll_interval: float,
    relaying: Relaying,
) -> None:
    """Relay through the connection that holds the lead, until it breaks: raises what is in `UNAVAILABLE`."""
    failures = 0
    while True:
        try:
            carried = await carry(connection)
            relaying.rows += carried
            if carried == 0:
                await wakeup.wait(poll_interval)
            failures = 0
        except LogUnavailable as error:
            failures += 1
            log.warning("nothing can be relayed", what=what, error=str(error), failures=failures)
            await asyncio.sleep(backoff(failures))
