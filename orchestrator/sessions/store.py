"""Sessions as the edge sees them: make one, ask for another state, read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import asyncpg
import orjson

from orchestrator import machines
from orchestrator.database import Connection
from orchestrator.errors import Conflict, Invalid
from orchestrator.sessions import leases, placement, record
from orchestrator.sessions.record import COLUMNS, Session, public
from orchestrator.sessions.state import Desired, Status, requested

if TYPE_CHECKING:
    from auth.permissions import Identity
    from auth.projects import Project

__all__ = [
    "LogRecord", "Output", "Page", "Session", "SessionEvent", "change_machine", "count_by_status", "create",
    "events_page", "get", "list_page", "logs", "logs_after", "logs_begin", "pods", "public",
    "request",
]  # fmt: skip

# A total is counted up to here, and pages end here: what is beyond is found by filters.
COUNTED = 10_000
_LIVE = [status.value for status in Status if status is not Status.DELETED]
# Seconds. A delete mostly takes less.
_WHILE_DELETING = 2
# Why a session runs on with what it ran with before: `providers.contract.RolledBack`.
_ROLLED_BACK = "RolledBack"
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """One page of a list. `total` is exact, or, when there are more, `COUNTED`."""

    items: list[Item]
    total: int
    total_is_exact: bool


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """One line of a session's history."""

    id: int
    session_id: int
    at: datetime
    status: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One line of a session's output, as it is kept."""

    id: int
    session_id: int
    at: datetime
    service: str
    stream: str
    line: str


@dataclass(frozen=True, slots=True)
class Output:
    """Some of a session's lines, and its status when they were read.

    `kept`: the line after which they come is still there. When it is not, more may have been pruned behind it.
    """

    status: str
    kept: bool
    records: list[LogRecord]


async def create(
    connection: Connection,
    *,
    project: Project,
    user_id: int,
    provider: str | None,
    machine_config: str | None,
    by: Identity | None = None,
) -> tuple[Session, bool]:
    """The project's session, and whether it was made now; within the caller's transaction.

    Of any number of concurrent calls one makes it and the others answer it. `by` is who must be permitted to use the
    machine config (None: nobody). Raises Invalid for a provider, machine config or user that does not exist, or that
    `by` may not see, Forbidden for one that `by` may use elsewhere only, Conflict while the project's old session is
    being deleted and when as many sessions run with the machine config as may.
    """
    asker = placement.asker(by, project.workspace_id)
    while True:
        if (existing := await _active(connection, project.id)) is not None:
            return existing, False
        try:
            placed = await placement.place(connection, provider, machine_config, asker)
        except Conflict:
            # The last seat may have gone to a concurrent call for the same project.
            if (existing := await _active(connection, project.id)) is not None:
                return existing, False
            raise
        # None: another call has just made it; this statement has waited for that one's commit.
        if (session := await _insert(connection, project, user_id, placed)) is not None:
            await record.tell(connection, session)
            return session, True


async def _active(connection: Connection, project_id: int) -> Session | None:
    row = await connection.fetchrow(
        f"SELECT {COLUMNS} FROM sessions WHERE project_id = $1 AND status <> 'deleted'",  # noqa: S608  Our own names.
        project_id,
    )
    if row is None:
        return None
    session = Session(*row)
    if session.desired == Desired.DELETED:
        raise Conflict(
            f"The project's session {session.id} is being deleted; a new one can be made when it is gone.",
            retry_after=_WHILE_DELETING,
        )
    return session


async def _insert(
    connection: Connection, project: Project, user_id: int, placed: placement.Placement
) -> Session | None:
    session_id: int = await connection.fetchval("SELECT nextval(pg_get_serial_sequence('sessions', 'id'))")
    try:
        row = await connection.fetchrow(
            f"""WITH made AS (
                    INSERT INTO sessions
                           (id, project_id, project_uuid, workspace_id, user_id, provider_id, provider, machine_config,
                            machine, namespace, container_name, reason, message, expires_at)
                    OVERRIDING SYSTEM VALUE
                    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, now() + interval '1 year')
                    ON CONFLICT (project_id) WHERE status <> 'deleted' DO NOTHING
                    RETURNING {COLUMNS}),
                told AS (INSERT INTO session_events (session_id, status, reason, message)
                         SELECT id, status, reason, message FROM made)
                SELECT {COLUMNS} FROM made""",  # noqa: S608  Our own column names.
            session_id, project.id, project.uuid, project.workspace_id, user_id, placed.provider_id, placed.provider,
            placed.machine_config, placed.machine, placement.namespace(project.uuid),
            placement.container_name(session_id), "Created", "Waiting for its turn to start.",
        )  # fmt: skip
    except asyncpg.ForeignKeyViolationError as error:
        raise _missing(error, project, user_id, placed) from error
    return Session(*row) if row else None


