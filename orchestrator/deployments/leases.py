"""Leases: who works on a deployment, or on the removal of an app, and until when nobody else may.

A claim has an id of its own (`lease_owner`), not its worker: a row that was lost and claimed again, even by the same
worker, can so never be mistaken for the first claim's. All moments are by the database's clock. A lease that is given
back leaves no owner behind; an owner whose lease has expired has died.
"""

from __future__ import annotations

from collections.abc import Collection
from uuid import UUID, uuid4

from orchestrator.database import Connection
from orchestrator.deployments import record
from orchestrator.deployments.contract import Status
from orchestrator.deployments.record import COLUMNS, After, Deployment
from orchestrator.errors import ClusterCodeError

SUPERSEDED = "Superseded"
REPLACED = "Replaced"


class LeaseLost(ClusterCodeError):
    """Somebody else may work on it now: nothing more may be written about it."""


async def claim(connection: Connection, lease: float, limit: int, *, queued: bool = True) -> list[Deployment]:
    """Take up to `limit` deployments for `lease` seconds, within the caller's transaction.

    First those that nobody works on any more; then, if `queued`, of each app that has none under way the newest that
    waits, instead of all older ones.
    """
    claimed = await _take_over(connection, lease, limit)
    if queued and len(claimed) < limit:
        claimed += await _begin(connection, lease, limit - len(claimed))
    return claimed


async def _take_over(connection: Connection, lease: float, limit: int) -> list[Deployment]:
    rows = await connection.fetch(
        f"""UPDATE deployments
               SET attempts = attempts + (lease_owner IS NOT NULL)::integer,
                   lease_owner = gen_random_uuid(), lease_expires_at = now() + make_interval(secs => $1)
             WHERE id = ANY (ARRAY(
                   SELECT id FROM deployments
                    WHERE finished_at IS NULL AND status <> 'queued' AND next_attempt_at <= now()
                      AND (lease_expires_at IS NULL OR lease_expires_at <= now())
                    ORDER BY next_attempt_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED))
         RETURNING {COLUMNS}""",  # noqa: S608  Our own column names.
        lease,
        limit,
    )
    return [Deployment(*row) for row in rows]


async def _begin(connection: Connection, lease: float, limit: int) -> list[Deployment]:
    # Who holds the app's row is the only one to begin, and sees what others have begun before.
    apps = await connection.fetch(
        """SELECT apps.id
             FROM apps JOIN (SELECT app_id, min(id) AS first FROM deployments
                              WHERE finished_at IS NULL AND status = 'queued' AND next_attempt_at <= now()
                              GROUP BY app_id) AS waiting ON waiting.app_id = apps.id
            WHERE NOT deleting AND NOT EXISTS (
                  SELECT FROM deployments
                   WHERE app_id = apps.id AND finished_at IS NULL AND status <> 'queued')
            ORDER BY first LIMIT $1 FOR NO KEY UPDATE OF apps SKIP LOCKED""",
        limit,
    )
    if not apps:
        return []
    rows = await connection.fetch(
        f"SELECT {COLUMNS} FROM deployments "  # noqa: S608  Our own column names.
        "WHERE app_id = ANY ($1) AND finished_at IS NULL ORDER BY id FOR NO KEY UPDATE",
        [row["id"] for row in apps],
    )
    unfinished: dict[int, list[Deployment]] = {}
    for row in rows:
        deployment = Deployment(*row)
        unfinished.setdefault(deployment.app_id, []).append(deployment)
    return [
        await _choose(connection, lease, deployments)
        for deployments in unfinished.values()
        if all(deployment.status == Status.QUEUED for deployment in deployments)
    ]


async def _choose(connection: Connection, lease: float, waiting: list[Deployment]) -> Deployment:
    """Begin the newest of an app's waiting deployments; the others will never be."""
    *older, newest = waiting
    for deployment in older:
        await record.write(
            connection,
            deployment,
            status=Status.SUPERSEDED,
            reason=SUPERSEDED,
            message=f"Deployment {newest.number} is newer, and was begun instead.",
            finished_at=After(0),
        )
    return await record.write(
        connection,
        newest,
        status=Status.DEPLOYING,
        reason="",
        message="",
        started_at=After(0),
        lease_owner=uuid4(),
        lease_expires_at=After(lease),
        attempts=newest.attempts + 1,
    )


async def renew(connection: Connection, claims: Collection[tuple[int, UUID]], lease: float) -> dict[UUID, bool]:
    """Renew claims `(deployment id, lease owner)` for `lease` seconds; by owner, whether it shall be cancelled.

    A claim that is missing from the answer is lost.
    """
    rows = await connection.fetch(
        """UPDATE deployments SET lease_expires_at = now() + make_interval(secs => $3)
            WHERE id = ANY ($1) AND lease_owner = ANY ($2) RETURNING lease_owner, cancel_requested""",
        [deployment_id for deployment_id, _ in claims],
        [owner for _, owner in claims],
        lease,
    )
    return {row["lease_owner"]: row["cancel_requested"] for row in rows}


