"""The whole URL table."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from aiohttp import web

from gateway.api import (
    apps,
    auth,
    connections,
    deployments,
    docs,
    health,
    hooks,
    machines,
    members,
    projects,
    sessions,
    tokens,
    users,
    workspaces,
)
from gateway.operation import Handler, PathKind, operation_of
from gateway.realtime import sse, websocket

V1 = "/api/v1"


def routes() -> list[web.RouteDef]:
    """Every route, once for each address it has."""
    api = operations()
    return [
        *(_digits_only(route) for route in api),
        # Addresses that clients of the existing services use.
        _route("POST", "/auth", auth.swap),
        _route("GET", f"{V1}/health", health.health),
        _route("GET", "/ws", websocket.handle),
        _route("GET", f"{V1}/events", sse.handle, allow_head=False),
        _route("GET", "/metrics", health.metrics),
        _route("GET", "/api/openapi.json", docs.document(api, version("cluster-code"))),
        _route("GET", "/api/asyncapi.yaml", docs.asyncapi),
        _route("GET", "/api/docs", docs.docs),
        _route("GET", "/api/docs/{name}", docs.asset),
        _route("GET", "/static/{name}", docs.client),
        _route("GET", "/events", docs.events),
        _route("GET", "/", docs.home),
    ]


def operations() -> list[web.RouteDef]:
    """The routes that the OpenAPI document describes."""
    return [
        _route("POST", f"{V1}/auth/register", auth.register),
        _route("POST", f"{V1}/auth/login", auth.login),
        _route("POST", f"{V1}/auth/refresh", auth.renew),
        _route("POST", f"{V1}/auth/logout", auth.logout),
        _route("POST", f"{V1}/auth", auth.swap),
        _route("GET", f"{V1}/users/me", users.me),
        _route("PUT", f"{V1}/users/me", users.update_me),
        _route("GET", f"{V1}/users", users.list_users),
        _route("GET", f"{V1}/users/{{user_id}}", users.read),
        _route("PUT", f"{V1}/users/{{user_id}}", users.update),
        _route("DELETE", f"{V1}/users/{{user_id}}", users.delete),
        _route("GET", f"{V1}/tokens", tokens.list_tokens),
        _route("POST", f"{V1}/tokens", tokens.create),
        _route("DELETE", f"{V1}/tokens/{{token_id}}", tokens.delete),
        _route("GET", f"{V1}/workspaces", workspaces.list_workspaces),
        _route("POST", f"{V1}/workspaces", workspaces.create),
        _route("GET", f"{V1}/workspaces/{{workspace_id}}", workspaces.read),
        _route("PUT", f"{V1}/workspaces/{{workspace_id}}", workspaces.update),
        _route("DELETE", f"{V1}/workspaces/{{workspace_id}}", workspaces.delete),
        _route("GET", f"{V1}/workspaces/{{workspace_id}}/members", members.list_members),
        _route("POST", f"{V1}/workspaces/{{workspace_id}}/members", members.add),
        _route("PUT", f"{V1}/workspaces/{{workspace_id}}/members/{{user_id}}", members.change),
        _route("DELETE", f"{V1}/workspaces/{{workspace_id}}/members/{{user_id}}", members.remove),
        _route("GET", f"{V1}/projects", projects.list_projects),
        _route("POST", f"{V1}/projects", projects.create),
        _route("GET", f"{V1}/projects/{{project_id}}", projects.read),
        _route("PUT", f"{V1}/projects/{{project_id}}", projects.update),
        _route("DELETE", f"{V1}/projects/{{project_id}}", projects.delete),
        _route("GET", f"{V1}/sessions", sessions.list_sessions),
        _route("POST", f"{V1}/sessions", sessions.create),
        # It may make a session: a HEAD request must not.
        _route("GET", f"{V1}/sessions/project/{{project_uuid}}", sessions.get_or_create, allow_head=False),
        _route("GET", f"{V1}/sessions/{{session_id}}", sessions.read),
        _route("DELETE", f"{V1}/sessions/{{session_id}}", sessions.delete),
        _route("POST", f"{V1}/sessions/{{session_id}}/start", sessions.start),
        _route("POST", f"{V1}/sessions/{{session_id}}/stop", sessions.stop),
        _route("POST", f"{V1}/sessions/{{session_id}}/restart", sessions.restart),
        _route("PUT", f"{V1}/sessions/{{session_id}}/machine-config", sessions.change_machine_config),
        _route("GET", f"{V1}/sessions/{{session_id}}/events", sessions.history),
        _route("GET", f"{V1}/sessions/{{session_id}}/pods", sessions.pods),
        _route("GET", f"{V1}/sessions/{{session_id}}/logs", sessions.logs),
        _route("GET", f"{V1}/apps", apps.list_apps),
        _route("POST", f"{V1}/apps", apps.create),
        _route("GET", f"{V1}/apps/{{app_id}}", apps.read),
        _route("PUT", f"{V1}/apps/{{app_id}}", apps.update),
        _route("DELETE", f"{V1}/apps/{{app_id}}", apps.delete),
        _route("POST", f"{V1}/apps/{{app_id}}/hook-secret", apps.renew_hook_secret),
        _route("GET", f"{V1}/apps/{{app_id}}/deployments", deployments.list_deployments),
        _route("POST", f"{V1}/apps/{{app_id}}/deployments", deployments.create),
        _route("GET", f"{V1}/deployments/{{deployment_id}}", deployments.read),
        _route("GET", f"{V1}/deployments/{{deployment_id}}/logs", deployments.logs),
        _route("POST", f"{V1}/deployments/{{deployment_id}}/cancel", deployments.cancel),
        _route("POST", f"{V1}/deployments/{{deployment_id}}/rollback", deployments.roll_back),
        _route("POST", f"{V1}/hooks/{{app_id}}/github", hooks.github),
        _route("POST", f"{V1}/hooks/{{app_id}}/gitlab", hooks.gitlab),
        _route("POST", f"{V1}/hooks/{{app_id}}/generic", hooks.generic),
        _route("GET", f"{V1}/channels/{{channel}}/presence", connections.presence),
        _route("GET", f"{V1}/admin/connections", connections.list_connections),
        _route("POST", f"{V1}/admin/disconnect", connections.disconnect),
        _route("POST", f"{V1}/admin/revoke", connections.revoke),
        _route("GET", f"{V1}/providers", machines.providers),
        _route("POST", f"{V1}/providers", machines.add_provider),
        _route("GET", f"{V1}/providers/{{provider_id}}", machines.read_provider),
        _route("PUT", f"{V1}/providers/{{provider_id}}", machines.replace_provider),
        _route("DELETE", f"{V1}/providers/{{provider_id}}", machines.remove_provider),
        _route("GET", f"{V1}/machine-configs", machines.machine_configs),
        _route("POST", f"{V1}/machine-configs", machines.add_machine_config),
        _route("GET", f"{V1}/machine-configs/{{machine_config_id}}", machines.read_machine_config),
        _route("PUT", f"{V1}/machine-configs/{{machine_config_id}}", machines.replace_machine_config),
        _route("DELETE", f"{V1}/machine-configs/{{machine_config_id}}", machines.remove_machine_config),
        _route("GET", "/health", health.health),
        _route("GET", "/ready", health.ready),
    ]


def _digits_only(route: web.RouteDef) -> web.RouteDef:
    """The route with ids that are digits, so that `/users/me` with a method it lacks is no user named "me"."""
    handler: Any = route.handler
    declared = operation_of(handler)
    path = route.path
    for name in (name for name, kind in declared.path.items() if kind is PathKind.ID) if declared else ():
        path = path.replace(f"{{{name}}}", f"{{{name}:[0-9]+}}")
    return web.RouteDef(route.method, path, route.handler, route.kwargs)


def _route(method: str, path: str, handler: Handler, *, allow_head: bool = True) -> web.RouteDef:
    options = {"allow_head": allow_head} if method == "GET" else {}
    return web.RouteDef(method, path, handler, options)
