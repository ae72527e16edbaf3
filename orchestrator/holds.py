"""Who holds what only one orchestrator may have open: a local provider, whose sessions live in its process.

An advisory lock of PostgreSQL for each, kept on one connection: when its process dies, the kernel closes the
connection, PostgreSQL gives the locks back, and another process takes them at its next look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import structlog

from orchestrator.database import UNAVAILABLE, Connection, connect
from orchestrator.settings import DatabaseSettings

log = structlog.get_logger("holds")

# The first key of the locks, beside the number of what is held: no other lock of ours has two.
_CLASS = 0x6C6F6361
# Seconds after a lost connection in which only those that held something before try for it. PostgreSQL was started
# again, for all: whoever runs sessions shall go on running them.
_COURTESY = 5.0
# Seconds after which a server that does not answer has lost us. More than for other statements: what hangs on it are
# running sessions.
_DEADLINE = 15.0


class Holds:
    """What this process holds. `look` regularly, `close` at the end."""

    def __init__(self, settings: DatabaseSettings) -> None:
        self._settings = settings
        self._connection: Connection | None = None
        self._looking = asyncio.Lock()
        # What the connection holds now, and what was held when that was last known.
        self._locked: set[int] = set()
        self._held: frozenset[int] = frozenset()
        # The loop time until which the courtesy lasts.
        self._courteous_until = 0.0

    async def look(self, wanted: Collection[int]) -> frozenset[int]:
        """Take what is wanted and free, and give back what is wanted no more; the numbers that are held now.

        Raises what is in `database.UNAVAILABLE`: then nobody knows who holds what, and whatever was held is to be used
        on. Numbers are 32 bits long.
        """
        async with self._looking:
            connection = self._connection
            if connection is None or connection.is_closed():
                connection = await self._connect()
            missing = set(wanted) - self._locked
            if asyncio.get_running_loop().time() < self._courteous_until:
                missing &= self._held
            try:
                # Also when nothing is missing: this is how a lost connection shows.
                self._locked |= await _each(connection, "pg_try_advisory_lock", missing)
                if surplus := self._locked - set(wanted):
                    self._locked -= await _each(connection, "pg_advisory_unlock", surplus)
            except UNAVAILABLE:
                # Whether the server still knows of it cannot be told: the next look begins with a new one.
                connection.terminate()
                raise
            self._held = frozenset(self._locked)
            return self._held

    def close(self) -> None:
        """Give everything back. Idempotent."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
        self._locked.clear()
        self._held = frozenset()

    async def _connect(self) -> Connection:
        again = self._connection is not None
        self._locked.clear()
        self._connection = await connect(self._settings, name="cluster-code holds")
        if again:
            self._courteous_until = asyncio.get_running_loop().time() + _COURTESY
            log.warning("the connection that holds what is ours was lost; taking it again", held=sorted(self._held))
        return self._connection


async def take(connection: Connection, number: int) -> bool:
    """Hold one for as long as the connection lives, unless it is held: whether it is ours now."""
    return number in await _each(connection, "pg_try_advisory_lock", [number])


async def _each(connection: Connection, function: str, numbers: Collection[int]) -> set[int]:
    """The numbers for whose locks the function says true."""
    rows = await connection.fetch(
        f"SELECT number FROM unnest($1::int[]) AS number WHERE {function}($2, number)",  # noqa: S608  Our own names.
        sorted(numbers),
        _CLASS,
        timeout=_DEADLINE,
    )
    return {row["number"] for row in rows}