def _missing(error: Any, project: Project, user_id: int, placed: placement.Placement) -> Invalid:
    """What a session refers to was removed meanwhile, or was never there."""
    constraint = error.constraint_name or ""
    if "user" in constraint:
        return Invalid(f"There is no user {user_id}.", field="user_id")
    if "provider" in constraint:
        return Invalid(f"The provider {placed.provider!r} has just been removed.", field="provider")
    return Invalid(f"The project {project.uuid} has just been deleted.", field="project_uuid")


async def get(connection: Connection, session_id: int) -> Session | None:
    """One session; a deleted one too, until it is purged."""
    row = await connection.fetchrow(f"SELECT {COLUMNS} FROM sessions WHERE id = $1", session_id)  # noqa: S608  Our own names.
    return Session(*row) if row else None


_REQUESTED = {
    Desired.RUNNING: ("StartRequested", "Waiting for its turn to start."),
    Desired.STOPPED: ("StopRequested", "Stopping, as requested."),
    Desired.DELETED: ("DeleteRequested", "Deleting, as requested."),
}


async def request(
    connection: Connection,
    session_id: int,
    desired: str,
    *,
    restart: bool = False,
    because: tuple[str, str] | None = None,
) -> Session:
    """Ask for a state (`running`, `stopped`, `deleted`), within the caller's transaction. Asking twice is asking once.

    `restart`: what runs is stopped first. `because`: a reason and a message in place of "requested". Raises NotFound,
    and Conflict when it is being deleted or gone, and when it is to run and as many do with its machine config as may;
    deleting what is deleted succeeds.
    """
    wish = Desired(desired)
    before = await record.lock(connection, session_id)
    wanted, status = record.statuses(before)
    if wanted is Desired.DELETED:
        if wish is not Desired.DELETED:
            raise _gone(before)
        # Somebody is waiting for it: do not let a back-off stand in the way.
        await leases.hurry(connection, session_id)
        return before
    shown = requested(wanted, status, wish, restart=restart)
    if shown is None:
        return before
    if wish is Desired.RUNNING and wanted is not Desired.RUNNING:
        await machines.take_seat(connection, before.machine_config)
    because = because or (("RestartRequested", "Restarting, as requested.") if restart else _REQUESTED[wish])
    endpoints = {} if wish is Desired.RUNNING and not restart else record.endpoint_columns(None)
    return await _want(connection, before, wish, shown, because, **endpoints)


async def change_machine(
    connection: Connection, session_id: int, machine_config: str, by: Identity | None = None
) -> tuple[Session, bool]:
    """Give the session another machine config of its provider, as that is now; within the caller's transaction.

    One that is to run is restarted with it, and the second value says that this is still to be done; one that is
    stopped takes it at its next start. One that has it already is left alone, unless it could not be run with it.
    Raises NotFound, Invalid for a machine config that its provider does not have, or that `by` may not see, naming
    those it has, Forbidden for one that `by` may use elsewhere only, Conflict when it is being deleted or gone, and
    when it is to run and as many do with the machine config as may.
    """
    before = await record.lock(connection, session_id)
    wanted, status = record.statuses(before)
    if wanted is Desired.DELETED:
        raise _gone(before)
    asker = placement.asker(by, before.workspace_id)
    machine = (await machines.named(connection, before.provider, machine_config, asker)).snapshot()
    known = await connection.fetchval("SELECT machine FROM sessions WHERE id = $1", session_id)
    if machine == known and status is not Status.ERROR and before.reason != _ROLLED_BACK:
        return before, before.outstanding and wanted is Desired.RUNNING
    # One that is stopped takes its seat when it starts.
    if wanted is Desired.RUNNING and machine_config != before.machine_config:
        await machines.take_seat(connection, machine_config)
    changes: dict[str, Any] = {"machine_config": machine_config, "machine": machine}
    if wanted is Desired.STOPPED:
        return await record.write(connection, before, **changes), False
    shown = requested(wanted, status, Desired.RUNNING, restart=True) or status
    because = ("MachineConfigChanged", f"Restarting with the machine config {machine_config}, as requested.")
    changes |= record.endpoint_columns(None)
    return await _want(connection, before, Desired.RUNNING, shown, because, **changes), True


