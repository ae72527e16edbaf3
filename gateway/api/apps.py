"""Apps: a Git repository that is built, run and reached under a name of its own.

What is asked for here is written down; a worker makes it so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from aiohttp import web
from marshmallow import Schema, ValidationError, fields, validate

from auth import audit, tenants
from auth.errors import NotVisible
from auth.permissions import Action, Role, decide
from gateway import idempotency
from gateway.fields import (
    NO_NUL,
    Flag,
    Matches,
    PageQuery,
    Text,
    Whole,
    environment,
    moment,
    object_id,
    object_id_in_query,
    page_of,
)
from gateway.operation import Call, Database, PathKind, answer, operation, page
from gateway.repository import check_branch, check_repo_url, without_secrets
from orchestrator.deployments import apps, labels, queue
from orchestrator.deployments.contract import AppSecrets, AppSettings
from orchestrator.deployments.hooks import Kind
from orchestrator.deployments.secrets import deploy_key
from orchestrator.errors import Invalid, SecretsUnreadable
from orchestrator.machine_fields import parse_bytes, parse_cores

_ONE = {"app_id": PathKind.ID}
# What Docker refuses to run a container with less than.
_LEAST_CORES = 0.01
_LEAST_BYTES = 6 << 20


class Cores(fields.Field[float]):
    """A number of cores: `2`, `0.5` or `"500m"`."""

    def __init__(self, **kwargs: Any) -> None:
        described = {"type": ["number", "string"], "pattern": r"^[0-9]+(\.[0-9]+)?m?$", "exclusiveMinimum": 0}
        super().__init__(metadata={**described, "description": "Cores: 2, 0.5 or 500m. null: no limit."}, **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> float:
        if (cores := parse_cores(value)) < _LEAST_CORES:
            raise ValidationError(f"must be at least {_LEAST_CORES:g}")
        return cores


class Memory(fields.Field[int]):
    """A size: a number of bytes, or `"512Mi"`."""

    def __init__(self, **kwargs: Any) -> None:
        described = {
            "type": ["integer", "string"],
            "pattern": r"^[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$",
            "minimum": _LEAST_BYTES,
        }
        super().__init__(metadata={**described, "description": "Bytes, or as in 512Mi. null: no limit."}, **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> int:
        if (size := parse_bytes(value)) < _LEAST_BYTES:
            raise ValidationError(f"must be at least {_LEAST_BYTES} bytes")
        return size


class AppChanges(Schema):
    """What of an app can change. It is taken up by the next deployment."""

    repo_url = Text(most=2048, metadata={"description": "Without user and password, which are secrets."})
    branch = Text(most=200, allow_none=True, metadata={"description": "null: the repository's default branch."})
    dockerfile = Text(
        most=500,
        allow_none=True,
        metadata={
            "description": "A path in the repository. null: `Dockerfile`, or what the repository is found to be."
        },
    )
    build_args = environment("Arguments of the build, by name. No secrets: they can be read in the image.")
    env = environment("Environment variables of the app, by name.")
    secrets = environment(
        "Secret environment variables, by name: never shown again. null removes one, or all.",
        nullable=True,
        allow_none=True,
    )
    deploy_key = Text(
        most=16 << 10,
        allowed=NO_NUL,
        allow_none=True,
        metadata={"description": "A private key for a repository over ssh. null removes it."},
    )
    deploy_user = Text(
        allowed=Matches(r"[^\x00-\x20\x7f:@/]+", "Blanks, ':', '@' and '/' are not allowed."),
        allow_none=True,
        metadata={"description": "The user that belongs to the token."},
    )
    deploy_token = Text(
        most=4096,
        allowed=Matches(r"[!-~]+", "Only visible ASCII characters are allowed."),
        allow_none=True,
        metadata={"description": "A token for a repository over http(s). null removes it."},
    )
    port = Whole(1, 65535, metadata={"description": "That the app listens on."})
    health_path = Text(
        most=500,
        allowed=Matches(r'/[!"$-~]*', "Must begin with '/' and hold no blanks and no '#'."),
        allow_none=True,
        metadata={"description": "Answers 200 to 399 when the app can serve. null: taking a connection is enough."},
    )
    cpu = Cores(allow_none=True)
    memory = Memory(allow_none=True)
    domains = fields.List(
        Text(most=253),
        validate=validate.Length(max=20),
        metadata={"description": "Hosts beside `{name}.{BASE_DOMAIN}`."},
    )
    auto_deploy = Flag(metadata={"description": "Whether webhooks deploy."})
    keep_images = Whole(1, 20, metadata={"description": "Images kept to roll back to, the live one's included."})


class NewApp(AppChanges):
    """An app to be made. Its name is its identity, and does not change."""

    name = Text(
        required=True,
        most=40,
        allowed=Matches(
            r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", "Must be 1 to 40 of a-z, 0-9 and '-', not '-' at either end."
        ),
    )
    workspace_id = object_id(required=True)
    repo_url = Text(required=True, most=2048, metadata={"description": "Without user and password, which are secrets."})


class App(Schema):
    """An app, as lists and events have it."""

    id = fields.Integer(required=True)
    workspace_id = fields.Integer(required=True)
    created_by = fields.Integer(required=True, allow_none=True)
    name = fields.String(required=True)
    repo_url = fields.String(required=True)
    branch = fields.String(required=True, allow_none=True)
    dockerfile = fields.String(required=True, allow_none=True)
    port = fields.Integer(required=True)
    health_path = fields.String(required=True, allow_none=True)
    cpu = fields.Float(required=True, allow_none=True)
    memory = fields.Integer(required=True, allow_none=True, metadata={"description": "Bytes."})
    domains = fields.List(fields.String(), required=True)
    keep_images = fields.Integer(required=True)
    auto_deploy = fields.Boolean(required=True)
    deleting = fields.Boolean(required=True)
    message = fields.String(required=True, metadata={"description": "What keeps the removal waiting."})
    live_deployment = fields.Integer(
        required=True, allow_none=True, metadata={"description": "The id of the deployment that serves."}
    )
    url = fields.String(required=True, allow_none=True, metadata={"description": "Where it is reached."})
    created_at = moment()
    updated_at = moment()


class Hooks(Schema):
    """Where Git hosts send to, below the address of this API."""

    github = fields.String(required=True)
    gitlab = fields.String(required=True)
    generic = fields.String(required=True)


class AppDetails(App):
    """An app with all that may be shown. `build_args` and `env` are null for viewers, since they may hold secrets.

    `secret_names`, `has_deploy_key` and `has_deploy_token` are null when SECRETS_KEY lacks the key to find out.
    """

    build_args = fields.Dict(keys=fields.String(), values=fields.String(), required=True, allow_none=True)
    env = fields.Dict(keys=fields.String(), values=fields.String(), required=True, allow_none=True)
    secret_names = fields.List(fields.String(), required=True, allow_none=True)
    has_deploy_key = fields.Boolean(required=True, allow_none=True)
    has_deploy_token = fields.Boolean(required=True, allow_none=True)
    hooks = fields.Nested(Hooks, required=True)


class MadeApp(AppDetails):
    """An app that was just made, with what its webhooks are signed with."""

    hook_secret = fields.String(
        required=True,
        allow_none=True,
        metadata={"description": "Shown this once. null: SECRETS_KEY is not set, so that there are no webhooks."},
    )


class HookSecret(Schema):
    """What an app's webhooks are signed with from now on."""

    hook_secret = fields.String(required=True, metadata={"description": "Shown this once."})
    hooks = fields.Nested(Hooks, required=True)


