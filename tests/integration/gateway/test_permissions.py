"""Each route, by each role: 404 for who may not see, 403 for who may see but not do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.integration.gateway.conftest import Api, Person

NOBODY, VIEWER, MEMBER, ADMIN, OWNER, ROOT = "nobody", "viewer", "member", "admin", "owner", "root"
ORDER = [VIEWER, MEMBER, ADMIN, OWNER]


@dataclass(frozen=True)
class Rule:
    """What the least role that may do this is answered; lower ones get 403, and who is no member 404."""

    least: str
    method: str
    path: str
    status: int
    body: dict[str, Any] | None = None


RULES = [
    Rule(VIEWER, "GET", "/workspaces/{workspace}", 200),
    Rule(VIEWER, "GET", "/workspaces/{workspace}/members", 200),
    Rule(VIEWER, "GET", "/projects/{project}", 200),
    Rule(VIEWER, "GET", "/sessions/{session}", 200),
    Rule(VIEWER, "GET", "/sessions/{session}/events", 200),
    Rule(VIEWER, "GET", "/sessions/{session}/logs", 200),
    Rule(VIEWER, "GET", "/sessions/project/{uuid}", 200),
    Rule(VIEWER, "GET", "/apps/{app}", 200),
    Rule(VIEWER, "GET", "/apps/{app}/deployments", 200),
    Rule(VIEWER, "GET", "/deployments/{deployment}", 200),
    Rule(VIEWER, "GET", "/deployments/{deployment}/logs", 200),
    Rule(MEMBER, "POST", "/apps", 409, {"workspace_id": 0, "name": "shop", "repo_url": "https://git.test/shop"}),
    Rule(MEMBER, "PUT", "/apps/{app}", 200, {"port": 3000}),
    Rule(MEMBER, "POST", "/apps/{app}/deployments", 201, {"branch": "main"}),
    Rule(MEMBER, "POST", "/apps/{app}/hook-secret", 422),
    Rule(MEMBER, "POST", "/deployments/{ended}/cancel", 409),
    Rule(MEMBER, "POST", "/deployments/{ended}/rollback", 201),
    Rule(MEMBER, "POST", "/projects", 201, {"workspace_id": 0, "name": "x"}),
    Rule(MEMBER, "PUT", "/projects/{project}", 200, {"name": "x"}),
    Rule(MEMBER, "POST", "/sessions", 202, {"project_id": 0}),
    Rule(MEMBER, "POST", "/sessions/{session}/start", 202),
    Rule(MEMBER, "POST", "/sessions/{session}/restart", 202),
    Rule(MEMBER, "POST", "/sessions/{session}/stop", 202),
    Rule(ADMIN, "PUT", "/workspaces/{workspace}", 200, {"name": "x"}),
    Rule(ADMIN, "POST", "/workspaces/{workspace}/members", 201, {"role": "viewer", "user_id": 0}),
    Rule(ADMIN, "PUT", "/workspaces/{workspace}/members/{guest}", 200, {"role": "member"}),
    Rule(ADMIN, "DELETE", "/workspaces/{workspace}/members/{guest}", 204),
    Rule(ADMIN, "DELETE", "/projects/{spare}", 204),
    Rule(ADMIN, "DELETE", "/apps/{spare_app}", 202),
    Rule(MEMBER, "DELETE", "/sessions/{session}", 202),
    Rule(OWNER, "DELETE", "/workspaces/{spare_workspace}", 204),
]


@dataclass
class Stage:
    """A workspace with one person of each role, and what the rules are about."""

    people: dict[str, Person]
    ids: dict[str, Any]


@pytest.fixture
async def stage(api: Api) -> Stage:
    people = {role: await api.person(is_admin=role == ROOT) for role in (NOBODY, *ORDER, ROOT)}
    members = {role: people[role] for role in (VIEWER, MEMBER, ADMIN)}
    guest = await api.person()
    workspace = await api.workspace(people[OWNER], **members)
    project = await api.project(workspace)
    session = await api.session(people[OWNER], project)
    async with api.pool.acquire() as connection:
        await connection.execute("INSERT INTO workspace_members VALUES ($1, $2, 'viewer')", workspace, guest.id)
    ids = {
        **await _apps(api, workspace),
        "workspace": workspace,
        "spare_workspace": await api.workspace(people[OWNER], **members),
        "project": project["id"],
        "uuid": project["uuid"],
        "spare": (await api.project(workspace))["id"],
        "session": session["id"],
        "guest": guest.id,
    }
    return Stage(people, ids)


async def _apps(api: Api, workspace: int) -> dict[str, int]:
    """An app with a deployment that served, another one, and one app more."""
    apps = await api.fetch(
        """INSERT INTO apps (workspace_id, name, repo_url, settings, last_number)
           SELECT $1, name, 'https://git.test/shop', '{}', 2 FROM unnest('{shop,spare}'::text[]) AS name
           RETURNING id""",
        workspace,
    )
    deployments = await api.fetch(
        """INSERT INTO deployments (app_id, workspace_id, number, cause, repo_url, settings, status, image, image_id,
                                    finished_at)
           SELECT $1, $2, number, 'manual', 'https://git.test/shop', '{}', 'retired', 'i', 'sha256:1', now()
             FROM generate_series(1, 2) AS number RETURNING id""",
        apps[0]["id"],
        workspace,
    )
    return {
        "app": apps[0]["id"],
        "spare_app": apps[1]["id"],
        "deployment": deployments[0]["id"],
        "ended": deployments[1]["id"],
    }


async def ask(api: Api, stage: Stage, rule: Rule, who: str) -> int:
    body = dict(rule.body) if rule.body else None
    for name, value in {"workspace_id": stage.ids["workspace"], "project_id": stage.ids["project"]}.items():
        if body and name in body:
            body[name] = value
    if body and "user_id" in body:
        body["user_id"] = (await api.person()).id
    return (await api.call(rule.method, "/api/v1" + rule.path.format(**stage.ids), stage.people[who], body)).status


async def test_who_is_no_member_does_not_even_see_it(api: Api, stage: Stage) -> None:
    found = {f"{rule.method} {rule.path}": await ask(api, stage, rule, NOBODY) for rule in RULES}
    assert found == dict.fromkeys(found, 404)


async def test_members_of_too_low_a_role_are_forbidden(api: Api, stage: Stage) -> None:
    found = {
        f"{who} {rule.method} {rule.path}": await ask(api, stage, rule, who)
        for rule in RULES
        for who in ORDER[: ORDER.index(rule.least)]
    }
    assert found == dict.fromkeys(found, 403)


@pytest.mark.parametrize("who", [*ORDER, ROOT])
async def test_who_has_the_role_may(api: Api, stage: Stage, who: str) -> None:
    mine = [rule for rule in RULES if who == ROOT or ORDER.index(who) >= ORDER.index(rule.least)]
    found = {f"{rule.method} {rule.path}": await ask(api, stage, rule, who) for rule in mine}
    assert found == {f"{rule.method} {rule.path}": rule.status for rule in mine}
