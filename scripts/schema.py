"""`migrate:up`, `migrate:down`, `migrate:status`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import psycopg

import migrations
from orchestrator.errors import SettingsError
from scripts import target

if TYPE_CHECKING:
    from environs import Env

T = TypeVar("T")


async def up(env: Env) -> list[str]:
    """Apply what is missing; safe while others do the same. Returns the ids, in order."""
    return await _on_database(env, migrations.apply)


async def down(env: Env, count: int) -> list[str]:
    """Take the last `count` migrations back, with what is in their tables. Returns the ids, newest first."""
    return await _on_database(env, lambda url: migrations.rollback(url, count))


async def status(env: Env) -> list[migrations.Status]:
    """Every migration with its state."""
    return await _on_database(env, migrations.status)


async def _on_database(env: Env, work: Callable[[str], T]) -> T:
    async with target.database(env) as settings:
        try:
            return await asyncio.to_thread(work, settings.url)
        except (psycopg.OperationalError, psycopg.ProgrammingError) as error:
            raise SettingsError(f"DATABASE_URL: {_one_line(error)}") from error


def _one_line(error: psycopg.Error) -> str:
    """libpq explains in several lines; the first names the cause."""
    return next(iter(str(error).splitlines()), type(error).__name__).strip()
