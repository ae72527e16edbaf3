"""A session's row, and the one way to change it: the row, its history and its events in one transaction.

What a user can see of a session changes only here. `write` compares, so that nothing is told that did not change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from orchestrator import events
from orchestrator.database import Connection
from orchestrator.errors import NotFound
from orchestrator.eventlog import outbox
from orchestrator.events import Event
from orchestrator.providers.contract import Endpoint, Endpoints, SessionRef
from orchestrator.sessions.state import Desired, Status
from orchestrator.text import clean

# Bytes. What a provider has to say may be a build's whole output.
MAX_MESSAGE = 4096


@dataclass(frozen=True, slots=True)
class Session:
    """A row of `sessions`. Up to `updated_at` it is what clients see (`public`), the rest is the orchestrator's."""

    id: int
    project_uuid: UUID
    project_id: int
    workspace_id: int
    # None: the user was deleted.
    user_id: int | None
    provider: str
    machine_config: str
    namespace: str
    container_name: str
    desired: str
    status: str
    reason: str
    message: str
    stale: bool
    ip_address: str | None
    preview_url: str | None
    preview_path: str | None
    chat_url: str | None
    chat_path: str | None
    vscode_url: str | None
    vscode_path: str | None
    expires_at: datetime
    created_at: datetime
    updated_at: datetime

    provider_id: int
    generation: int
    observed_generation: int
    lease_owner: UUID | None
    attempts: int
    start_deadline_at: datetime | None

    @property
    def ref(self) -> SessionRef:
        """How its provider finds it."""
        return SessionRef(self.id, self.namespace, self.container_name, self.workspace_id)

    @property
    def outstanding(self) -> bool:
        """What is wanted was not carried out yet."""
        return self.observed_generation < self.generation


_FIELDS = tuple(field.name for field in dataclasses.fields(Session))
COLUMNS = ", ".join(_FIELDS)
# What the history tells, and what makes an event.
_HISTORY = frozenset({"status", "reason", "message"})
_VISIBLE = frozenset(_FIELDS[: _FIELDS.index("updated_at")])


@dataclass(frozen=True, slots=True)
class After:
    """A moment so many seconds from now, by the database's clock."""

    seconds: float


def public(session: Session) -> dict[str, Any]:
    """The session as REST answers it and as events carry it: values that JSON knows, moments in RFC 3339."""
    return {
        "id": session.id,
        "project_uuid": str(session.project_uuid),
        "project_id": session.project_id,
        "workspace_id": session.workspace_id,
        "user_id": session.user_id,
        "provider": session.provider,
        "machine_config": session.machine_config,
        "namespace": session.namespace,
        "container_name": session.container_name,
        "desired": session.desired,
        "status": session.status,
        "reason": session.reason,
        "message": session.message,
        "stale": session.stale,
        "ip_address": session.ip_address,
        "preview_url": session.preview_url,
        "preview_path": session.preview_path,
        "chat_url": session.chat_url,
        "chat_path": session.chat_path,
        "vscode_url": session.vscode_url,
        "vscode_path": session.vscode_path,
        "expires_at": moment(session.expires_at),
        "created_at": moment(session.created_at),
        "updated_at": moment(session.updated_at),
    }


def moment(at: datetime) -> str:
    """RFC 3339 in UTC, as every answer and event has it. asyncpg gives all moments in UTC."""
    return at.isoformat().replace("+00:00", "Z")


def endpoint_columns(endpoints: Endpoints | None) -> dict[str, str | None]:
    """The columns that say where a session is reached; all None when it is not."""
    reached = endpoints or Endpoints()
    columns: dict[str, str | None] = {"ip_address": reached.ip_address}
    for name in ("preview", "chat", "vscode"):
        endpoint: Endpoint | None = getattr(reached, name)
        columns[f"{name}_url"] = endpoint.url if endpoint else None
        columns[f"{name}_path"] = endpoint.path if endpoint else None
    return columns


async def lock(connection: Connection, session_id: int) -> Session:
    """The row, held against other writers until the caller's transaction ends. Raises NotFound."""
    if not (found := await lock_all(connection, [session_id])):
        raise NotFound(f"There is no session {session_id}.")
    return found[0]


async def lock_all(connection: Connection, session_ids: Collection[int]) -> list[Session]:
    """Those of the rows that there are, held in the order of their ids."""
    rows = await connection.fetch(
        # NO KEY: who only refers to the row (its log lines) need not wait.
        f"SELECT {COLUMNS} FROM sessions WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE",  # noqa: S608  Our own column names.
        list(session_ids),
    )
    return [Session(*row) for row in rows]


async def write(connection: Connection, before: Session, **changes: Any) -> Session:
    """Write what differs from `before`, which the caller's transaction has locked; tell it when clients can see it."""
    session, visible = await write_silently(connection, before, **changes)
    if visible:
        await tell(connection, session)
    return session


async def write_silently(connection: Connection, before: Session, **changes: Any) -> tuple[Session, bool]:
    """The same, but left to the caller to tell; and whether there is something to tell."""
    for text in ("reason", "message"):
        if text in changes:
            changes[text] = clean(changes[text], MAX_MESSAGE)
    fresh = before.__slots__
    changes = {name: value for name, value in changes.items() if name not in fresh or getattr(before, name) != value}
    if not changes:
        return before, False
    statement, values = _update(changes)
    session = Session(*await connection.fetchrow(statement, before.id, *values))
    return session, bool(changes.keys() & _VISIBLE)


async def tell(connection: Connection, *sessions: Session) -> None:
    """Put sessions as they are now into the outbox, for all who may follow them."""
    told = []
    for session in sessions:
        data = public(session)
        channels = [events.session_channel(session.id), events.workspace_channel(session.workspace_id)]
        if session.user_id is not None:
            channels.insert(1, events.user_channel(session.user_id))
        told += [Event(events.SESSION_STATUS, channel, data) for channel in channels]
    await outbox.add(connection, *told)


def _update(changes: dict[str, Any]) -> tuple[str, list[Any]]:
    """The statement for these changes: one round trip for the row and its history."""
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
    update = f"UPDATE sessions SET {', '.join(columns)} WHERE id = $1 RETURNING {COLUMNS}"  # noqa: S608  Our own names.
    if not changes.keys() & _HISTORY:
        return update, values
    history = "INSERT INTO session_events (session_id, status, reason, message) SELECT id, status, reason, message"
    both = f"WITH changed AS ({update}), told AS ({history} FROM changed) SELECT {COLUMNS} FROM changed"  # noqa: S608  Our own names.
    return both, values


def statuses(session: Session) -> tuple[Desired, Status]:
    """What is wanted and what is known, as the state machine takes them."""
    return Desired(session.desired), Status(session.status)
