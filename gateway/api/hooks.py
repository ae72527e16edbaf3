"""Webhooks: a Git host tells of a push, and the app is deployed. Who sends is known by the signature alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog
from aiohttp import web
from marshmallow import Schema, fields, validate

from auth import audit
from gateway.operation import Call, Database, Endpoint, Handler, PathKind, answer, operation
from gateway.problems import Problem
from gateway.repository import check_branch
from orchestrator.deployments import hooks, queue
from orchestrator.deployments.hooks import HEADERS, Ignored, Kind, Ping, Push
from orchestrator.deployments.secrets import Keyring
from orchestrator.errors import Invalid, SecretsUnreadable

log = structlog.get_logger("gateway.hooks")

# Bytes. What GitHub sends at most is 25 MiB, of a push far less: it lists 2048 commits at most.
_LARGEST = 4 << 20


class Delivery(Schema):
    """What became of a delivery."""

    status = fields.String(required=True, validate=validate.OneOf(("queued", "repeated", "ignored", "pong")))
    deployment_id = fields.Integer(required=True, allow_none=True)
    message = fields.String(required=True)


async def _receive(call: Call, kind: Kind) -> web.Response:
    """Nothing of the body is looked at before it is known who has sent it."""
    app = await _sender(call, kind)
    try:
        found = hooks.parse(kind, call.request.headers, call.raw)
        if isinstance(found, Push) and found.branch is not None:
            check_branch(found.branch)
    except (hooks.Malformed, Invalid) as error:
        raise Problem(400, str(error)) from error
    if isinstance(found, Ping):
        return _told("pong", None, "Deliveries arrive.")
    why = found.why if isinstance(found, Ignored) else hooks.ignored(found, app["branch"], auto_deploy=app["auto"])
    if isinstance(found, Ignored) or why is not None:
        return _told("ignored", None, why or "")
    return await _obey(call, app["id"], found)


async def _sender(call: Call, kind: Kind) -> Any:
    """The app whose secret the sender knows. One answer for all who do not, whatever is wrong, and one price."""
    keys = call.context.keys
    if not keys:
        raise Problem(404, "There are no webhooks here: an administrator must set SECRETS_KEY first.")
    app = await call.connection.fetchrow(
        """SELECT id, branch, auto_deploy AS auto, hook_secret FROM apps
            WHERE id = $1 AND hook_secret IS NOT NULL AND NOT deleting""",
        call.path["app_id"],
    )
    secret = _secret(keys, app) if app else None
    if not hooks.is_genuine(kind, call.request.headers, call.raw, secret):
        raise Problem(
            401,
            f"There is no such app, or {HEADERS[kind][0]} does not show that its secret is known.",
            headers={"WWW-Authenticate": f'Webhook header="{HEADERS[kind][0]}"'},
        )
    return app


def _secret(keys: Keyring, app: Any) -> bytes | None:
    try:
        return keys.decrypt(app["hook_secret"], app_id=app["id"], purpose="hook")
    except SecretsUnreadable as error:
        # Told to who can do something about it, and not to whoever sends.
        log.warning("no webhook can be obeyed", app_id=app["id"], error=str(error))
        return None


async def _obey(call: Call, app_id: int, push: Push) -> web.Response:
    commit = {"branch": push.branch, "commit_id": push.commit_id, "commit_message": push.message}
    async with call.connection.transaction():
        deployment_id, made = await queue.deliver(call.connection, app_id, push.delivery, commit)
        if made is None:
            return _told("repeated", deployment_id, "This delivery was obeyed before.")
        await audit.record(
            call.connection, None, "deployment.push", f"deployment:{made.id}", call.address,
            app=app_id, number=made.number, delivery=push.delivery,
        )  # fmt: skip
    return _told("queued", made.id, f"Deployment {made.number} is queued.", 202)


def _told(status: str, deployment_id: int | None, message: str, code: int = 200) -> web.Response:
    return answer({"status": status, "deployment_id": deployment_id, "message": message}, code)


def _headers(kind: Kind) -> dict[str, Any]:
    return {name: {"schema": {"type": "string"}} for name in HEADERS[kind]}


def _hook(kind: Kind, who: str) -> Callable[[Endpoint], Handler]:
    return operation(
        f"Take a delivery from {who}",
        tag="hooks",
        path={"app_id": PathKind.ID},
        answers={200: Delivery, 202: Delivery},
        signed_in=False,
        database=Database.READ,
        limit="hooks",
        raw=_LARGEST,
        headers=_headers(kind),
    )


@_hook(Kind.GITHUB, "GitHub")
async def github(call: Call) -> web.Response:
    """GitHub's `push` and `ping`, as JSON or as a form.

    202 when a deployment is queued; 200 when there is nothing to do, and `message` says why. A delivery that comes
    again is answered with the deployment that it has made. 401 unless it is known who has sent it.
    """
    return await _receive(call, Kind.GITHUB)


@_hook(Kind.GITLAB, "GitLab")
async def gitlab(call: Call) -> web.Response:
    """GitLab's push events.

    202 when a deployment is queued; 200 when there is nothing to do, and `message` says why. A delivery that comes
    again is answered with the deployment that it has made. 401 unless it is known who has sent it.
    """
    return await _receive(call, Kind.GITLAB)


@_hook(Kind.GENERIC, "anybody else")
async def generic(call: Call) -> web.Response:
    """`{"branch", "commit_id", "message", "default_branch"}`, all of them optional: without a branch the app's own. The
    signature is `sha256=` and the HMAC-SHA-256 of the body in hexadecimal digits.

    202 when a deployment is queued; 200 when there is nothing to do, and `message` says why. A delivery that comes
    again is answered with the deployment that it has made. 401 unless it is known who has sent it.
    """
    return await _receive(call, Kind.GENERIC)
