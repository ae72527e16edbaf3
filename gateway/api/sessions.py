"""Sessions: the development environments. What is asked for here is written down; an orchestrator makes it so."""

from __future__ import annotations

from operator import attrgetter
from typing import Any
from uuid import UUID

from aiohttp import web
from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from auth import audit, projects, tenants
from auth.errors import NotVisible
from auth.permissions import Action, Role, Scope, decide
from auth.projects import Project
from gateway import idempotency
from gateway.fields import (
    MAX_ID,
    FlagInQuery,
    PageQuery,
    Since,
    Text,
    Uuid,
    WholeInQuery,
    moment,
    object_id,
    object_id_in_query,
    page_of,
)
from gateway.operation import Call, Database, PathKind, answer, operation, page, text
from gateway.realtime import admission, output
from orchestrator.sessions import store
from orchestrator.sessions.state import Desired, Status

_STATUSES = [status.value for status in Status]
_ONE = {"session_id": PathKind.ID}


class NewSession(Schema):
    """For which project a session is wanted: by `project_uuid` or by `project_id`."""

    project_uuid = Uuid()
    project_id = object_id()
    provider = Text(allow_none=True)
    machine_config = Text(allow_none=True)
    user_id = object_id(
        allow_none=True, metadata={"description": "Whose session it is; administrators may name another."}
    )

    @validates_schema
    def _one_of_two(self, data: dict[str, Any], **_: Any) -> None:
        if ("project_uuid" in data) == ("project_id" in data):
            raise ValidationError("Give either project_uuid or project_id.", "project_uuid")


class Session(Schema):
    """A session, as answers and events have it."""

    id = fields.Integer(required=True)
    project_uuid = fields.UUID(required=True)
    project_id = fields.Integer(required=True)
    workspace_id = fields.Integer(required=True)
    user_id = fields.Integer(required=True, allow_none=True)
    provider = fields.String(required=True)
    machine_config = fields.String(required=True)
    namespace = fields.String(required=True)
    container_name = fields.String(required=True)
    desired = fields.String(required=True, validate=validate.OneOf([desired.value for desired in Desired]))
    status = fields.String(required=True, validate=validate.OneOf(_STATUSES))
    reason = fields.String(required=True)
    message = fields.String(required=True)
    stale = fields.Boolean(
        required=True, metadata={"description": "The provider cannot be reached; this is the last that was known."}
    )
    ip_address = fields.String(required=True, allow_none=True)
    preview_url = fields.String(required=True, allow_none=True)
    preview_path = fields.String(required=True, allow_none=True)
    chat_url = fields.String(required=True, allow_none=True)
    chat_path = fields.String(required=True, allow_none=True)
    vscode_url = fields.String(required=True, allow_none=True)
    vscode_path = fields.String(required=True, allow_none=True)
    expires_at = moment()
    created_at = moment()
    updated_at = moment()


# The same as `store.public`, in a fifth of the time, which counts in lists: orjson writes moments itself.
_NAMES = tuple(Session().fields)
_values = attrgetter(*_NAMES)


def _public(session: store.Session) -> dict[str, Any]:
    return dict(zip(_NAMES, _values(session), strict=True))


class NewMachineConfig(Schema):
    """Which machine config a session is to have from now on."""

    machine_config = Text(required=True)


class SessionsQuery(PageQuery):
    """Which sessions. Deleted ones are listed only when `status` asks for them."""

    user_id = object_id_in_query()
    project_id = object_id_in_query()
    workspace_id = object_id_in_query()
    status = fields.String(validate=validate.OneOf(_STATUSES))


class SessionEvent(Schema):
    """One line of a session's history."""

    id = fields.Integer(required=True)
    at = moment()
    status = fields.String(required=True)
    reason = fields.String(required=True)
    message = fields.String(required=True)


class Container(Schema):
    """A container of a pod. `init`: it prepares, and ends before the others begin."""

    name = fields.String(required=True)
    init = fields.Boolean(required=True)
    ready = fields.Boolean(required=True)
    state = fields.String(required=True, validate=validate.OneOf(("waiting", "running", "terminated", "unknown")))
    reason = fields.String(required=True)
    message = fields.String(required=True)
    restarts = fields.Integer(required=True)
    exit_code = fields.Integer(required=True, allow_none=True)


