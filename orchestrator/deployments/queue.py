"""The queue of deployments, from the side of those who put something into it, or take it back.

Workers take what is due (`leases`). Of one app one is worked on at a time, and of those that wait the newest is next.
Whoever calls opens the transaction. An app's row is locked before those of its deployments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.database import Connection
from orchestrator.deployments import apps, record
from orchestrator.deployments.apps import App
from orchestrator.deployments.contract import Status
from orchestrator.deployments.record import COLUMNS, After, Deployment
from orchestrator.errors import Conflict, NotFound
from orchestrator.text import clean

# Bytes, as `record.write` has them.
_COMMIT_MESSAGE = 1000
# How long a delivery of a webhook is known: senders give up repeating one long before.
_DELIVERIES_KEPT = "7 days"


async def enqueue(
    connection: Connection,
    app_id: int,
    *,
    cause: str,
    user_id: int | None = None,
    branch: str | None = None,
    commit_id: str | None = None,
    commit_message: str = "",
) -> Deployment:
    """Queue a deployment of what the app is now; of another `branch` or of one commit where they are given.

    Raises NotFound, Conflict while the app is being deleted.
    """
    app = await apps.lock_to_change(connection, app_id)
    recipe = "SELECT repo_url, coalesce($7, branch), settings, secrets, $8, $9, NULL, NULL FROM apps WHERE id = $1"
    subject = clean(commit_message, _COMMIT_MESSAGE)
    return await _insert(connection, app, cause, user_id, None, recipe, branch, commit_id, subject)


async def roll_back(connection: Connection, deployment_id: int, *, user_id: int | None) -> Deployment:
    """Queue a deployment of the image and the settings that an earlier one has served with.

    Its domains, which may be another app's by now, and how many images are kept are the app's own of now. Raises
    NotFound, and Conflict, saying why, for one that never served or whose image is gone.
    """
    before = await _found(connection, deployment_id)
    app = await apps.lock_to_change(connection, before.app_id)
    before = await record.lock(connection, deployment_id)
    if before.status not in (Status.LIVE, Status.RETIRED):
        raise Conflict(f"Deployment {before.number} of {app.name} never served: it is {before.status}.")
    if before.image is None or before.image_id is None:
        raise Conflict(
            f"The image of deployment {before.number} of {app.name} was removed: {app.name} keeps the images of "
            f"{app.settings.keep_images} deployments. Deploy its commit instead."
        )
    recipe = """SELECT repo_url, branch, settings || $7::jsonb, secrets, commit_id, commit_message, image, image_id
                  FROM deployments WHERE id = $6"""
    todays = {"domains": app.settings.domains, "keep_images": app.settings.keep_images}
    return await _insert(connection, app, "rollback", user_id, deployment_id, recipe, todays)


async def _insert(
    connection: Connection,
    app: App,
    cause: str,
    user_id: int | None,
    rollback_of: int | None,
    recipe: str,
    *values: Any,
) -> Deployment:
    """`recipe` selects what it is made with, from `repo_url` on. Copied in the database: secrets stay encrypted."""
    number: int = await connection.fetchval(
        "UPDATE apps SET last_number = last_number + 1 WHERE id = $1 RETURNING last_number", app.id
    )
    row = await connection.fetchrow(
        f"""INSERT INTO deployments (app_id, workspace_id, number, cause, user_id, rollback_of, repo_url, branch,
                                     settings, secrets, commit_id, commit_message, image, image_id)
            SELECT $1, $2, $3, $4, $5, $6::bigint, made.* FROM ({recipe}) AS made
            RETURNING {COLUMNS}""",  # noqa: S608  Constants.
        app.id, app.workspace_id, number, cause, user_id, rollback_of, *values,
    )  # fmt: skip
    deployment = Deployment(*row)
    await record.tell(connection, deployment)
    return deployment


async def cancel(connection: Connection, deployment_id: int) -> Deployment:
    """End a deployment: one that waits at once, one that is worked on by its worker, within seconds.

    Asking twice is asking once. Raises NotFound, and Conflict for one that has ended.
    """
    before = await record.lock(connection, deployment_id)
    if before.finished or before.status not in (Status.QUEUED, Status.DEPLOYING):
        raise Conflict(f"Deployment {before.number} of {before.app_name} has ended: it is {before.status}.")
    return await _cancel(connection, before, "Cancelled, as requested.")


async def _cancel(connection: Connection, before: Deployment, message: str) -> Deployment:
    if before.status == Status.DEPLOYING:
        return await record.write(connection, before, cancel_requested=True)
    return await record.write(
        connection,
        before,
        status=Status.CANCELLED.value,
        reason="Cancelled",
        message=message,
        cancel_requested=True,
        finished_at=After(0),
    )


async def delete_app(connection: Connection, app_id: int) -> App:
    """Have a worker remove the app, and end what is under way for it. Asking twice is asking once. Raises NotFound."""
    app = await apps.mark_deleting(connection, app_id)
    rows = await connection.fetch(
        f"""SELECT {COLUMNS} FROM deployments WHERE app_id = $1 AND status IN ('queued', 'deploying')
             ORDER BY id FOR NO KEY UPDATE""",  # noqa: S608  Our own column names.
        app_id,
    )
    for row in rows:
        await _cancel(connection, Deployment(*row), "Cancelled: the app is being deleted.")
    return app


async def list_page(
    connection: Connection, app_id: int, *, status: str | None, page: int, page_size: int
) -> tuple[list[Deployment], int]:
    """One page (from 1) of an app's deployments, newest first, and how many there are in all."""
    source = "FROM deployments WHERE app_id = $1 AND ($2::text IS NULL OR status = $2)"
    rows = await connection.fetch(
        f"SELECT {COLUMNS} {source} ORDER BY id DESC LIMIT $3 OFFSET $4",
        app_id,
        status,
        page_size,
        (page - 1) * page_size,
    )
    total: int = await connection.fetchval(f"SELECT count(*) {source}", app_id, status)
    return [Deployment(*row) for row in rows], total


