"""A deployment's row, and the one way to change it: the row and its events in one transaction.

What a user can see of a deployment changes only here. `write` compares, so that nothing is told that did not change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from orchestrator import events
from orchestrator.database import Connection
from orchestrator.deployments.contract import AppSecrets, AppSettings
from orchestrator.deployments.secrets import Keyring
from orchestrator.errors import NotFound
from orchestrator.eventlog import outbox
from orchestrator.events import Event
from orchestrator.text import clean

# Bytes, of what others have to say: an engine, a repository.
_LONGEST = {"reason": 100, "message": 4096, "commit_message": 1000}


@dataclass(frozen=True, slots=True)
class Deployment:
    """A row of `deployments`. Up to `updated_at` it is what clients see (`public`), the rest is the workers'."""

    id: int
    app_id: int
    app_name: str
    workspace_id: int
    number: int
    cause: str
    # None: nobody signed in, or the user was deleted.
    user_id: int | None
    rollback_of: int | None
    repo_url: str
    branch: str | None
    commit_id: str | None
    commit_message: str
    status: str
    cancel_requested: bool
    step: str
    # {"name", "status": "running|done|failed|cancelled", "seconds": float, None while it runs}, in their order.
    steps: list[dict[str, Any]]
    reason: str
    message: str
    image: str | None
    url: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime

    image_id: str | None
    container: str | None
    lease_owner: UUID | None
    attempts: int

    @property
    def finished(self) -> bool:
        """Nobody works on it any more, and its log is whole. A live one may still be retired."""
        return self.finished_at is not None


_FIELDS = tuple(field.name for field in dataclasses.fields(Deployment))
# For statements whose table is `deployments`, under that name.
COLUMNS = ", ".join(
    "(SELECT name FROM apps WHERE apps.id = deployments.app_id) AS app_name"
    if name == "app_name"
    else f"deployments.{name}"
    for name in _FIELDS
)
_VISIBLE = frozenset(_FIELDS[: _FIELDS.index("updated_at")])


@dataclass(frozen=True, slots=True)
class After:
    """A moment so many seconds from now, by the database's clock."""

    seconds: float


def public(deployment: Deployment) -> dict[str, Any]:
    """The deployment as REST answers it and as events carry it. Moments are in RFC 3339."""
    return {
        "id": deployment.id,
        "app_id": deployment.app_id,
        "app_name": deployment.app_name,
        "workspace_id": deployment.workspace_id,
        "number": deployment.number,
        "cause": deployment.cause,
        "user_id": deployment.user_id,
        "rollback_of": deployment.rollback_of,
        "repo_url": deployment.repo_url,
        "branch": deployment.branch,
        "commit_id": deployment.commit_id,
        "commit_message": deployment.commit_message,
        "status": deployment.status,
        "cancel_requested": deployment.cancel_requested,
        "step": deployment.step,
        "steps": deployment.steps,
        "reason": deployment.reason,
        "message": deployment.message,
        "image": deployment.image,
        "url": deployment.url,
        "created_at": moment(deployment.created_at),
        "started_at": moment(deployment.started_at),
        "finished_at": moment(deployment.finished_at),
        "updated_at": moment(deployment.updated_at),
    }


def moment(at: datetime | None) -> str | None:
    """RFC 3339 in UTC, as every answer and event has it. asyncpg gives all moments in UTC."""
    return None if at is None else at.isoformat().replace("+00:00", "Z")