class Pod(Schema):
    """A pod of a session, as `session.pod` told it last."""

    session_id = fields.Integer(required=True)
    provider = fields.String(required=True)
    namespace = fields.String(required=True)
    uid = fields.String(required=True)
    resource_version = fields.String(required=True)
    pod = fields.String(required=True)
    phase = fields.String(required=True)
    ready = fields.Boolean(required=True)
    node = fields.String(required=True)
    reason = fields.String(required=True)
    message = fields.String(required=True)
    containers = fields.List(fields.Nested(Container), required=True)


class Pods(Schema):
    """All of a session's."""

    items = fields.List(fields.Nested(Pod), required=True)


class LogsQuery(Schema):
    """Which lines of the output."""

    tail = WholeInQuery(0, 5000, load_default=200)
    after = WholeInQuery(0, MAX_ID, metadata={"description": "The id of the last line already known."})
    since = Since(
        metadata={
            "description": "Lines written then or later: a moment (RFC 3339), or how long ago it is (`90s`, `10m`, "
            "`2h`, `1d`; a bare number are seconds)."
        }
    )
    container = Text(most=64, metadata={"description": "Lines of one container, which is one service."})
    service = Text(most=64, metadata={"description": "The same as `container`."})
    follow = FlagInQuery(load_default=False, metadata={"description": "Go on with what is written from now on."})

    @validates_schema
    def _one_name(self, data: dict[str, Any], **_: Any) -> None:
        if len({data[name] for name in ("container", "service") if name in data}) > 1:
            raise ValidationError("Names another container than service does.", "container")


class LogLine(Schema):
    """One line of a session's output."""

    id = fields.Integer(required=True)
    at = moment()
    service = fields.String(required=True)
    stream = fields.String(required=True)
    line = fields.String(required=True)


class LogLines(Schema):
    """Lines in their order."""

    items = fields.List(fields.Nested(LogLine), required=True)


_POD = tuple(Pod().fields)


async def _permitted(call: Call, action: Action) -> store.Session:
    """The session of the path. Raises NotVisible or Forbidden."""
    session = await store.get(call.connection, call.path["session_id"])
    if session is None:
        raise NotVisible("There is no such session.")
    role = None
    if not call.identity.is_admin:
        role = await tenants.role_in(call.connection, session.workspace_id, call.identity.user_id)
    decide(call.identity, action, role, what="session")
    return session


async def _project(call: Call, *, uuid: UUID | None = None, id: int | None = None) -> tuple[Project, Role | None]:  # noqa: A002  The column's name.
    """The project, and the caller's role in its workspace; one whose UUID nobody knows becomes the caller's own.

    Raises NotVisible or Forbidden.
    """
    identity = call.identity
    found = await projects.with_role(call.connection, user_id=identity.user_id, id=id, uuid=uuid)
    if found is not None:
        decide(identity, Action.SESSION_READ, found[1], what="project")
        return found
    if uuid is None or not call.context.settings.adopt_projects:
        raise NotVisible("There is no such project.")
    decide(identity, Action.PROJECT_WRITE, Role.OWNER)
    project = await projects.adopt(call.connection, uuid, identity.user_id)
    await audit.record(call.connection, identity.user_id, "project.adopt", f"project:{project.id}", call.address)
    return project, Role.OWNER


async def _make(
    call: Call, project: Project, *, user_id: int, provider: str | None = None, machine_config: str | None = None
) -> tuple[store.Session, bool]:
    session, made = await store.create(
        call.connection,
        project=project,
        user_id=user_id,
        provider=provider,
        machine_config=machine_config,
        by=call.identity,
    )
    if made:
        await _record(call, "session.create", session.id)
    return session, made


@operation("List sessions", tag="sessions", query=SessionsQuery, answers={200: page_of(Session)})
async def list_sessions(call: Call) -> web.Response:
    """Those of the caller's workspaces, newest first; administrators see all. `total` counts 10,000 at most."""
    query, identity = call.query, call.identity
    workspace_ids: list[int] | None = None
    if not identity.is_admin:
        workspace_ids = await tenants.workspace_ids(call.connection, identity.user_id)
    if (wanted := query.get("workspace_id")) is not None:
        workspace_ids = [wanted] if workspace_ids is None or wanted in workspace_ids else []
    found = await store.list_page(
        call.connection,
        workspace_ids=workspace_ids,
        user_id=query.get("user_id"),
        project_id=query.get("project_id"),
        status=query.get("status"),
        page=query["page"],
        page_size=query["page_size"],
    )
    items = [_public(session) for session in found.items]
    return answer(page(items, found.total, query, exact=found.total_is_exact))


