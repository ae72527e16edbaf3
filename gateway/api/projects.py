"""Projects: a Git repository with its environment, in a workspace."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web
from marshmallow import Schema, ValidationError, fields

from auth import audit, projects, tenants
from auth.errors import NotVisible
from auth.permissions import Action, Role, decide
from auth.projects import Project as Row
from gateway import lifecycle
from gateway.fields import (
    PageQuery,
    Text,
    Uuid,
    environment,
    moment,
    object_id,
    object_id_in_query,
    page_of,
)
from gateway.operation import Call, Database, PathKind, answer, nothing, operation, page
from gateway.repository import check_branch, check_repo_url, without_secrets
from orchestrator.machine_kinds import ChartValuesSchema

# Bytes. A release keeps all its values in one Secret, which takes 1 MiB.
_LARGEST_CHART_VALUES = 64 << 10


def _chart_fits(values: dict[str, Any]) -> None:
    if len(orjson.dumps(values)) > _LARGEST_CHART_VALUES:
        raise ValidationError(f"Longer than {_LARGEST_CHART_VALUES} bytes of JSON.")


def _chart_values() -> fields.Nested:
    return fields.Nested(
        ChartValuesSchema,
        validate=_chart_fits,
        metadata={
            "description": "What of a session's containers is otherwise than its machine config has it. For Kubernetes."
        },
    )


class NewProject(Schema):
    """A project to be made."""

    workspace_id = object_id(required=True)
    name = Text(required=True)
    repo_url = Text(most=2048, allow_none=True)
    branch = Text(most=200, allow_none=True)
    env = environment("Environment variables, by name.")
    chart_values = _chart_values()
    uuid = Uuid(metadata={"description": "For projects that another service owns; else a random one."})


class ProjectChanges(Schema):
    """What of a project can change. Sessions take it up at their next start."""

    name = Text()
    repo_url = Text(most=2048, allow_none=True)
    branch = Text(most=200, allow_none=True)
    env = environment("Environment variables, by name.")
    chart_values = _chart_values()


class Project(Schema):
    """A project. `env` and `chart_values` are null in lists, and for viewers, since they may hold secrets."""

    id = fields.Integer(required=True)
    uuid = fields.UUID(required=True)
    workspace_id = fields.Integer(required=True)
    name = fields.String(required=True)
    repo_url = fields.String(required=True, allow_none=True)
    branch = fields.String(required=True, allow_none=True)
    env = fields.Dict(keys=fields.String(), values=fields.String(), required=True, allow_none=True)
    chart_values = fields.Nested(ChartValuesSchema, required=True, allow_none=True)
    created_by = fields.Integer(required=True, allow_none=True)
    created_at = moment()
    updated_at = moment()


class ProjectsQuery(PageQuery):
    """Which projects."""

    workspace_id = object_id_in_query()


def _public(project: Row, *, with_env: bool) -> dict[str, Any]:
    """`with_env`: with what may be secret, that is the environments and the credentials in the URL."""
    repo_url = project.repo_url
    return {
        "id": project.id,
        "uuid": str(project.uuid),
        "workspace_id": project.workspace_id,
        "name": project.name,
        "repo_url": repo_url if with_env or repo_url is None else without_secrets(repo_url),
        "branch": project.branch,
        "env": project.env if with_env else None,
        "chart_values": project.chart_values if with_env else None,
        "created_by": project.created_by,
        "created_at": project.created_at,
        "updated_at": project.updated_at,
    }


def _sees_env(call: Call, role: Role | None) -> bool:
    return call.identity.is_admin or (role is not None and role >= Role.MEMBER)


async def _permitted(call: Call, action: Action) -> tuple[Row, Role | None]:
    """The project of the path and the caller's role in its workspace. Raises NotVisible or Forbidden."""
    found = await projects.with_role(call.connection, user_id=call.identity.user_id, id=call.path["project_id"])
    if found is None:
        raise NotVisible("There is no such project.")
    decide(call.identity, action, found[1], what="project")
    return found


def _check_repository(call: Call) -> None:
    if (url := call.body.get("repo_url")) is not None:
        check_repo_url(url, call.context.settings.repo_schemes)
    if (branch := call.body.get("branch")) is not None:
        check_branch(branch)


@operation("List projects", tag="projects", query=ProjectsQuery, answers={200: page_of(Project)})
async def list_projects(call: Call) -> web.Response:
    """Those of the caller's workspaces, newest first; administrators see all. In lists, and for viewers, without
    environments and credentials."""
    query = call.query
    items, total = await projects.list_page(
        call.connection,
        call.identity,
        query["page"],
        query["page_size"],
        workspace_id=query.get("workspace_id"),
    )
    return answer(page([_public(project, with_env=False) for project in items], total, query))


@operation("Make a project", tag="projects", body=NewProject, answers={201: Project}, database=Database.WRITE)
async def create(call: Call) -> web.Response:
    """For members of the workspace."""
    _check_repository(call)
    body, identity = dict(call.body), call.identity
    workspace_id = body.pop("workspace_id")
    role = await tenants.role_in(call.connection, workspace_id, identity.user_id)
    decide(identity, Action.PROJECT_WRITE, role, what="workspace")
    project = await projects.create(call.connection, workspace_id, created_by=identity.user_id, **body)
    await _changed(call, "project.created", project)
    return answer(_public(project, with_env=True), 201, location=f"/api/v1/projects/{project.id}")


@operation("Read a project", tag="projects", path={"project_id": PathKind.ID}, answers={200: Project})
async def read(call: Call) -> web.Response:
    """For members of its workspace."""
    project, role = await _permitted(call, Action.PROJECT_READ)
    return answer(_public(project, with_env=_sees_env(call, role)))


@operation(
    "Change a project",
    tag="projects",
    path={"project_id": PathKind.ID},
    body=ProjectChanges,
    answers={200: Project},
    database=Database.WRITE,
)
async def update(call: Call) -> web.Response:
    """What is not given stays; `env` and `chart_values` are replaced as a whole."""
    _check_repository(call)
    project, _ = await _permitted(call, Action.PROJECT_WRITE)
    changes: Any = call.body
    changed = await projects.update(call.connection, project.id, **changes)
    await _changed(call, "project.updated", changed, fields=sorted(changes))
    return answer(_public(changed, with_env=True))


@operation(
    "Delete a project",
    tag="projects",
    path={"project_id": PathKind.ID},
    answers={204: None},
    database=Database.WRITE,
)
async def delete(call: Call) -> web.Response:
    """For admins and owners of its workspace. 409 while it has a session."""
    project, _ = await _permitted(call, Action.PROJECT_DELETE)
    await projects.delete(call.connection, project.id)
    await _changed(call, "project.deleted", project)
    return nothing()


async def _changed(call: Call, what: str, project: Row, **details: Any) -> None:
    data = {
        "id": project.id,
        "uuid": str(project.uuid),
        "workspace_id": project.workspace_id,
        "name": project.name,
        "branch": project.branch,
    }
    await lifecycle.tell(call.connection, what, data, workspace_id=project.workspace_id)
    action = what.removesuffix("d")
    await audit.record(call.connection, call.identity.user_id, action, f"project:{project.id}", call.address, **details)
