from __future__ import annotations

import pytest

from tests.integration.gateway.conftest import Api, Person
from tests.integration.gateway.test_users import told


async def test_who_makes_a_workspace_owns_it(api: Api, ann: Person) -> None:
    made = await api.call("POST", "/api/v1/workspaces", ann, {"name": "team"})
    assert (made.status, made.json["role"], made.json["personal"]) == (201, "owner", False)
    read = await api.call("GET", made.headers["Location"], ann)
    assert read.json == made.json
    renamed = await api.call("PUT", made.headers["Location"], ann, {"name": "crew"})
    assert renamed.json["name"] == "crew"
    listed = await api.call("GET", "/api/v1/workspaces", ann)
    assert [workspace["name"] for workspace in listed.json["items"]] == ["crew", "Somebody"]
    assert (await api.call("DELETE", made.headers["Location"], ann)).status == 204
    assert (await api.call("GET", made.headers["Location"], ann)).status == 404


async def test_an_administrator_sees_all_workspaces(api: Api, ann: Person, root: Person) -> None:
    workspace = await api.workspace(ann)
    read = await api.call("GET", f"/api/v1/workspaces/{workspace}", root)
    assert (read.status, read.json["role"]) == (200, None)
    listed = await api.call("GET", "/api/v1/workspaces", root)
    assert listed.json["pagination"]["total"] == 3


async def test_a_workspace_with_projects_stays(api: Api, ann: Person) -> None:
    workspace = await api.workspace(ann)
    await api.project(workspace)
    answer = await api.call("DELETE", f"/api/v1/workspaces/{workspace}", ann)
    assert (answer.status, list(answer.errors)) == (409, ["projects"])


async def test_a_personal_workspace_goes_with_its_user_only(api: Api, ann: Person) -> None:
    answer = await api.call("DELETE", f"/api/v1/workspaces/{ann.workspace_id}", ann)
    assert answer.status == 422


async def test_all_members_are_told_when_a_workspace_goes(api: Api, ann: Person, bob: Person) -> None:
    workspace = await api.workspace(ann, viewer=bob)
    await api.call("DELETE", f"/api/v1/workspaces/{workspace}", ann)
    assert sorted(await told(api)) == sorted([ann.id, bob.id])


@pytest.mark.parametrize("by", ["user_id", "email"])
async def test_a_member_is_added_by_id_or_address(api: Api, ann: Person, bob: Person, by: str) -> None:
    workspace = await api.workspace(ann)
    path = f"/api/v1/workspaces/{workspace}/members"
    who = {"user_id": bob.id} if by == "user_id" else {"email": bob.email.upper()}
    added = await api.call("POST", path, ann, {**who, "role": "viewer"})
    assert (added.status, added.json["user_id"], added.json["role"]) == (201, bob.id, "viewer")
    members = (await api.call("GET", path, bob)).json
    assert [(member["user_id"], member["role"]) for member in members["items"]] == [
        (ann.id, "owner"), (bob.id, "viewer"),
    ]  # fmt: skip
    assert members["pagination"]["total"] == 2
    assert (await api.call("POST", path, ann, {**who, "role": "viewer"})).status == 409


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"role": "viewer"}, "user_id"),
    ({"role": "viewer", "user_id": 1, "email": "a@b.c"}, "user_id"),
    ({"role": "viewer", "email": "nobody@example.test"}, "email"),
    ({"role": "viewer", "user_id": 10**15}, "user_id"),
    ({"role": "king", "user_id": 1}, "role"),
    ({"user_id": 1}, "role"),
]


async def test_a_member_that_cannot_be_is_refused(api: Api, ann: Person) -> None:
    path = f"/api/v1/workspaces/{await api.workspace(ann)}/members"
    for body, field in REFUSED:
        answer = await api.call("POST", path, ann, body)
        assert (answer.status, list(answer.errors)) == (422, [field]), body