@operation(
    "Make a session",
    tag="sessions",
    body=NewSession,
    answers={201: Session, 202: Session},
    database=Database.WRITE,
    headers={idempotency.HEADER: idempotency.PARAMETER},
)
async def create(call: Call) -> web.Response:
    """201 with a new session, which starts; 202 with the one that the project has.

    409 while an old one is deleted, and when as many sessions run with the machine config as may. One that is for
    others is answered like one that there is not, with 422; one that the caller may use elsewhere only, with 403.
    """
    return await idempotency.once(call, lambda: _create(call))


async def _create(call: Call) -> web.Response:
    body, identity = call.body, call.identity
    user_id = body.get("user_id") or identity.user_id
    if user_id != identity.user_id:
        decide(identity, Action.USER_ADMIN_WRITE)
    project, role = await _project(call, uuid=body.get("project_uuid"), id=body.get("project_id"))
    decide(identity, Action.SESSION_WRITE, role, what="project")
    session, made = await _make(
        call, project, user_id=user_id, provider=body.get("provider"), machine_config=body.get("machine_config")
    )
    return answer(_public(session), 201 if made else 202, location=f"/api/v1/sessions/{session.id}")


@operation(
    "Get the session of a project, made if need be",
    tag="sessions",
    path={"project_uuid": PathKind.UUID},
    answers={200: Session, 201: Session},
    database=Database.WRITE,
    scope=Scope.READ,
)
async def get_or_create(call: Call) -> web.Response:
    """200 with the session that the project has, 201 with a new one. Concurrent calls make one."""
    project, role = await _project(call, uuid=call.path["project_uuid"])
    found = await store.list_page(call.connection, workspace_ids=None, project_id=project.id, page=1, page_size=1)
    if found.items and found.items[0].desired != Desired.DELETED:
        return answer(_public(found.items[0]))
    decide(call.identity, Action.SESSION_WRITE, role, what="project")
    session, made = await _make(call, project, user_id=call.identity.user_id)
    return answer(_public(session), 201 if made else 200, location=f"/api/v1/sessions/{session.id}")


@operation("Read a session", tag="sessions", path=_ONE, answers={200: Session})
async def read(call: Call) -> web.Response:
    """For members of its workspace; a deleted one too, for a while."""
    return answer(_public(await _permitted(call, Action.SESSION_READ)))


async def _request(call: Call, action: str, desired: Desired, *, restart: bool = False) -> web.Response:
    session = await _permitted(call, Action.SESSION_WRITE)
    wanted = await store.request(call.connection, session.id, desired, restart=restart)
    await _record(call, action, session.id)
    return answer(_public(wanted), 202)


@operation(
    "Delete a session",
    tag="sessions",
    path=_ONE,
    answers={200: Session, 202: Session},
    database=Database.WRITE,
)
async def delete(call: Call) -> web.Response:
    """Works in every state: 202 while it goes, 200 when it is gone already."""
    session = await _permitted(call, Action.SESSION_WRITE)
    if session.status == Status.DELETED:
        return answer(_public(session))
    wanted = await store.request(call.connection, session.id, Desired.DELETED)
    await _record(call, "session.delete", session.id)
    return answer(_public(wanted), 202)


@operation("Start a session", tag="sessions", path=_ONE, answers={202: Session}, database=Database.WRITE)
async def start(call: Call) -> web.Response:
    """Starting what runs changes nothing.

    409 once it is being deleted, and when as many sessions run with its machine config as may.
    """
    return await _request(call, "session.start", Desired.RUNNING)


@operation("Stop a session", tag="sessions", path=_ONE, answers={202: Session}, database=Database.WRITE)
async def stop(call: Call) -> web.Response:
    """Its files stay. 409 once it is being deleted."""
    return await _request(call, "session.stop", Desired.STOPPED)


@operation("Restart a session", tag="sessions", path=_ONE, answers={202: Session}, database=Database.WRITE)
async def restart(call: Call) -> web.Response:
    """Stops what runs, then starts with what the project says now. 409 once it is being deleted."""
    return await _request(call, "session.restart", Desired.RUNNING, restart=True)