class AppsQuery(PageQuery):
    """Which apps."""

    workspace_id = object_id_in_query()


# What REST calls the fields of AppSettings and of AppSecrets, where it is another name.
_SETTINGS = {
    "dockerfile": "dockerfile", "build_args": "build_args", "env": "env", "port": "port",
    "health_path": "health_path", "cpu": "cpu", "memory": "memory_bytes", "domains": "domains",
    "keep_images": "keep_images",
}  # fmt: skip
_SECRETS = {
    "secrets": "env", "deploy_key": "deploy_key", "deploy_user": "deploy_user", "deploy_token": "deploy_token",
}  # fmt: skip


async def permitted(call: Call, action: Action) -> tuple[apps.App, Role | None]:
    """The app of the path, and the caller's role in its workspace. Raises NotVisible or Forbidden."""
    app = await apps.get(call.connection, call.path["app_id"])
    if app is None:
        raise NotVisible("There is no such app.")
    role = None
    if not call.identity.is_admin:
        role = await tenants.role_in(call.connection, app.workspace_id, call.identity.user_id)
    decide(call.identity, action, role, what="app")
    return app, role


def _details(call: Call, app: apps.App, *, with_env: bool = True) -> dict[str, Any]:
    try:
        secrets = call.context.keys.decrypt_secrets(app.secrets, app.id)
    except SecretsUnreadable:
        secrets = None
    return {
        **apps.public(app),
        "build_args": app.settings.build_args if with_env else None,
        "env": app.settings.env if with_env else None,
        "secret_names": None if secrets is None else sorted(secrets.env),
        "has_deploy_key": None if secrets is None else bool(secrets.deploy_key),
        "has_deploy_token": None if secrets is None else bool(secrets.deploy_token),
        "hooks": _hooks(app.id),
    }