def begun(steps: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """The steps, once `name` runs. One that ran before, at a worker that died, begins anew, and so do those after."""
    before = [dict(step) for step in steps]
    known = next((place for place, step in enumerate(before) if step["name"] == name), len(before))
    return [*before[:known], {"name": name, "status": "running", "seconds": None}]


def ended(steps: Sequence[Mapping[str, Any]], status: str, seconds: float) -> list[dict[str, Any]]:
    """The steps, once the last has ended as `done`, `failed` or `cancelled` after so many seconds."""
    *before, last = [dict(step) for step in steps]
    return [*before, last | {"status": status, "seconds": round(seconds, 3)}]


async def get(connection: Connection, deployment_id: int) -> Deployment | None:
    """One deployment."""
    row = await connection.fetchrow(f"SELECT {COLUMNS} FROM deployments WHERE id = $1", deployment_id)  # noqa: S608  Our own names.
    return Deployment(*row) if row else None


async def lock(connection: Connection, deployment_id: int) -> Deployment:
    """The row, held against other writers until the caller's transaction ends. Raises NotFound."""
    row = await connection.fetchrow(
        # NO KEY: who only refers to the row (its log) need not wait.
        f"SELECT {COLUMNS} FROM deployments WHERE id = $1 FOR NO KEY UPDATE",  # noqa: S608  Our own column names.
        deployment_id,
    )
    if row is None:
        raise NotFound(f"There is no deployment {deployment_id}.")
    return Deployment(*row)


async def recipe(connection: Connection, deployment: Deployment, keys: Keyring) -> tuple[AppSettings, AppSecrets]:
    """What it is built and run with: the copies that it has of its app's. Raises NotFound, SecretsUnreadable."""
    row = await connection.fetchrow("SELECT settings, secrets FROM deployments WHERE id = $1", deployment.id)
    if row is None:
        raise NotFound(f"There is no deployment {deployment.id}.")
    return settings_of(row["settings"]), keys.decrypt_secrets(row["secrets"], deployment.app_id)


def settings_of(document: Mapping[str, Any]) -> AppSettings:
    """The settings that `dataclasses.asdict` has made JSON of."""
    return AppSettings(**{**document, "domains": tuple(document.get("domains", ()))})


async def write(connection: Connection, before: Deployment, **changes: Any) -> Deployment:
    """Write what differs from `before`, which the caller's transaction has locked; tell it when clients can see it.

    Any column may be given, those that `Deployment` does not have too (`lease_expires_at`, `next_attempt_at`), and
    `After` for moments.
    """
    for text, longest in _LONGEST.items():
        if text in changes:
            changes[text] = clean(changes[text], longest)
    fresh = before.__slots__
    changes = {name: value for name, value in changes.items() if name not in fresh or getattr(before, name) != value}
    if not changes:
        return before
    deployment = Deployment(*await connection.fetchrow(*_update(before.id, changes)))
    if changes.keys() & _VISIBLE:
        await tell(connection, deployment)
    return deployment


async def tell(connection: Connection, *deployments: Deployment) -> None:
    """Put deployments as they are now into the outbox, for all who may follow them."""
    told = []
    for deployment in deployments:
        data = public(deployment)
        channels = [
            events.deployment_channel(deployment.id),
            *await own_channel(connection, deployment.user_id, deployment.workspace_id),
            events.workspace_channel(deployment.workspace_id),
        ]
        told += [Event(events.DEPLOYMENT_STATUS, channel, data) for channel in channels]
    await outbox.add(connection, *told)


async def own_channel(connection: Connection, user_id: int | None, workspace_id: int) -> list[str]:
    """That of the user who made something in a workspace; none once the user may not see it any more."""
    may_see = await connection.fetchval(
        """SELECT is_admin OR EXISTS (SELECT FROM workspace_members WHERE workspace_id = $2 AND user_id = $1)
             FROM users WHERE id = $1""",
        user_id,
        workspace_id,
    )
    return [events.user_channel(user_id)] if user_id is not None and may_see else []


def _update(deployment_id: int, changes: Mapping[str, Any]) -> list[Any]:
    """The statement for these changes, and its values."""
    columns, values = [], []
    for number, (name, value) in enumerate(changes.items(), start=2):
        if isinstance(value, After):
            columns.append(f"{name} = clock_timestamp() + make_interval(secs => ${number})")
            values.append(value.seconds)
        else:
            columns.append(f"{name} = ${number}")
            values.append(value)
    if changes.keys() & _VISIBLE:
        columns.append("updated_at = clock_timestamp()")
    statement = f"UPDATE deployments SET {', '.join(columns)} WHERE id = $1 RETURNING {COLUMNS}"  # noqa: S608  Our own names.
    return [statement, deployment_id, *values]