async def check(connection: Connection, claims: Collection[tuple[int, UUID]]) -> dict[UUID, bool]:
    """The same answer without renewing: what a hint that something changed is worth."""
    rows = await connection.fetch(
        "SELECT lease_owner, cancel_requested FROM deployments WHERE id = ANY ($1) AND lease_owner = ANY ($2)",
        [deployment_id for deployment_id, _ in claims],
        [owner for _, owner in claims],
    )
    return {row["lease_owner"]: row["cancel_requested"] for row in rows}


async def hold(connection: Connection, deployment_id: int, owner: UUID) -> Deployment:
    """The row, held against other writers until the caller's transaction ends. Raises LeaseLost."""
    row = await connection.fetchrow(
        f"SELECT {COLUMNS} FROM deployments "  # noqa: S608  Our own column names.
        "WHERE id = $1 AND lease_owner = $2 FOR NO KEY UPDATE",
        deployment_id,
        owner,
    )
    if row is None:
        raise LeaseLost(f"deployment {deployment_id} is another worker's")
    return Deployment(*row)


async def release(connection: Connection, deployment_id: int, owner: UUID) -> None:
    """Give a claim back without a result, for another to take at once; wake whoever may.

    Nothing happens when it is lost already.
    """
    await connection.execute(
        """WITH released AS (
               UPDATE deployments SET lease_owner = NULL, lease_expires_at = NULL,
                      next_attempt_at = now()
                WHERE id = $1 AND lease_owner = $2 RETURNING id)
           SELECT pg_notify('deployments', '') FROM released""",
        deployment_id,
        owner,
    )


async def void(connection: Connection) -> int:
    """End every lease; how many there were. For the only worker there is: those of before have died."""
    counts = [
        await connection.execute(
            f"UPDATE {table} SET lease_expires_at = now() WHERE lease_owner IS NOT NULL"  # noqa: S608  Our own names.
        )
        for table in ("deployments", "apps")
    ]
    return sum(int(result.split()[-1]) for result in counts)


async def owners(connection: Connection, among: Collection[UUID]) -> set[UUID]:
    """Those of the lease owners that hold a deployment."""
    rows = await connection.fetch("SELECT lease_owner FROM deployments WHERE lease_owner = ANY ($1)", list(among))
    return {row["lease_owner"] for row in rows}


async def retire_others(connection: Connection, deployment: Deployment) -> None:
    """Let `deployment`, which the caller's transaction holds, be the one that is live."""
    rows = await connection.fetch(
        f"SELECT {COLUMNS} FROM deployments "  # noqa: S608  Our own column names.
        "WHERE app_id = $1 AND status = 'live' AND id <> $2 ORDER BY id FOR NO KEY UPDATE",
        deployment.app_id,
        deployment.id,
    )
    for row in rows:
        await record.write(
            connection,
            Deployment(*row),
            status=Status.RETIRED,
            reason=REPLACED,
            message=f"Deployment {deployment.number} took its place.",
        )


async def reinstate(connection: Connection, deployment: Deployment) -> None:
    """Let the one before `deployment`, which the caller's transaction has made fail, be live again: it serves still."""
    row = await connection.fetchrow(
        f"SELECT {COLUMNS} FROM deployments "  # noqa: S608  Our own column names.
        "WHERE app_id = $1 AND status = 'retired' AND id < $2 ORDER BY id DESC LIMIT 1 FOR NO KEY UPDATE",
        deployment.app_id,
        deployment.id,
    )
    if row is not None:
        await record.write(connection, Deployment(*row), status=Status.LIVE, reason="", message="")


async def forget_images(connection: Connection, app_id: int, there: Collection[str]) -> None:
    """Say of an app's retired deployments that their images are gone, but for those that are `there`, by id."""
    async with connection.transaction():
        rows = await connection.fetch(
            f"SELECT {COLUMNS} FROM deployments "  # noqa: S608  Our own column names.
            "WHERE app_id = $1 AND finished_at IS NOT NULL AND status <> 'live' AND image IS NOT NULL "
            "AND image_id <> ALL ($2) ORDER BY id FOR NO KEY UPDATE",
            app_id,
            list(there),
        )
        for row in rows:
            await record.write(connection, Deployment(*row), image=None, image_id=None)


async def explain_waiting(connection: Connection, reason: str, message: str) -> None:
    """Tell those that are queued and due why they wait; each once for one reason."""
    async with connection.transaction():
        rows = await connection.fetch(
            f"SELECT {COLUMNS} FROM deployments "  # noqa: S608  Our own column names.
            "WHERE finished_at IS NULL AND status = 'queued' AND next_attempt_at <= now() AND reason <> $1 "
            "ORDER BY id FOR NO KEY UPDATE SKIP LOCKED",
            reason,
        )
        for row in rows:
            await record.write(connection, Deployment(*row), reason=reason, message=message)


async def queued(connection: Connection) -> tuple[int, float]:
    """How many deployments are queued, and for how many seconds the oldest has been."""
    row = await connection.fetchrow(
        """SELECT count(*) AS queued,
                  coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8 AS age
             FROM deployments WHERE finished_at IS NULL AND status = 'queued'"""
    )
    return row["queued"], max(0.0, row["age"])
