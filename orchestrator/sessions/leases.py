"""Leases: who works on a session, and until when nobody else may.

A claim has an id of its own (`lease_owner`), not its process: a row that was lost and claimed again, even by the same
process, can so never be mistaken for the first claim's. All moments are by the database's clock.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from uuid import UUID

from orchestrator.database import Connection
from orchestrator.errors import NotFound
from orchestrator.sessions import record
from orchestrator.sessions.record import COLUMNS, Session


async def claim(connection: Connection, lease: float, limit: int, *, without: Collection[int] = ()) -> list[Session]:
    """Take up to `limit` rows that are due and that nobody works on, for `lease` seconds; longest due first.

    `without`: the providers whose sessions are another's to work on.
    """
    rows = await connection.fetch(
        # ARRAY(…) is computed once, so that LIMIT holds; in IN (…) it may be run for every row.
        f"""UPDATE sessions SET lease_owner = gen_random_uuid(), lease_expires_at = now() + make_interval(secs => $1)
             WHERE id = ANY (ARRAY(
                   SELECT id FROM sessions
                    WHERE (observed_generation < generation OR stale) AND next_attempt_at <= now()
                      AND (lease_expires_at IS NULL OR lease_expires_at <= now())
                      AND coalesce(provider_id, 0) <> ALL ($3::bigint[])
                    ORDER BY next_attempt_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED))
         RETURNING {COLUMNS}""",  # noqa: S608  Our own column names.
        lease,
        limit,
        list(without),
    )
    return [Session(*row) for row in rows]


async def renew(connection: Connection, claims: Collection[tuple[int, UUID]], lease: float) -> dict[UUID, int]:
    """Renew claims `(session id, lease owner)` for `lease` seconds; by owner, the generation that is wanted now.

    A claim that is missing from the answer is lost.
    """
    rows = await connection.fetch(
        """UPDATE sessions SET lease_expires_at = now() + make_interval(secs => $3)
            WHERE id = ANY ($1) AND lease_owner = ANY ($2) RETURNING lease_owner, generation""",
        [session_id for session_id, _ in claims],
        [owner for _, owner in claims],
        lease,
    )
    return {row["lease_owner"]: row["generation"] for row in rows}


async def check(connection: Connection, claims: Collection[tuple[int, UUID]]) -> dict[UUID, int]:
    """The same answer without renewing: what a hint that something changed is worth."""
    rows = await connection.fetch(
        "SELECT lease_owner, generation FROM sessions WHERE id = ANY ($1) AND lease_owner = ANY ($2)",
        [session_id for session_id, _ in claims],
        [owner for _, owner in claims],
    )
    return {row["lease_owner"]: row["generation"] for row in rows}


async def release(connection: Connection, session: Session) -> None:
    """Give a claim back, without a result, and wake whoever may take it. Nothing happens when it is lost already."""
    await connection.execute(
        """WITH released AS (
               UPDATE sessions SET lease_owner = NULL, lease_expires_at = NULL, start_deadline_at = NULL
                WHERE id = $1 AND lease_owner = $2 RETURNING id)
           SELECT pg_notify('sessions', '') FROM released""",
        session.id,
        session.lease_owner,
    )


async def void(connection: Connection, provider_ids: Collection[int] | None = None) -> int:
    """End every lease, or those of the providers' sessions; how many there were.

    For who knows that nobody else works on them: the only orchestrator, or the holder of the providers.
    """
    result: str = await connection.execute(
        "UPDATE sessions SET lease_owner = NULL, lease_expires_at = NULL, start_deadline_at = NULL "
        "WHERE lease_owner IS NOT NULL AND ($1::bigint[] IS NULL OR provider_id = ANY ($1))",
        None if provider_ids is None else list(provider_ids),
    )
    return int(result.split()[-1])


async def settle(connection: Connection, claimed: Session, changes: dict[str, Any], *, release: bool) -> Session | None:
    """Record what a step has found, within the caller's transaction; None when the claim was lost or overtaken.

    Overtaken: another request came meanwhile, of which this result says nothing.
    """
    try:
        now = await record.lock(connection, claimed.id)
    except NotFound:
        return None
    if now.lease_owner != claimed.lease_owner or now.generation != claimed.generation:
        return None
    if release:
        changes = {**changes, "lease_owner": None, "lease_expires_at": None}
    return await record.write(connection, now, **changes)


async def hurry(connection: Connection, session_id: int) -> None:
    """Make a session due now that waits for its next attempt, and wake whoever may take it."""
    await connection.execute(
        """WITH due AS (
               UPDATE sessions SET next_attempt_at = now() WHERE id = $1 AND next_attempt_at > now() RETURNING id)
           SELECT pg_notify('sessions', '') FROM due""",
        session_id,
    )
