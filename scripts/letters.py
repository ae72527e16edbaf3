"""`dead-letters`: what other services have published that was no event."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.eventlog import dead_letters
from scripts import target

if TYPE_CHECKING:
    from environs import Env


async def newest(env: Env, limit: int) -> list[dead_letters.Recorded]:
    """The newest, newest first."""
    async with target.connection(env) as connection:
        return await dead_letters.newest(connection, limit)
