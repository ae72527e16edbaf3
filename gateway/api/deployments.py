"""Deployments of apps: numbered, never changed, can be cancelled and gone back to."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from aiohttp import web
from marshmallow import Schema, fields, validate

from auth import audit, tenants
from auth.errors import NotVisible
from auth.permissions import Action, decide
from gateway import idempotency
from gateway.api.apps import permitted
from gateway.fields import MAX_ID, FlagInQuery, Matches, PageQuery, Text, WholeInQuery, moment, page_of
from gateway.operation import Call, Database, PathKind, answer, operation, page, text
from gateway.realtime import admission, build_log
from gateway.repository import check_branch
from orchestrator.deployments import queue, record
from orchestrator.deployments.contract import Status, Step

_APP = {"app_id": PathKind.ID}
_ONE = {"deployment_id": PathKind.ID}
_PLACE = "/api/v1/deployments"
_STATUSES = [status.value for status in Status]
_STEPS = [step.value for step in Step]


class NewDeployment(Schema):
    """What is to be deployed, where that is not the newest of the app's branch."""

    branch = Text(most=200, allow_none=True)
    commit_id = Text(
        most=64,
        allowed=Matches(r"[0-9a-f]{40}([0-9a-f]{24})?", "Must be a whole commit: 40 (or 64) digits of 0-9a-f."),
        allow_none=True,
    )


class StepDone(Schema):
    """A step of a deployment."""

    name = fields.String(required=True, validate=validate.OneOf(_STEPS))
    status = fields.String(required=True, validate=validate.OneOf(("running", "done", "failed", "cancelled")))
    seconds = fields.Float(required=True, allow_none=True, metadata={"description": "null while it runs."})


class Deployment(Schema):
    """A deployment, as answers and events have it."""

    id = fields.Integer(required=True)
    app_id = fields.Integer(required=True)
    app_name = fields.String(required=True)
    workspace_id = fields.Integer(required=True)
    number = fields.Integer(required=True, metadata={"description": "1, 2, 3 … of its app."})
    cause = fields.String(required=True, validate=validate.OneOf(("create", "manual", "push", "rollback")))
    user_id = fields.Integer(required=True, allow_none=True)
    rollback_of = fields.Integer(
        required=True, allow_none=True, metadata={"description": "The id of the deployment that it goes back to."}
    )
    repo_url = fields.String(required=True)
    branch = fields.String(required=True, allow_none=True)
    commit_id = fields.String(required=True, allow_none=True)
    commit_message = fields.String(required=True)
    status = fields.String(required=True, validate=validate.OneOf(_STATUSES))
    cancel_requested = fields.Boolean(
        required=True, metadata={"description": "It ends within seconds, if it does not serve before."}
    )
    step = fields.String(required=True)
    steps = fields.List(fields.Nested(StepDone), required=True)
    reason = fields.String(required=True)
    message = fields.String(required=True)
    image = fields.String(required=True, allow_none=True, metadata={"description": "null: none, or removed since."})
    url = fields.String(required=True, allow_none=True)
    created_at = moment()
    started_at = moment(allow_none=True)
    finished_at = moment(allow_none=True)
    updated_at = moment()


# As in `sessions`: the same as `record.public`, in a fraction of the time, since orjson writes moments itself.
_NAMES = tuple(Deployment().fields)
_values = attrgetter(*_NAMES)


def _public(deployment: record.Deployment) -> dict[str, Any]:
    return dict(zip(_NAMES, _values(deployment), strict=True))


class DeploymentsQuery(PageQuery):
    """Which deployments of the app."""

    status = fields.String(validate=validate.OneOf(_STATUSES))


class LogQuery(Schema):
    """Which part of the log."""

    after = WholeInQuery(
        0, MAX_ID, load_default=0, metadata={"description": "How many bytes of the log the client has already."}
    )
    follow = FlagInQuery(load_default=False, metadata={"description": "Go on with what is written from now on."})


async def _permitted(call: Call, action: Action) -> record.Deployment:
    """The deployment of the path. Raises NotVisible or Forbidden."""
    deployment = await record.get(call.connection, call.path["deployment_id"])
    if deployment is None:
        raise NotVisible("There is no such deployment.")
    role = None
    if not call.identity.is_admin:
        role = await tenants.role_in(call.connection, deployment.workspace_id, call.identity.user_id)
    decide(call.identity, action, role, what="deployment")
    return deployment