async def _want(
    connection: Connection, before: Session, wish: Desired, shown: Status, because: tuple[str, str], **changes: Any
) -> Session:
    """Have orchestrators work on what is wanted now, from the beginning."""
    return await record.write(
        connection,
        before,
        desired=wish.value,
        generation=before.generation + 1,
        status=shown.value,
        reason=because[0],
        message=because[1],
        attempts=0,
        start_deadline_at=None,
        next_attempt_at=record.After(0),
        **changes,
    )


def _gone(session: Session) -> Conflict:
    gone = "deleted" if session.status == Status.DELETED else "being deleted"
    return Conflict(f"The session {session.id} is {gone}: make a new one for its project.")


async def list_page(
    connection: Connection,
    *,
    workspace_ids: list[int] | None,
    user_id: int | None = None,
    project_id: int | None = None,
    status: str | None = None,
    page: int,
    page_size: int,
) -> Page[Session]:
    """Sessions, newest first; deleted ones only when `status` asks for them. `workspace_ids` None: of all workspaces.

    Takes the same time however many sessions there are (`docs/performance.md`). Raises Invalid for a page beyond the
    first 10,000.
    """
    _within(page, page_size)
    filters = {"user_id": user_id, "project_id": project_id}
    given = {name: value for name, value in filters.items() if value is not None}
    statement, values = list_query(workspace_ids, given, status, page=page, page_size=page_size)
    rows = await connection.fetch(statement, *values)
    total = rows[0]["total"]
    items = [Session(*list(row)[1:]) for row in rows if row["id"] is not None]
    return Page(items, min(total, COUNTED), total <= COUNTED)


def list_query(
    workspace_ids: list[int] | None, filters: Mapping[str, int], status: str | None, *, page: int, page_size: int
) -> tuple[str, list[Any]]:
    """The statement of `list_page` and its values: the total, then the row's columns; one row of NULLs for none."""
    keys, values = _keys(workspace_ids, filters, status)
    values += [page * page_size, page_size, (page - 1) * page_size, COUNTED + 1]
    last = len(values)
    # The inner LIMITs bound what is read by key, the outer ones what is merged.
    statement = f"""
        SELECT counted.total, found.*
          FROM (SELECT count(*) AS total FROM (SELECT 1 FROM {keys.format(f"${last}")} LIMIT ${last}) s) counted
          LEFT JOIN LATERAL (
               SELECT {COLUMNS} FROM sessions WHERE id = ANY (ARRAY(
                      SELECT key.id FROM {keys.format(f"${last - 3}")}
                       ORDER BY key.created_at DESC, key.id DESC LIMIT ${last - 2} OFFSET ${last - 1}))
               ) found ON true
         ORDER BY found.created_at DESC, found.id DESC"""  # noqa: S608  Our own column names; every value is a parameter.
    return statement, values


def _keys(workspace_ids: list[int] | None, filters: Mapping[str, int], status: str | None) -> tuple[str, list[Any]]:
    """The FROM clause that yields `key.id`, by index alone; `{}` in it is where each key's LIMIT goes."""
    sources: list[str] = []
    conditions: list[str] = []
    values: list[Any] = []
    if workspace_ids is not None:
        values.append(sorted(set(workspace_ids)))
        sources.append(f"unnest(${len(values)}::bigint[]) AS workspace (id)")
        conditions.append("workspace_id = workspace.id")
    for name, value in filters.items():
        values.append(value)
        conditions.append(f"{name} = ${len(values)}::bigint")
    # Every index holds the status before the id, so that one serves both kinds of list: a probe for each status.
    values.append(_LIVE if status is None else [status])
    sources.append(f"unnest(${len(values)}::text[]) AS state (name)")
    conditions.append("status = state.name")
    # Ordered for the count too: else the planner may read the whole table for the rows of a rare status.
    rows = f"""(SELECT id, created_at FROM sessions WHERE {" AND ".join(conditions)}
                 ORDER BY created_at DESC, id DESC LIMIT {{}}) AS key"""  # noqa: S608  Our own column names.
    return " CROSS JOIN ".join([*sources, f"LATERAL {rows}"]), values