async def deliver(
    connection: Connection, app_id: int, delivery: str, push: Mapping[str, Any]
) -> tuple[int | None, Deployment | None]:
    """Obey a delivery of a webhook, once: the deployment that it has made, and that of now where it was obeyed now.

    `push` is what `enqueue` takes of the commit. Raises NotFound, Conflict while the app is being deleted.
    """
    # The second of two at once waits here for the first one's end.
    claimed = await connection.fetchval(
        """INSERT INTO hook_deliveries (app_id, delivery) SELECT id, $2 FROM apps WHERE id = $1
           ON CONFLICT (app_id, delivery) DO NOTHING RETURNING true""",
        app_id,
        delivery,
    )
    if not claimed:
        known: int | None = await connection.fetchval(
            "SELECT deployment_id FROM hook_deliveries WHERE app_id = $1 AND delivery = $2", app_id, delivery
        )
        return known, None
    made = await enqueue(connection, app_id, cause="push", **push)
    await connection.execute(
        "UPDATE hook_deliveries SET deployment_id = $3 WHERE app_id = $1 AND delivery = $2", app_id, delivery, made.id
    )
    return made.id, made


async def forget_deliveries(connection: Connection) -> int:
    """Forget deliveries that nobody will repeat any more; how many. For whoever cleans up."""
    status: str = await connection.execute(
        f"DELETE FROM hook_deliveries WHERE at < now() - interval '{_DELIVERIES_KEPT}'"  # noqa: S608  A constant.
    )
    return int(status.split()[-1])


async def _found(connection: Connection, deployment_id: int) -> Deployment:
    found = await record.get(connection, deployment_id)
    if found is None:
        raise NotFound(f"There is no deployment {deployment_id}.")
    return found