def _hooks(app_id: int) -> dict[str, str]:
    return {kind.value: f"/api/v1/hooks/{app_id}/{kind.value}" for kind in Kind}


def _check(call: Call, name: str) -> dict[str, Any]:
    """The values of the body for an app of that name, as they are kept. Raises Invalid."""
    body, settings = dict(call.body), call.context.settings
    if "repo_url" in body:
        check_repo_url(body["repo_url"], settings.repo_schemes)
        if without_secrets(body["repo_url"]) != body["repo_url"]:
            raise Invalid(
                "repo_url must hold no user, password or query: give them as deploy_user and deploy_token, which are "
                "kept secret.",
                field="repo_url",
            )
    if body.get("branch") is not None:
        check_branch(body["branch"])
    if body.get("dockerfile") is not None:
        body["dockerfile"] = _dockerfile(body["dockerfile"])
    if body.get("deploy_key"):
        body["deploy_key"] = deploy_key(body["deploy_key"])
    if "name" in body or "domains" in body:
        body["domains"] = _domains(name, body.get("domains", ()), settings.base_domain)
    return body


def _dockerfile(path: str) -> str:
    parts = PurePosixPath(path).parts
    if path.startswith("/") or path.endswith("/") or "\\" in path or not parts or {"..", ".git"} & {*parts}:
        raise Invalid("dockerfile must be the path of a file in the repository.", field="dockerfile")
    return str(PurePosixPath(*parts))


def _domains(name: str, domains: Sequence[str], base_domain: str) -> tuple[str, ...]:
    """In small letters, each once, without the app's own host, which it has anyway."""
    lowered = [domain.lower() for domain in domains]
    for domain in lowered:
        if domain.rpartition(".")[2].isdigit():
            raise Invalid(f"{domain!r} is an address and no domain.", field="domains")
    return tuple(labels.hosts(name, lowered, base_domain)[1:])