def _within(page: int, page_size: int) -> None:
    if page * page_size > COUNTED:
        raise Invalid(
            f"Pages end at the {COUNTED:,}th entry: narrow the list by filters instead of reading on.", field="page"
        )


async def events_page(connection: Connection, session_id: int, *, page: int, page_size: int) -> Page[SessionEvent]:
    """A session's history, newest first. Raises Invalid for a page beyond the first 10,000."""
    _within(page, page_size)
    rows = await connection.fetch(
        """SELECT id, session_id, at, status, reason, message FROM session_events
            WHERE session_id = $1 ORDER BY id DESC LIMIT $2 OFFSET $3""",
        session_id,
        page_size,
        (page - 1) * page_size,
    )
    total = await connection.fetchval(
        "SELECT count(*) FROM (SELECT 1 FROM session_events WHERE session_id = $1 LIMIT $2) s", session_id, COUNTED + 1
    )
    return Page([SessionEvent(*row) for row in rows], min(total, COUNTED), total <= COUNTED)


# Of the rows of `session_logs`: one session's, after a line, of one service or any, from a moment on or ever.
_LINES = """session_id = $1 AND id > $2 AND ($3::text IS NULL OR service = $3)
            AND ($4::timestamptz IS NULL OR at >= $4)"""


async def logs(
    connection: Connection,
    session_id: int,
    *,
    tail: int,
    after: int | None = None,
    service: str | None = None,
    since: datetime | None = None,
) -> list[LogRecord]:
    """A session's output in its order: the last `tail` lines, or the first `tail` whose id is greater than `after`.

    Only those of `service`, and those written at `since` or later.
    """
    order = "DESC" if after is None else "ASC"
    rows = await connection.fetch(
        f"""SELECT id, session_id, at, service, stream, line FROM session_logs
             WHERE {_LINES} ORDER BY id {order} LIMIT $5""",  # noqa: S608  Constants.
        session_id,
        after or 0,
        service,
        since,
        tail,
    )
    records = [LogRecord(*row) for row in rows]
    return records[::-1] if after is None else records


async def logs_begin(
    connection: Connection, session_id: int, *, tail: int, service: str | None, since: datetime | None
) -> int:
    """The id after which a session's last `tail` lines come, and all that are to come: for `logs_after`."""
    found: int = await connection.fetchval(
        f"""SELECT coalesce(
                (SELECT min(id) - 1 FROM (SELECT id FROM session_logs WHERE {_LINES} ORDER BY id DESC LIMIT $5) s),
                (SELECT max(id) FROM session_logs WHERE session_id = $1), 0)""",  # noqa: S608  Constants.
        session_id,
        0,
        service,
        since,
        tail,
    )
    return found


async def logs_after(connection: Connection, session_id: int, after: int, limit: int) -> Output | None:
    """The first `limit` lines after the line `after`, of all services; None when there is no such session any more.

    Ids of a session's lines grow in the order in which they can be read, so that none comes before one that was read.
    """
    rows = await connection.fetch(
        """SELECT s.status, EXISTS (SELECT FROM session_logs WHERE id = $2), l.*
             FROM sessions s LEFT JOIN LATERAL (
                  SELECT id, session_id, at, service, stream, line FROM session_logs
                   WHERE session_id = s.id AND id > $2 ORDER BY id LIMIT $3) l ON true
            WHERE s.id = $1 ORDER BY l.id""",
        session_id,
        after,
        limit,
    )
    if not rows:
        return None
    records = [LogRecord(*values) for _, _, *values in rows if values[0] is not None]
    return Output(rows[0][0], rows[0][1], records)


async def pods(connection: Connection, session_id: int) -> list[dict[str, Any]]:
    """The pods of a session on Kubernetes by name, each as `session.pod` told it last; none elsewhere."""
    rows = await connection.fetch("SELECT told FROM cluster_objects WHERE session_id = $1 AND kind = 'pod'", session_id)
    return sorted((orjson.loads(row[0]) for row in rows), key=lambda pod: str(pod["pod"]))


async def count_by_status(connection: Connection) -> dict[str, int]:
    """How many sessions have each status; those that are deleted are not counted."""
    counts = dict.fromkeys(_LIVE, 0)
    rows = await connection.fetch("SELECT status, count(*) FROM sessions WHERE status <> 'deleted' GROUP BY status")
    counts.update((row[0], row[1]) for row in rows)
    return counts
