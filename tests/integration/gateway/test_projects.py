from __future__ import annotations

from typing import Any
from uuid import uuid4

from tests.integration.gateway.conftest import Api, Person, Serve

NASTY = "Robert'); DROP TABLE users;-- $(rm -rf /) `id` \"\\ | & ; <b> %s {0} ../..日本"


async def test_a_project_is_made_read_changed_and_deleted(api: Api, ann: Person) -> None:
    body = {
        "workspace_id": ann.workspace_id, "name": "site", "repo_url": "https://example.org/site.git", "branch": "main",
        "env": {"KEY": "value"},
    }  # fmt: skip
    made = await api.call("POST", "/api/v1/projects", ann, body)
    assert made.status == 201
    assert {key: made.json[key] for key in body} == body
    assert made.json["created_by"] == ann.id
    path = made.headers["Location"]
    assert (await api.call("GET", path, ann)).json == made.json

    changed = await api.call("PUT", path, ann, {"branch": None, "env": {"OTHER": "x"}})
    assert (changed.json["branch"], changed.json["env"], changed.json["name"]) == (None, {"OTHER": "x"}, "site")
    assert (await api.call("PUT", path, ann, {})).json["env"] == {"OTHER": "x"}

    assert (await api.call("DELETE", path, ann)).status == 204
    assert (await api.call("GET", path, ann)).status == 404


async def test_what_a_project_says_of_its_chart_is_kept_and_replaced_as_a_whole(
    api: Api, ann: Person, bob: Person
) -> None:
    workspace = await api.workspace(ann, viewer=bob)
    values = {
        "services": {"preview": {"image": "example.org/site:1", "command": ["serve"], "args": ["-p", "3000"]},
                     "vscode": {"env": {"THEME": NASTY}}}
    }  # fmt: skip
    body = {"workspace_id": workspace, "name": "site", "chart_values": values}
    made = await api.call("POST", "/api/v1/projects", ann, body)
    assert (made.status, made.json["chart_values"]) == (201, values)
    path = made.headers["Location"]
    assert (await api.call("GET", path, ann)).json["chart_values"] == values
    assert (await api.call("GET", path, bob)).json["chart_values"] is None
    assert (await api.call("GET", "/api/v1/projects", ann)).json["items"][0]["chart_values"] is None
    assert (await api.call("PUT", path, ann, {"name": "app"})).json["chart_values"] == values
    other = {"services": {"chat": {"image": "example.org/chat"}}}
    assert (await api.call("PUT", path, ann, {"chart_values": other})).json["chart_values"] == other
    assert (await api.call("PUT", path, ann, {"chart_values": {}})).json["chart_values"] == {}


async def test_a_project_says_nothing_of_its_chart_unasked(api: Api, ann: Person) -> None:
    made = await api.call("POST", "/api/v1/projects", ann, {"workspace_id": ann.workspace_id, "name": "site"})
    assert made.json["chart_values"] == {}


async def test_names_and_values_are_kept_verbatim(api: Api, ann: Person) -> None:
    env = {"A": NASTY + "\n\t"}
    made = await api.call(
        "POST", "/api/v1/projects", ann, {"workspace_id": ann.workspace_id, "name": NASTY, "env": env}
    )
    assert made.status == 201
    read = await api.call("GET", made.headers["Location"], ann)
    assert (read.json["name"], read.json["env"]) == (NASTY, env)


async def test_a_project_can_bring_its_uuid_once(api: Api, ann: Person) -> None:
    body = {"workspace_id": ann.workspace_id, "name": "site", "uuid": str(uuid4())}
    assert (await api.call("POST", "/api/v1/projects", ann, body)).json["uuid"] == body["uuid"]
    again = await api.call("POST", "/api/v1/projects", ann, body)
    assert (again.status, list(again.errors)) == (409, ["uuid"])


async def test_projects_are_listed_by_workspace(api: Api, ann: Person, bob: Person, root: Person) -> None:
    team = await api.workspace(ann)
    first, second = await api.project(ann.workspace_id), await api.project(team)
    await api.project(bob.workspace_id)

    async def ids(who: Person, query: str = "") -> list[int]:
        answer = await api.call("GET", f"/api/v1/projects{query}", who)
        return [project["id"] for project in answer.json["items"]]

    assert await ids(ann) == [second["id"], first["id"]]
    assert await ids(ann, f"?workspace_id={team}") == [second["id"]]
    assert await ids(bob, f"?workspace_id={team}") == []
    assert len(await ids(root)) == 3


