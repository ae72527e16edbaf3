"""The database's schema, as numbered SQL files, each with its rollback.

`apply` and `rollback` are synchronous (yoyo drives psycopg) and are called by the admin commands; `pending` is what
a starting gateway or orchestrator asks. Concurrent callers wait for one another on a PostgreSQL advisory lock, which
a dying process gives back by itself, unlike a row in a lock table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psycopg
import yoyo

FOLDER = Path(__file__).parent

# Any constant that nobody else takes: the first eight bytes of the SHA-256 of "cluster-code migrations", as a bigint.
_LOCK = 0x2F1C_5D0E_44A7_9B31


@dataclass(frozen=True, slots=True)
class Status:
    """One migration: its id (`0001.identity`) and whether the database has it."""

    migration: str
    applied: bool


def known() -> list[str]:
    """The ids of all migrations that this version of the code brings, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.sql") if not path.stem.endswith(".rollback"))


async def pending(connection: asyncpg.Connection) -> list[str]:
    """The migrations that the database lacks. A database that is ahead of the code lacks none."""
    if await connection.fetchval("SELECT to_regclass('_yoyo_migration')") is None:
        return known()
    applied = {row[0] for row in await connection.fetch("SELECT migration_id FROM _yoyo_migration")}
    return [migration for migration in known() if migration not in applied]


def status(database_url: str) -> list[Status]:
    """Every known migration with its state, in order. Raises psycopg.OperationalError when there is no database."""
    with _backend(database_url) as (backend, migrations):
        missing = {migration.id for migration in backend.to_apply(migrations)}
        return [Status(migration.id, migration.id not in missing) for migration in migrations]


def apply(database_url: str) -> list[str]:
    """Apply what is missing, each in a transaction; returns what was applied. Safe to call from several processes."""
    with _backend(database_url) as (backend, migrations):
        missing = backend.to_apply(migrations)
        backend.apply_migrations(missing)
        return [migration.id for migration in missing]


def rollback(database_url: str, count: int = 1) -> list[str]:
    """Take the last `count` migrations back, newest first; returns what was taken back."""
    with _backend(database_url) as (backend, migrations):
        last = backend.to_rollback(migrations)[:count]
        backend.rollback_migrations(last)
        return [migration.id for migration in last]


@contextmanager
def _backend(database_url: str) -> Iterator[tuple[Any, Any]]:
    with psycopg.connect(database_url, autocommit=True) as guard:
        guard.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        backend = yoyo.get_backend(_yoyo_url(database_url))
        try:
            # This file lies beside the migrations, and yoyo takes any Python file for one.
            yield backend, yoyo.read_migrations(str(FOLDER)).filter(lambda migration: migration.id in known())
        finally:
            backend.connection.close()


def _yoyo_url(database_url: str) -> str:
    """yoyo chooses its driver by the scheme; psycopg 3 is `postgresql+psycopg`."""
    parts = urlsplit(database_url)
    return urlunsplit(parts._replace(scheme="postgresql+psycopg"))
