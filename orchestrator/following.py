"""The output of sessions whose provider keeps it: of all orchestrators one at a time follows that of each provider."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic

import structlog

from orchestrator.database import UNAVAILABLE, Connection, backoff, leadership
from orchestrator.providers.contract import Follower, Journal
from orchestrator.settings import DatabaseSettings

log = structlog.get_logger("following")

# The advisory locks of those that follow: the number of the provider is added.
LEADER_KEY = 0x666F6C6C_00000000
# Seconds after which a lead counts as having gone well.
_WELL = 60.0


@dataclass(frozen=True, slots=True)
class Following:
    """Hands a provider's output on to the journal, while this orchestrator leads."""

    settings: DatabaseSettings
    journal: Journal

    async def run(self, provider_id: int, name: str, provider: Follower) -> None:
        """Wait for the lead, and follow, for ever. Cancelling gives up the lead."""
        failures = 0
        while True:
            began = monotonic()
            try:
                async with leadership(self.settings, LEADER_KEY + provider_id) as connection:
                    began = monotonic()
                    log.info("following output", provider=name)
                    await self._lead(connection, provider)
            except UNAVAILABLE as error:
                log.warning("output is not followed", provider=name, error=str(error) or type(error).__name__)
            except Exception:
                log.exception("following output broke", provider=name)
            failures = failures + 1 if monotonic() - began < _WELL else 1
            await asyncio.sleep(backoff(failures))

    async def _lead(self, connection: Connection, provider: Follower) -> None:
        """Follow until the connection ends: from then on another may lead."""
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        if connection.is_closed():
            return
        tasks = [
            asyncio.create_task(provider.follow(self.journal), name="follow output"),
            asyncio.create_task(lost.wait(), name="lead over output"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