@operation(
    "List the deployments of an app",
    tag="deployments",
    path=_APP,
    query=DeploymentsQuery,
    answers={200: page_of(Deployment)},
)
async def list_deployments(call: Call) -> web.Response:
    """Newest first."""
    app, _ = await permitted(call, Action.APP_READ)
    query = call.query
    found, total = await queue.list_page(
        call.connection, app.id, status=query.get("status"), page=query["page"], page_size=query["page_size"]
    )
    return answer(page([_public(deployment) for deployment in found], total, query))


@operation(
    "Deploy an app",
    tag="deployments",
    path=_APP,
    body=NewDeployment,
    body_required=False,
    answers={201: Deployment},
    database=Database.WRITE,
    headers={idempotency.HEADER: idempotency.PARAMETER},
)
async def create(call: Call) -> web.Response:
    """With what the app is now. Of an app's deployments that wait the newest is next; older ones become `superseded`.

    409 once the app is being deleted.
    """
    return await idempotency.once(call, lambda: _create(call), place=_PLACE)


async def _create(call: Call) -> web.Response:
    app, _ = await permitted(call, Action.DEPLOYMENT_WRITE)
    if (branch := call.body.get("branch")) is not None:
        check_branch(branch)
    made = await queue.enqueue(
        call.connection,
        app.id,
        cause="manual",
        user_id=call.identity.user_id,
        branch=branch,
        commit_id=call.body.get("commit_id"),
    )
    return await _made(call, "deployment.create", made)


@operation("Read a deployment", tag="deployments", path=_ONE, answers={200: Deployment})
async def read(call: Call) -> web.Response:
    """For members of the app's workspace."""
    return answer(_public(await _permitted(call, Action.DEPLOYMENT_READ)))


@operation(
    "Cancel a deployment",
    tag="deployments",
    path=_ONE,
    answers={200: Deployment, 202: Deployment},
    database=Database.WRITE,
)
async def cancel(call: Call) -> web.Response:
    """200 for one that waited, which has ended with this. 202 for one under way, which ends within seconds.

    What serves goes on serving. 409 for one that has ended.
    """
    deployment = await _permitted(call, Action.DEPLOYMENT_WRITE)
    cancelled = await queue.cancel(call.connection, deployment.id)
    await _record(call, "deployment.cancel", cancelled)
    return answer(_public(cancelled), 200 if cancelled.finished else 202)


@operation(
    "Go back to a deployment",
    tag="deployments",
    path=_ONE,
    answers={201: Deployment},
    database=Database.WRITE,
    headers={idempotency.HEADER: idempotency.PARAMETER},
)
async def roll_back(call: Call) -> web.Response:
    """A new deployment, of the image and the settings that this one has served with.

    409 for one that never served, or whose image was removed since.
    """
    return await idempotency.once(call, lambda: _roll_back(call), place=_PLACE)


async def _roll_back(call: Call) -> web.Response:
    deployment = await _permitted(call, Action.DEPLOYMENT_WRITE)
    made = await queue.roll_back(call.connection, deployment.id, user_id=call.identity.user_id)
    return await _made(call, "deployment.rollback", made)


@operation(
    "Read the log of a deployment",
    tag="deployments",
    path=_ONE,
    query=LogQuery,
    answers={200: None},
    formats={"text/plain": None},
)
async def logs(call: Call) -> web.StreamResponse:
    """What clone, build and the app's start have said, as text with ANSI colours, without what is secret.

    With `follow` the answer goes on with what is written, and ends when the deployment has ended and all is sent. One
    that ends before that (the server does, or the permission) lacks the mark of its end, which clients call an
    incomplete read: go on by `after` with the number of bytes that are there. Nothing else comes between them.
    """
    query, request = call.query, call.request
    if query["follow"] and request.method == "GET":
        context = call.context
        admission.require_service(context)
        # Before anything is believed: what changes from now on is told to the connection.
        generation = context.hub.generation
        grant = await admission.grant_of_bearer(request, call.connection)
        deployment = await _permitted(call, Action.DEPLOYMENT_READ)
        return await build_log.follow(request, grant, generation, deployment.id, query["after"])
    deployment = await _permitted(call, Action.DEPLOYMENT_READ)
    return text(build_log.parts(call.context, deployment.id, query["after"]))


async def _made(call: Call, action: str, deployment: record.Deployment) -> web.Response:
    await _record(call, action, deployment)
    return answer(_public(deployment), 201, location=f"{_PLACE}/{deployment.id}")


async def _record(call: Call, action: str, deployment: record.Deployment) -> None:
    await audit.record(
        call.connection,
        call.identity.user_id,
        action,
        f"deployment:{deployment.id}",
        call.address,
        app=deployment.app_id,
        number=deployment.number,
    )