async def test_a_role_changes_and_the_member_is_told(api: Api, ann: Person, bob: Person) -> None:
    path = f"/api/v1/workspaces/{await api.workspace(ann, viewer=bob)}/members/{bob.id}"
    changed = await api.call("PUT", path, ann, {"role": "admin"})
    assert (changed.status, changed.json["role"]) == (200, "admin")
    assert await told(api) == [bob.id]


async def test_a_removed_member_sees_nothing_more_and_is_told(api: Api, ann: Person, bob: Person) -> None:
    workspace = await api.workspace(ann, viewer=bob)
    assert (await api.call("DELETE", f"/api/v1/workspaces/{workspace}/members/{bob.id}", ann)).status == 204
    assert (await api.call("GET", f"/api/v1/workspaces/{workspace}", bob)).status == 404
    assert await told(api) == [bob.id]
    [row] = await api.fetch("SELECT actor_id, details FROM audit_log WHERE action = 'member.remove'")
    assert (row["actor_id"], row["details"]) == (ann.id, {"user_id": bob.id})


async def test_whoever_wants_may_leave(api: Api, ann: Person, bob: Person) -> None:
    workspace = await api.workspace(ann, viewer=bob)
    assert (await api.call("DELETE", f"/api/v1/workspaces/{workspace}/members/{ann.id}", bob)).status == 403
    assert (await api.call("DELETE", f"/api/v1/workspaces/{workspace}/members/{bob.id}", bob)).status == 204


async def test_the_last_owner_stays(api: Api, ann: Person, root: Person) -> None:
    path = f"/api/v1/workspaces/{await api.workspace(ann)}/members/{ann.id}"
    assert (await api.call("DELETE", path, ann)).status == 422
    assert (await api.call("PUT", path, root, {"role": "viewer"})).status == 422


async def test_only_owners_make_owners(api: Api, ann: Person, bob: Person, root: Person) -> None:
    path = f"/api/v1/workspaces/{await api.workspace(ann, admin=bob)}/members"
    carol = await api.person()
    assert (await api.call("POST", path, bob, {"user_id": carol.id, "role": "owner"})).status == 403
    assert (await api.call("PUT", f"{path}/{ann.id}", bob, {"role": "viewer"})).status == 403
    assert (await api.call("POST", path, root, {"user_id": carol.id, "role": "owner"})).status == 201


async def test_what_happens_in_a_workspace_is_told_on_its_channel(api: Api, ann: Person, bob: Person) -> None:
    workspace = (await api.call("POST", "/api/v1/workspaces", ann, {"name": "team"})).json["id"]
    where = f"/api/v1/workspaces/{workspace}"
    await api.call("PUT", where, ann, {"name": "crew"})
    await api.call("POST", f"{where}/members", ann, {"user_id": bob.id, "role": "viewer"})
    await api.call("PUT", f"{where}/members/{bob.id}", ann, {"role": "member"})
    made = await api.call("POST", "/api/v1/projects", bob, {"workspace_id": workspace, "name": "site"})
    project = made.headers["Location"]
    await api.call("PUT", project, bob, {"branch": "main", "env": {"SECRET": "x"}})
    await api.call("DELETE", project, ann)
    await api.call("DELETE", f"{where}/members/{bob.id}", ann)
    await api.call("DELETE", where, ann)
    rows = await api.fetch("SELECT event_type, channel, data FROM outbox WHERE channel <> 'gateway' ORDER BY id")
    told = [(row["event_type"], row["channel"]) for row in rows]
    team, anns, bobs = f"workspace:{workspace}", f"user:{ann.id}", f"user:{bob.id}"
    assert told == [
        ("workspace.created", team), ("workspace.created", anns), ("workspace.updated", team),
        ("member.added", team), ("member.added", bobs), ("member.updated", team), ("member.updated", bobs),
        ("project.created", team), ("project.updated", team), ("project.deleted", team),
        ("member.removed", team), ("member.removed", bobs), ("workspace.deleted", team),
    ]  # fmt: skip
    assert "SECRET" not in "".join(row["data"] for row in rows)
