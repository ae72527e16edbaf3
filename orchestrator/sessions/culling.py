"""What time ends: sessions that have expired, and rows that nobody needs any more. One leader does it, in batches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from auth import refresh, revocation, tokens
from orchestrator.database import Connection
from orchestrator.errors import NotFound
from orchestrator.eventlog import dead_letters
from orchestrator.sessions import store
from orchestrator.sessions.state import Desired
from orchestrator.settings import OrchestratorSettings

log = structlog.get_logger("culling")

# Rows in one statement: short locks, and other statements in between.
BATCH = 500
# Seconds that an Idempotency-Key is remembered.
_IDEMPOTENCY = 86_400.0
_EXPIRED = ("Expired", "The session's time was up, so it is being deleted. Make a new one for the project.")


async def cull(connection: Connection, settings: OrchestratorSettings) -> dict[str, int]:
    """Do all of it once; how many rows of each kind that concerned. Opens its transactions itself."""
    counts = {
        "expired": await expire(connection),
        "sessions": await _in_batches(lambda: _purge_sessions(connection, settings.deleted_retention)),
        "idempotency_keys": await _in_batches(lambda: _purge_idempotency_keys(connection)),
        "refresh_tokens": await refresh.purge(connection),
        "short_tokens": await tokens.purge(connection),
        "revoked_tokens": await revocation.purge(connection),
        "dead_letters": await _in_batches(
            lambda: dead_letters.purge(connection, settings.dead_letter_retention, limit=BATCH)
        ),
    }
    if any(counts.values()):
        log.info("culled", **counts)
    return counts


async def expire(connection: Connection) -> int:
    """Ask for the deletion of sessions whose time is up, saying so; how many."""
    expired = 0
    while rows := await connection.fetch(
        """SELECT id FROM sessions WHERE expires_at <= now() AND status <> 'deleted' AND desired <> 'deleted'
            ORDER BY expires_at LIMIT $1""",
        BATCH,
    ):
        for row in rows:
            async with connection.transaction():
                try:
                    await store.request(connection, row["id"], Desired.DELETED, because=_EXPIRED)
                except NotFound:
                    continue
            expired += 1
    return expired


async def _in_batches(purge: Callable[[], Awaitable[int]]) -> int:
    total = 0
    while True:
        count = await purge()
        total += count
        if count < BATCH:
            return total


async def _purge_sessions(connection: Connection, retention: float) -> int:
    """Their history and output go with them."""
    result: str = await connection.execute(
        """DELETE FROM sessions WHERE id = ANY (ARRAY(
               SELECT id FROM sessions
                WHERE status = 'deleted' AND updated_at < now() - make_interval(secs => $1)
                ORDER BY updated_at LIMIT $2))""",
        retention,
        BATCH,
    )
    return int(result.split()[-1])


async def _purge_idempotency_keys(connection: Connection) -> int:
    result: str = await connection.execute(
        """DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
               SELECT ctid FROM idempotency_keys WHERE created_at < now() - make_interval(secs => $1) LIMIT $2))""",
        _IDEMPOTENCY,
        BATCH,
    )
    return int(result.split()[-1])