@operation(
    "Change a session's machine config",
    tag="sessions",
    path=_ONE,
    body=NewMachineConfig,
    answers={200: Session, 202: Session},
    database=Database.WRITE,
)
async def change_machine_config(call: Call) -> web.Response:
    """Another size of the same provider, or the same one as it is now.

    202 while the session restarts with it. 200 when there is nothing to wait for: a stopped session takes it at its
    next start, and one that runs with it already runs on. 422 names those that the provider has, 403 is for one that
    the caller may use elsewhere only, 409 once the session is being deleted, and when as many sessions run with the
    machine config as may. Where the provider can go back to what ran before, a change that fails leaves the session
    running with that, and `reason` is `RolledBack`.
    """
    session = await _permitted(call, Action.SESSION_WRITE)
    name = call.body["machine_config"]
    changed, restarts = await store.change_machine(call.connection, session.id, name, by=call.identity)
    await _record(call, "session.machine-config", session.id, machine_config=name)
    return answer(_public(changed), 202 if restarts else 200)


@operation(
    "Read what happened to a session",
    tag="sessions",
    path=_ONE,
    query=PageQuery,
    answers={200: page_of(SessionEvent)},
)
async def history(call: Call) -> web.Response:
    """Newest first."""
    session = await _permitted(call, Action.SESSION_READ)
    query = call.query
    found = await store.events_page(call.connection, session.id, page=query["page"], page_size=query["page_size"])
    items = [
        {
            "id": event.id,
            "at": event.at,
            "status": event.status,
            "reason": event.reason,
            "message": event.message,
        }
        for event in found.items
    ]
    return answer(page(items, found.total, query, exact=found.total_is_exact))


@operation("Read the pods of a session", tag="sessions", path=_ONE, answers={200: Pods})
async def pods(call: Call) -> web.Response:
    """As its cluster was last seen; none for a session that is not on Kubernetes. `session.pod` tells what changes."""
    session = await _permitted(call, Action.SESSION_READ)
    found = await store.pods(call.connection, session.id)
    return answer({"items": [{name: pod[name] for name in _POD} for pod in found]})


@operation(
    "Read a session's output",
    tag="sessions",
    path=_ONE,
    query=LogsQuery,
    answers={200: LogLines},
    formats={output.JSON_LINES.content_type: LogLine, output.TEXT.content_type: None},
)
async def logs(call: Call) -> web.StreamResponse:
    """The last `tail` lines, or the first `tail` after the line `after`, in their order.

    With `follow` the answer goes on with each line as it is written, once and in order: as `application/x-ndjson`, a
    LogLine a line, where empty lines are heartbeats. With `tail=0` only new ones; with `after` all that came
    after that line, so that a client that was cut off misses nothing. The stream ends when the session is deleted, the
    permission or the token ends, or the server does: then its last line is one of the stream `system` with the key
    `end` (`code`, `reason`, and whether to `reconnect`). A client that takes nothing for 35 s is given up.

    Whoever accepts `text/plain` gets lines to read: `2026-03-01T11:02:03.5Z preview | listening`, without heartbeats.
    """
    query, request = call.query, call.request
    service = query.get("container", query.get("service"))
    form = output.format_for(request.headers.get("Accept", ""))
    if query["follow"] and request.method == "GET":
        return await _follow(call, service, form)
    session = await _permitted(call, Action.SESSION_READ)
    records = await store.logs(
        call.connection,
        session.id,
        tail=query["tail"],
        after=query.get("after"),
        service=service,
        since=query.get("since"),
    )
    items = [output.item_of(record) for record in records]
    return text(output.TEXT.render(items)) if form is output.TEXT else answer({"items": items})


async def _follow(call: Call, service: str | None, form: output.Format) -> web.StreamResponse:
    query, context = call.query, call.context
    admission.require_service(context)
    # Before anything is believed: what changes from now on is told to the connection.
    generation = context.hub.generation
    grant = await admission.grant_of_bearer(call.request, call.connection)
    session = await _permitted(call, Action.SESSION_READ)
    since, after = query.get("since"), query.get("after")
    begin = after
    if begin is None:
        begin = await store.logs_begin(call.connection, session.id, tail=query["tail"], service=service, since=since)
    wish = output.Wish(session.id, begin, service, since, resumed=bool(after))
    return await output.follow(call.request, grant, generation, wish, form)


async def _record(call: Call, action: str, session_id: int, **details: Any) -> None:
    await audit.record(call.connection, call.identity.user_id, action, f"session:{session_id}", call.address, **details)