def _part(body: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {kept: body[name] for name, kept in names.items() if name in body}


@operation("List apps", tag="apps", query=AppsQuery, answers={200: page_of(App)})
async def list_apps(call: Call) -> web.Response:
    """Those of the caller's workspaces, newest first; administrators see all."""
    query, identity = call.query, call.identity
    workspace_ids: list[int] | None = None
    if not identity.is_admin:
        workspace_ids = await tenants.workspace_ids(call.connection, identity.user_id)
    if (wanted := query.get("workspace_id")) is not None:
        workspace_ids = [wanted] if workspace_ids is None or wanted in workspace_ids else []
    found, total = await apps.list_page(
        call.connection, workspace_ids=workspace_ids, page=query["page"], page_size=query["page_size"]
    )
    return answer(page([apps.public(app) for app in found], total, query))


@operation(
    "Make an app",
    tag="apps",
    body=NewApp,
    answers={201: MadeApp},
    database=Database.WRITE,
    headers={idempotency.HEADER: idempotency.PARAMETER},
)
async def create(call: Call) -> web.Response:
    """Its first deployment is queued with it. 409 for a name or a domain that another app has, in any workspace.

    Nothing secret is ever shown again, `hook_secret` neither: a repeated request is answered with null.
    """
    return await idempotency.once(call, lambda: _create(call), hidden=("hook_secret",))


async def _create(call: Call) -> web.Response:
    identity, body = call.identity, _check(call, call.body["name"])
    role = await tenants.role_in(call.connection, body["workspace_id"], identity.user_id)
    decide(identity, Action.APP_WRITE, role, what="workspace")
    app, hook_secret = await apps.create(
        call.connection,
        call.context.keys,
        workspace_id=body["workspace_id"],
        created_by=identity.user_id,
        name=body["name"],
        repo_url=body["repo_url"],
        branch=body.get("branch"),
        auto_deploy=body.get("auto_deploy", True),
        settings=replace(AppSettings(), **_part(body, _SETTINGS)),
        secrets=apps.merged(AppSecrets(), _part(body, _SECRETS)),
    )
    await queue.enqueue(call.connection, app.id, cause="create", user_id=identity.user_id)
    await _record(call, "app.create", app.id, name=app.name)
    return answer(_details(call, app) | {"hook_secret": hook_secret}, 201, location=f"/api/v1/apps/{app.id}")


@operation("Read an app", tag="apps", path=_ONE, answers={200: AppDetails})
async def read(call: Call) -> web.Response:
    """For members of its workspace."""
    app, role = await permitted(call, Action.APP_READ)
    sees_env = call.identity.is_admin or (role is not None and role >= Role.MEMBER)
    return answer(_details(call, app, with_env=sees_env))


@operation("Change an app", tag="apps", path=_ONE, body=AppChanges, answers={200: AppDetails}, database=Database.WRITE)
async def update(call: Call) -> web.Response:
    """What is not given stays; `secrets` are merged by name, all else is replaced as a whole.

    The next deployment takes it up; nothing is deployed by this. 409 for a domain that another app has, and once the
    app is being deleted.
    """
    app, _ = await permitted(call, Action.APP_WRITE)
    body = _check(call, app.name)
    changed = await apps.update(
        call.connection,
        call.context.keys,
        app.id,
        columns=_part(body, {name: name for name in ("repo_url", "branch", "auto_deploy")}),
        settings=_part(body, _SETTINGS),
        secrets=_part(body, _SECRETS),
    )
    await _record(call, "app.update", app.id, fields=sorted(call.body))
    return answer(_details(call, changed))


@operation("Delete an app", tag="apps", path=_ONE, answers={202: App}, database=Database.WRITE)
async def delete(call: Call) -> web.Response:
    """For admins and owners of its workspace. All that runs and was built goes, then the app, and its name is free.

    Meanwhile `deleting` is true, and `message` says what keeps it waiting. What is under way is cancelled.
    """
    app, _ = await permitted(call, Action.APP_DELETE)
    deleted = await queue.delete_app(call.connection, app.id)
    await _record(call, "app.delete", app.id, name=app.name)
    return answer(apps.public(deleted), 202)


@operation("Make a new secret for webhooks", tag="apps", path=_ONE, answers={200: HookSecret}, database=Database.WRITE)
async def renew_hook_secret(call: Call) -> web.Response:
    """The one before is void at once. 422 when SECRETS_KEY is not set, so that there can be none."""
    app, _ = await permitted(call, Action.APP_WRITE)
    hook_secret = await apps.renew_hook_secret(call.connection, call.context.keys, app.id)
    await _record(call, "app.hook-secret", app.id)
    return answer({"hook_secret": hook_secret, "hooks": _hooks(app.id)})


async def _record(call: Call, action: str, app_id: int, **details: Any) -> None:
    await audit.record(call.connection, call.identity.user_id, action, f"app:{app_id}", call.address, **details)
