"""Providers and machine configs over REST: administered, permitted, and full."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from auth import api_tokens
from auth.permissions import Scope
from orchestrator.settings import DatabaseSettings
from tests.integration.gateway.conftest import Answer, Api, Person

PROVIDERS, CONFIGS = "/api/v1/providers", "/api/v1/machine-configs"
CLUSTER = {
    "name": "east",
    "kind": "kubernetes",
    "endpoint": "https://203.0.113.7:6443",
    "options": {"instance": "ours"},
    "credentials": {"token": {"env": "EAST_TOKEN"}, "certificate_authority": {"file": "/etc/ca.pem"}},
    "enabled": True,
    "default": False,
}
SMALL = {"name": "large", "provider": "here", "cpu": "500m", "memory": "1Gi"}


async def add(api: Api, root: Person, **given: Any) -> dict[str, Any]:
    """A machine config of the provider `here`."""
    made = await api.call("POST", CONFIGS, root, {"provider": "here", **given})
    assert made.status == 201, made.json
    return dict(made.json)


async def want(api: Api, who: Person, workspace: int | None = None, machine_config: str | None = None) -> Answer:
    """Make a session for a new project."""
    project = await api.project(workspace or who.workspace_id)
    body = {"project_uuid": project["uuid"]} | ({"machine_config": machine_config} if machine_config else {})
    return await api.call("POST", "/api/v1/sessions", who, body)


async def test_an_administrator_adds_changes_and_removes_a_provider(api: Api, root: Person) -> None:
    made = await api.call("POST", PROVIDERS, root, CLUSTER)
    assert (made.status, made.json["name"], made.json["state"]) == (201, "east", "unknown")
    assert made.json["definition"] == CLUSTER
    path = f"{PROVIDERS}/{made.json['id']}"
    assert made.headers["Location"] == path
    changed = await api.call("PUT", path, root, {"name": "east", "kind": "kubernetes", "enabled": False})
    assert (changed.status, changed.json["enabled"], changed.json["definition"]["credentials"]) == (200, False, {})
    assert (await api.call("GET", path, root)).json == changed.json
    assert (await api.call("POST", PROVIDERS, root, CLUSTER)).status == 409
    assert (await api.call("DELETE", path, root)).status == 204
    for method, body in (("GET", None), ("PUT", CLUSTER), ("DELETE", None)):
        assert (await api.call(method, path, root, body)).status == 404
    trail = await api.fetch("SELECT actor_id, action, object FROM audit_log ORDER BY id")
    assert [tuple(row) for row in trail] == [
        (root.id, action, "provider:east") for action in ("provider.add", "provider.change", "provider.remove")
    ]


async def test_an_administrator_adds_changes_and_removes_a_machine_config(api: Api, root: Person, ann: Person) -> None:
    made = await api.call("POST", CONFIGS, root, {**SMALL, "users": [ann.email, ann.id], "max_sessions": 2})
    definition = {
        "name": "large", "provider": "here", "default": False, "cpu": 0.5, "memory": 1 << 30, "disk": None,
        "services": {}, "options": {}, "users": [ann.id], "workspaces": [], "max_sessions": 2,
    }  # fmt: skip
    assert (made.status, made.json["definition"], made.json["max_sessions"]) == (201, definition, 2)
    path = f"{CONFIGS}/{made.json['id']}"
    assert made.headers["Location"] == path
    # What is read can be written.
    again = await api.call("PUT", path, root, {**definition, "default": True})
    assert (again.status, again.json["is_default"]) == (200, True)
    listed = (await api.call("GET", CONFIGS, root)).json["items"]
    assert [(one["name"], one["is_default"]) for one in listed] == [("large", True), ("small", False)]
    changed = await api.call("PUT", path, root, SMALL)
    assert (changed.json["is_default"], changed.json["definition"]["users"]) == (False, [])
    assert (await api.call("POST", CONFIGS, root, SMALL)).status == 409
    assert (await api.call("DELETE", path, root)).status == 204
    for method, body in (("GET", None), ("PUT", SMALL), ("DELETE", None)):
        assert (await api.call(method, path, root, body)).status == 404
    trail = await api.fetch("SELECT action, object FROM audit_log ORDER BY id")
    assert [tuple(row) for row in trail] == [
        (f"machine-config.{deed}", "machine-config:large") for deed in ("add", "change", "change", "remove")
    ]


async def test_members_read_and_administrators_change(api: Api, root: Person, ann: Person) -> None:
    provider = (await api.call("GET", PROVIDERS, ann)).json["items"][0]
    config = (await api.call("GET", CONFIGS, ann)).json["items"][0]
    assert "definition" not in {*provider, *config}
    assert (await api.call("GET", f"{PROVIDERS}/{provider['id']}", ann)).json == provider
    assert (await api.call("GET", f"{CONFIGS}/{config['id']}", ann)).json == config
    deeds: list[tuple[str, str, Any]] = [
        ("POST", PROVIDERS, CLUSTER), ("PUT", f"{PROVIDERS}/{provider['id']}", CLUSTER),
        ("DELETE", f"{PROVIDERS}/{provider['id']}", None), ("POST", CONFIGS, SMALL),
        ("PUT", f"{CONFIGS}/{config['id']}", SMALL), ("DELETE", f"{CONFIGS}/{config['id']}", None),
    ]  # fmt: skip
    async with api.pool.acquire() as connection:
        _, weak = await api_tokens.create(connection, root.id, "ci", [Scope.WRITE.value])
    for method, path, body in deeds:
        for who in (ann, weak):
            assert (await api.call(method, path, who, body)).status == 403, (method, path)
        assert (await api.call(method, path, None, body)).status == 401
    assert "definition" not in (await api.call("GET", f"{PROVIDERS}/{provider['id']}", weak)).json
    assert len((await api.call("GET", PROVIDERS, ann)).json["items"]) == 1


WRONG_PROVIDERS: list[tuple[dict[str, Any], str]] = [
    ({"name": "No"}, "name"),
    ({"kind": "cloud"}, "kind"),
    ({"colour": "red"}, "colour"),
    ({"enabled": "yes"}, "enabled"),
    ({"enabled": False, "default": True}, "default"),
    ({"options": {"instance": "-"}}, "options.instance"),
    ({"options": []}, "options"),
    ({"endpoint": "http://203.0.113.7"}, "endpoint"),
    ({"endpoint": "https://me:secret@203.0.113.7"}, "endpoint"),
    ({"endpoint": None}, "endpoint"),
    ({"options": {"context": "x"}}, "endpoint"),
    ({"credentials": {}}, "endpoint"),
    ({"credentials": {"token": "secret"}}, "credentials.token"),
    ({"credentials": {"token": {"value": "secret"}}}, "credentials.token"),
    ({"credentials": {"token": {"env": "1 secret"}}}, "credentials.token"),
    ({"credentials": {"token": {"file": "secret"}}}, "credentials.token"),
    ({"credentials": {"password": {"env": "X"}}}, "credentials.password"),
    ({"credentials": {"kubeconfig": {"env": "X"}, "token": {"env": "Y"}}}, "credentials"),
    ({"kind": "local"}, "endpoint"),
    ({"kind": "docker", "credentials": {}}, "endpoint"),
    ({"kind": "local", "endpoint": None, "options": {}}, "credentials.token"),
]


async def test_a_wrong_provider_is_refused_by_its_field(api: Api, root: Person) -> None:
    for wrong, field in WRONG_PROVIDERS:
        refused = await api.call("POST", PROVIDERS, root, {**CLUSTER, **wrong})
        assert (refused.status, field in refused.errors) == (422, True), (wrong, refused.json)
        assert b"secret" not in refused.body
    assert (await api.call("POST", PROVIDERS, root, CLUSTER)).status == 201
    twin = await api.call("POST", PROVIDERS, root, {**CLUSTER, "name": "twin"})
    assert (twin.status, list(twin.errors)) == (422, ["options.instance"])
    here = (await api.call("GET", PROVIDERS, root)).json["items"][1]
    assert here["name"] == "here"
    path = f"{PROVIDERS}/{here['id']}"
    renamed = await api.call("PUT", path, root, {"name": "there", "kind": "local"})
    assert (renamed.status, list(renamed.errors)) == (422, ["name"])
    # Its machine config `small` has no image.
    unfit = await api.call("PUT", path, root, {"name": "here", "kind": "docker"})
    assert (unfit.status, unfit.errors["kind"]) == (422, ["does not fit the machine configs of 'here': small"])


WRONG_CONFIGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"provider": "nowhere"}, ["provider"]),
    ({"cpu": 0, "memory": "lots"}, ["cpu", "memory"]),
    ({"services": {"web": {}}}, ["services.web"]),
    ({"services": {"chat": {"port": 70000}}}, ["services.chat.command", "services.chat.port"]),
    ({"options": {"cpu_seconds": "x"}}, ["options.cpu_seconds"]),
    ({"users": ["nobody@example.test"], "workspaces": [999]}, ["users", "workspaces"]),
    ({"users": [True]}, ["users.0"]),
    ({"max_sessions": 0}, ["max_sessions"]),
    ({"name": "other"}, ["name"]),
]


async def test_a_wrong_machine_config_is_refused_by_its_fields(api: Api, root: Person) -> None:
    made = await add(api, root, name="large")
    for wrong, wrong_fields in WRONG_CONFIGS:
        refused = await api.call("PUT", f"{CONFIGS}/{made['id']}", root, {**SMALL, **wrong})
        assert (refused.status, sorted(refused.errors)) == (422, wrong_fields), refused.json
    assert (await api.call("GET", f"{CONFIGS}/{made['id']}", root)).json == made


async def test_what_is_for_few_is_for_them_alone(api: Api, root: Person, ann: Person, bob: Person) -> None:
    team = await api.workspace(ann, member=bob)
    mine = await add(api, root, name="mine", users=[ann.email])
    ours = await add(api, root, name="ours", workspaces=[team])
    eve = await api.person()

    async def seen(who: Person) -> list[str]:
        return [one["name"] for one in (await api.call("GET", CONFIGS, who)).json["items"]]

    assert (await seen(ann), await seen(bob), await seen(eve)) == (
        ["mine", "ours", "small"], ["ours", "small"], ["small"],
    )  # fmt: skip
    assert (await api.call("GET", f"{CONFIGS}/{mine['id']}", bob)).status == 404
    assert (await api.call("GET", f"{CONFIGS}/{ours['id']}", bob)).status == 200
    assert [(await want(api, ann, team, name)).status for name in ("mine", "ours")] == [201, 201]
    # To whom it may not be shown, it is not there; who sees it in one workspace has it in no other.
    hidden = await want(api, bob, team, "mine")
    assert (hidden.status, hidden.errors["machine_config"]) == (
        422, ["There is no machine config 'mine'; there are: ours, small."]
    )  # fmt: skip
    elsewhere = await want(api, bob, machine_config="ours")
    assert (elsewhere.status, elsewhere.json["detail"]) == (
        403, "The machine config 'ours' is for projects of other workspaces."
    )  # fmt: skip
    assert [(await want(api, root, bob.workspace_id, name)).status for name in ("mine", "ours")] == [201, 201]


async def test_a_session_changes_to_what_its_user_may_use_only(
    api: Api, root: Person, ann: Person, bob: Person
) -> None:
    team = await api.workspace(ann, member=bob)
    await add(api, root, name="mine", users=[ann.id])
    await add(api, root, name="ours", workspaces=[ann.workspace_id])
    session = (await want(api, bob, team)).json
    path = f"/api/v1/sessions/{session['id']}/machine-config"
    refused = await api.call("PUT", path, bob, {"machine_config": "mine"})
    assert (refused.status, refused.errors["machine_config"]) == (
        422, ["There is no machine config 'mine' at the provider 'here'; there are: small."]
    )  # fmt: skip
    assert (await api.call("PUT", path, ann, {"machine_config": "ours"})).status == 403
    changed = await api.call("PUT", path, ann, {"machine_config": "mine"})
    assert (changed.status, changed.json["machine_config"]) == (202, "mine")
    # What it has it keeps, whoever starts it.
    for deed in ("stop", "start", "restart"):
        assert (await api.call("POST", f"/api/v1/sessions/{session['id']}/{deed}", bob)).status == 202


async def test_a_default_that_is_for_others_is_passed_over(api: Api, root: Person, ann: Person) -> None:
    await add(api, root, name="large", default=True, users=[root.id])
    project = await api.project(ann.workspace_id)
    made = await api.call("GET", f"/api/v1/sessions/project/{project['uuid']}", ann)
    assert (made.status, made.json["machine_config"]) == (201, "small")
    assert (await want(api, root, ann.workspace_id)).json["machine_config"] == "large"


async def test_a_full_machine_config_says_so(api: Api, root: Person, ann: Person) -> None:
    await add(api, root, name="gpu", max_sessions=2)
    answers = await asyncio.gather(*(want(api, ann, machine_config="gpu") for _ in range(6)))
    assert sorted(answer.status for answer in answers) == [201, 201, 409, 409, 409, 409]
    full = (
        "The machine config 'gpu' takes 2 sessions at a time, and 2 run or will: "
        "stop or delete one, or choose another machine config."
    )
    assert {answer.json["detail"] for answer in answers if answer.status == 409} == {full}
    first, second = (answer.json["id"] for answer in answers if answer.status == 201)
    other = (await want(api, ann)).json["id"]
    path = "/api/v1/sessions"
    changed = await api.call("PUT", f"{path}/{other}/machine-config", ann, {"machine_config": "gpu"})
    assert (changed.status, changed.json["detail"]) == (409, full)
    # It has its seat.
    assert (await api.call("PUT", f"{path}/{first}/machine-config", ann, {"machine_config": "gpu"})).status == 202
    assert (await api.call("POST", f"{path}/{first}/restart", ann)).status == 202
    assert (await api.call("POST", f"{path}/{first}/stop", ann)).status == 202
    assert (await api.call("PUT", f"{path}/{other}/machine-config", ann, {"machine_config": "gpu"})).status == 202
    started = await api.call("POST", f"{path}/{first}/start", ann)
    assert (started.status, started.json["detail"]) == (409, full)
    assert (await api.call("DELETE", f"{path}/{second}", ann)).status == 202
    assert (await api.call("POST", f"{path}/{first}/start", ann)).status == 202


async def test_of_concurrent_wishes_for_one_session_all_get_the_last_seat(api: Api, root: Person, ann: Person) -> None:
    await add(api, root, name="gpu", max_sessions=1, default=True)
    project = await api.project(ann.workspace_id)
    path = f"/api/v1/sessions/project/{project['uuid']}"
    answers = await asyncio.gather(*(api.call("GET", path, ann) for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 200, 200, 200, 201]
    assert len({answer.json["id"] for answer in answers}) == 1


async def test_what_is_in_use_stays_and_says_whose_it_is(api: Api, root: Person, ann: Person) -> None:
    provider = (await api.call("GET", PROVIDERS, root)).json["items"][0]
    config = (await api.call("GET", CONFIGS, root)).json["items"][0]
    session = (await want(api, ann)).json
    use = {"id": session["id"], "project_uuid": session["project_uuid"], "project": "site", "status": "pending"}
    for path, configs in ((f"{CONFIGS}/{config['id']}", []), (f"{PROVIDERS}/{provider['id']}", ["small"])):
        refused = await api.call("DELETE", path, root)
        assert (refused.status, refused.headers["Content-Type"]) == (409, "application/problem+json")
        assert refused.json["in_use_by"] == {"machine_configs": configs, "sessions": [use], "sessions_total": 1}
        assert f"the session {session['id']} (project site, pending)" in refused.json["detail"]
    await api.fetch("UPDATE sessions SET status = 'deleted', desired = 'deleted'")
    assert (await api.call("DELETE", f"{CONFIGS}/{config['id']}", root)).status == 204
    assert (await api.call("DELETE", f"{PROVIDERS}/{provider['id']}", root)).status == 204


@pytest.mark.parametrize("deed", ["add", "change", "remove"])
async def test_orchestrators_are_told_of_a_change(
    api: Api, root: Person, database_settings: DatabaseSettings, deed: str
) -> None:
    (row,) = await api.fetch("INSERT INTO providers (name, kind) VALUES ('spare', 'local') RETURNING id")
    path, spare = f"{PROVIDERS}/{row['id']}", {"name": "spare", "kind": "local", "enabled": False}
    told = asyncio.Event()
    connection = await asyncpg.connect(database_settings.url)
    try:
        await connection.add_listener("providers", lambda *_: told.set())
        match deed:
            case "add":
                await api.call("POST", PROVIDERS, root, {**spare, "name": "more"})
            case "change":
                await api.call("PUT", path, root, spare)
            case _:
                await api.call("DELETE", path, root)
        async with asyncio.timeout(30):
            await told.wait()
    finally:
        await connection.close()
