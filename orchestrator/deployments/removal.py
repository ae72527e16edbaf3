"""The removal of an app: once nothing of it is under way, all that it has at the engine, then its row."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from uuid import UUID

import structlog

from orchestrator.database import Connection, Pool, backoff
from orchestrator.deployments import apps
from orchestrator.errors import ClusterCodeError, NotFound, ProviderUnavailable

log = structlog.get_logger("deployments")

# Seconds between two attempts, at most.
_PATIENCE = 30.0


@dataclass(frozen=True, slots=True)
class Removal:
    """An app that is to go, claimed."""

    app_id: int
    name: str
    owner: UUID
    attempts: int


async def claim(connection: Connection, lease: float, limit: int) -> list[Removal]:
    """Take up to `limit` apps for `lease` seconds that are to go, and for which nothing is under way any more."""
    rows = await connection.fetch(
        """UPDATE apps
              SET lease_owner = gen_random_uuid(), lease_expires_at = now() + make_interval(secs => $1),
                  attempts = attempts + 1
            WHERE id = ANY (ARRAY(
                  SELECT id FROM apps
                   WHERE deleting AND next_attempt_at <= now()
                     AND (lease_expires_at IS NULL OR lease_expires_at <= now())
                     AND NOT EXISTS (SELECT FROM deployments WHERE app_id = apps.id AND finished_at IS NULL)
                   ORDER BY next_attempt_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED))
        RETURNING id, name, lease_owner, attempts""",
        lease,
        limit,
    )
    return [Removal(*row) for row in rows]


async def renew(connection: Connection, owners: Collection[UUID], lease: float) -> set[UUID]:
    """Renew claims for `lease` seconds; one that is missing from the answer is lost."""
    rows = await connection.fetch(
        """UPDATE apps SET lease_expires_at = now() + make_interval(secs => $2)
            WHERE lease_owner = ANY ($1) RETURNING lease_owner""",
        list(owners),
        lease,
    )
    return {row["lease_owner"] for row in rows}


async def release(connection: Connection, removal: Removal, *, after: float = 0.0, message: str | None = None) -> None:
    """Give a claim back, to be tried again in so many seconds; tell what hinders. The caller opens the transaction."""
    result = await connection.execute(
        """UPDATE apps SET lease_owner = NULL, lease_expires_at = NULL,
                  next_attempt_at = now() + make_interval(secs => $3)
            WHERE id = $1 AND lease_owner = $2""",
        removal.app_id,
        removal.owner,
        after,
    )
    if message is not None and result != "UPDATE 0":
        await apps.tell_waiting(connection, removal.app_id, message)


async def carry_out(pool: Pool, removal: Removal, remove: Callable[[int], Awaitable[None]]) -> bool:
    """Remove what the app has by `remove`, and then the app; False, with the reason told, when that was not possible.

    Raises what is in `UNAVAILABLE`.
    """
    try:
        await remove(removal.app_id)
    except ClusterCodeError as error:
        away = isinstance(error, ProviderUnavailable)
        message = f"Waiting for the Docker engine. {error}" if away else str(error)
        log.warning("app not removed", app=removal.app_id, error=str(error), attempts=removal.attempts)
        async with pool.acquire() as connection, connection.transaction():
            await release(
                connection, removal, after=backoff(removal.attempts, base=0.5, cap=_PATIENCE), message=message
            )
        return False
    async with pool.acquire() as connection, connection.transaction():
        try:
            await apps.remove(connection, removal.app_id)
        except NotFound:
            log.info("app removed by another", app=removal.app_id)
    return True