async def test_only_members_see_the_credentials_in_a_url(api: Api, ann: Person, bob: Person) -> None:
    workspace = await api.workspace(ann, viewer=bob)
    url = "https://name:secret@example.org/site?token=t"
    body = {"workspace_id": workspace, "name": "site", "repo_url": url}
    made = await api.call("POST", "/api/v1/projects", ann, body)
    where = made.headers["Location"]
    assert (await api.call("GET", where, ann)).json["repo_url"] == url
    assert (await api.call("GET", where, bob)).json["repo_url"] == "https://example.org/site"
    listed = await api.call("GET", f"/api/v1/projects?workspace_id={workspace}", ann)
    assert [project["repo_url"] for project in listed.json["items"]] == ["https://example.org/site"]


async def test_viewers_do_not_see_the_environment(api: Api, ann: Person, bob: Person) -> None:
    workspace = await api.workspace(ann, viewer=bob)
    made = await api.call(
        "POST", "/api/v1/projects", ann, {"workspace_id": workspace, "name": "site", "env": {"SECRET": "x"}}
    )
    assert (await api.call("GET", made.headers["Location"], bob)).json["env"] is None
    assert (await api.call("GET", made.headers["Location"], ann)).json["env"] == {"SECRET": "x"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"repo_url": "ext::sh -c id"}, "repo_url"),
    ({"repo_url": "file:///etc"}, "repo_url"),
    ({"repo_url": "--upload-pack=id"}, "repo_url"),
    ({"branch": "--upload-pack=id"}, "branch"),
    ({"branch": "a..b"}, "branch"),
    ({"env": {"1": "x"}}, "env.1.key"),
    ({"env": {"A": "x\x00"}}, "env.A.value"),
    ({"chart_values": {"replicas": 3}}, "chart_values.replicas"),
    ({"chart_values": {"services": {"shell": {}}}}, "chart_values.services.shell"),
    ({"chart_values": {"services": {"chat": {"image": "--help"}}}}, "chart_values.services.chat.image"),
    ({"chart_values": {"services": {"chat": {"image": "a\n"}}}}, "chart_values.services.chat.image"),
    ({"chart_values": {"services": {"chat": {"env": {"1": "x"}}}}}, "chart_values.services.chat.env.1"),
    ({"chart_values": {"services": {"chat": {"args": ["x" * (64 << 10)]}}}}, "chart_values"),
    ({"chart_values": None}, "chart_values"),
    ({"name": "\x00"}, "name"),
    ({"name": "x" * 201}, "name"),
]


async def test_what_must_not_reach_git_or_a_process_is_refused(api: Api, ann: Person) -> None:
    project = await api.project(ann.workspace_id)
    for change, field in REFUSED:
        body = {"workspace_id": ann.workspace_id, "name": "site", **change}
        made = await api.call("POST", "/api/v1/projects", ann, body)
        assert (made.status, list(made.errors)) == (422, [field]), change
        changed = await api.call("PUT", f"/api/v1/projects/{project['id']}", ann, change)
        assert (changed.status, list(changed.errors)) == (422, [field]), change


async def test_allowed_schemes_are_configured(serve: Serve) -> None:
    api = await serve(repo_schemes=["https"])
    ann = await api.person()
    body = {"workspace_id": ann.workspace_id, "name": "site", "repo_url": "git@example.org:site"}
    assert (await api.call("POST", "/api/v1/projects", ann, body)).status == 422


async def test_a_project_with_a_session_stays(api: Api, ann: Person) -> None:
    project = await api.project(ann.workspace_id)
    await api.session(ann, project)
    answer = await api.call("DELETE", f"/api/v1/projects/{project['id']}", ann)
    assert (answer.status, list(answer.errors)) == (409, ["session"])


async def test_a_workspace_that_does_not_exist_is_404_for_administrators_too(api: Api, root: Person) -> None:
    answer = await api.call("POST", "/api/v1/projects", root, {"workspace_id": 10**12, "name": "x"})
    assert answer.status == 404
