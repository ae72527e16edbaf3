from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any
from uuid import uuid4

import orjson

from orchestrator.sessions import store
from tests.integration.gateway.conftest import Api, Person, Serve


async def set_status(api: Api, session: dict[str, Any], **columns: Any) -> None:
    """Do what an orchestrator would."""
    names = ", ".join(f"{name} = ${number}" for number, name in enumerate(columns, start=2))
    await api.fetch(f"UPDATE sessions SET {names} WHERE id = $1", session["id"], *columns.values())  # noqa: S608  Ours.


async def test_a_session_is_made_for_a_project_once(api: Api, ann: Person) -> None:
    project = await api.project(ann.workspace_id)
    made = await api.call("POST", "/api/v1/sessions", ann, {"project_id": project["id"]})
    assert made.status == 201
    assert made.headers["Location"] == f"/api/v1/sessions/{made.json['id']}"
    assert {key: made.json[key] for key in ("project_uuid", "project_id", "user_id", "provider", "machine_config")} == {
        "project_uuid": project["uuid"], "project_id": project["id"], "user_id": ann.id, "provider": "here",
        "machine_config": "small",
    }  # fmt: skip
    assert (made.json["status"], made.json["desired"]) == ("pending", "running")
    again = await api.call("POST", "/api/v1/sessions", ann, {"project_uuid": project["uuid"]})
    assert (again.status, again.json) == (202, made.json)


async def test_a_session_carries_all_that_clients_expect(api: Api, ann: Person) -> None:
    session = await api.session(ann, await api.project(ann.workspace_id))
    assert {
        "id", "project_uuid", "project_id", "user_id", "provider", "machine_config", "namespace", "container_name",
        "status", "reason", "message", "ip_address", "preview_url", "preview_path", "chat_url", "chat_path",
        "vscode_url", "vscode_path", "expires_at", "created_at", "updated_at",
    } <= set(session)  # fmt: skip
    assert session["expires_at"][:4] == str(int(session["created_at"][:4]) + 1)


async def test_a_session_is_answered_everywhere_as_events_tell_it(api: Api, ann: Person) -> None:
    session = await api.session(ann, await api.project(ann.workspace_id))
    async with api.pool.acquire() as connection:
        found = await store.get(connection, session["id"])
    assert found is not None
    assert session == store.public(found)
    assert (await api.call("GET", "/api/v1/sessions", ann)).json["items"] == [session]


async def test_making_a_session_tells_its_channels(api: Api, ann: Person) -> None:
    session = await api.session(ann, await api.project(ann.workspace_id))
    rows = await api.fetch("SELECT event_type, channel FROM outbox ORDER BY id")
    assert {tuple(row) for row in rows} == {
        ("session.status", f"session:{session['id']}"), ("session.status", f"user:{ann.id}"),
        ("session.status", f"workspace:{ann.workspace_id}"),
    }  # fmt: skip


async def test_a_uuid_that_nobody_knows_is_adopted(api: Api, ann: Person, bob: Person) -> None:
    uuid = str(uuid4())
    made = await api.call("POST", "/api/v1/sessions", ann, {"project_uuid": uuid})
    assert (made.status, made.json["project_uuid"]) == (201, uuid)
    assert made.json["workspace_id"] == ann.workspace_id
    assert (await api.call("POST", "/api/v1/sessions", bob, {"project_uuid": uuid})).status == 404


async def test_adoption_can_be_switched_off(serve: Serve) -> None:
    api = await serve(adopt_projects=False)
    ann = await api.person()
    assert (await api.call("POST", "/api/v1/sessions", ann, {"project_uuid": str(uuid4())})).status == 404
    assert (await api.call("GET", f"/api/v1/sessions/project/{uuid4()}", ann)).status == 404
    assert await api.fetch("SELECT 1 FROM projects") == []


async def test_an_id_that_nobody_knows_is_404(api: Api, ann: Person, root: Person) -> None:
    for who in (ann, root):
        assert (await api.call("POST", "/api/v1/sessions", who, {"project_id": 10**12})).status == 404


async def test_concurrent_requests_for_an_unknown_uuid_make_one_session(api: Api, ann: Person) -> None:
    uuid = uuid4()
    answers = await asyncio.gather(
        *(api.call("GET", f"/api/v1/sessions/project/{uuid}", ann) for _ in range(10)),
        *(api.call("POST", "/api/v1/sessions", ann, {"project_uuid": str(uuid)}) for _ in range(10)),
    )
    assert len({answer.json["id"] for answer in answers}) == 1
    assert Counter(answer.status == 201 for answer in answers)[True] == 1
    assert {answer.status for answer in answers} <= {200, 201, 202}
    assert len(await api.fetch("SELECT 1 FROM projects")) == 1


async def test_fifty_calls_at_two_gateways_get_the_one_session_of_a_kubernetes_project(
    api: Api, serve: Serve, ann: Person
) -> None:
    await api.fetch("UPDATE providers SET kind = 'kubernetes'")
    other: Api = await serve()
    uuid = uuid4()
    answers = await asyncio.gather(
        *((api, other)[number % 2].call("GET", f"/api/v1/sessions/project/{uuid}", ann) for number in range(50))
    )
    assert Counter(answer.status for answer in answers) == {200: 49, 201: 1}
    assert {(answer.json["id"], answer.json["namespace"]) for answer in answers} == {(answers[0].json["id"], str(uuid))}
    assert (
        await api.fetch("SELECT count(*) FROM sessions") == await api.fetch("SELECT count(*) FROM projects") == [(1,)]
    )
    assert [row["channel"] for row in await api.fetch("SELECT channel FROM outbox ORDER BY channel")] == [
        f"session:{answers[0].json['id']}", f"user:{ann.id}", f"workspace:{ann.workspace_id}",
    ]  # fmt: skip


async def test_get_or_create_makes_one_and_then_gets_it(api: Api, ann: Person) -> None:
    path = f"/api/v1/sessions/project/{uuid4()}"
    made = await api.call("GET", path, ann)
    got = await api.call("GET", path, ann)
    assert (made.status, got.status) == (201, 200)
    assert got.json == made.json


async def test_a_head_request_makes_nothing(api: Api, ann: Person) -> None:
    assert (await api.call("HEAD", f"/api/v1/sessions/project/{uuid4()}", ann)).status == 405
    assert await api.fetch("SELECT 1 FROM sessions") == []


async def test_viewers_get_the_session_but_make_none(api: Api, ann: Person, bob: Person) -> None:
    project = await api.project(await api.workspace(ann, viewer=bob))
    path = f"/api/v1/sessions/project/{project['uuid']}"
    assert (await api.call("GET", path, bob)).status == 403
    session = await api.session(ann, project)
    assert (await api.call("GET", path, bob)).json == session


async def test_a_reading_token_gets_the_session_but_makes_none(api: Api, ann: Person) -> None:
    token = (await api.call("POST", "/api/v1/tokens", ann, {"name": "x", "scopes": ["read"]})).json["token"]
    assert (await api.call("GET", f"/api/v1/sessions/project/{uuid4()}", token)).status == 403
    project = await api.project(ann.workspace_id)
    path = f"/api/v1/sessions/project/{project['uuid']}"
    assert (await api.call("GET", path, token)).status == 403
    await api.session(ann, project)
    assert (await api.call("GET", path, token)).status == 200


async def test_only_administrators_make_sessions_for_others(api: Api, ann: Person, bob: Person, root: Person) -> None:
    project = await api.project(ann.workspace_id)
    body = {"project_id": project["id"], "user_id": bob.id}
    assert (await api.call("POST", "/api/v1/sessions", ann, body)).status == 403
    assert (await api.call("POST", "/api/v1/sessions", ann, {**body, "user_id": ann.id})).status == 201
    other = await api.project(ann.workspace_id)
    made = await api.call("POST", "/api/v1/sessions", root, {"project_id": other["id"], "user_id": bob.id})
    assert (made.status, made.json["user_id"]) == (201, bob.id)
    third = await api.project(ann.workspace_id)
    missing = await api.call("POST", "/api/v1/sessions", root, {"project_id": third["id"], "user_id": 10**12})
    assert (missing.status, list(missing.errors)) == (422, ["user_id"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"provider": "nowhere"}, "provider"),
    ({"machine_config": "huge"}, "machine_config"),
    ({"project_id": 1}, "project_uuid"),
    ({"unknown": 1}, "unknown"),
    ({"user_id": -1}, "user_id"),
    ({"project_uuid": "x"}, "project_uuid"),
]


async def test_a_session_that_cannot_be_is_refused(api: Api, ann: Person) -> None:
    project = await api.project(ann.workspace_id)
    for change, field in REFUSED:
        answer = await api.call("POST", "/api/v1/sessions", ann, {"project_uuid": project["uuid"], **change})
        assert (answer.status, list(answer.errors)) == (422, [field]), change


async def test_sessions_are_listed_with_filters_and_pages(api: Api, ann: Person, bob: Person, root: Person) -> None:
    team = await api.workspace(ann, member=bob)
    first = await api.session(ann, await api.project(ann.workspace_id))
    project = await api.project(team)
    second = await api.session(bob, project)
    third = await api.session(bob, await api.project(bob.workspace_id))
    await set_status(api, second, status="running")

    async def ids(who: Person, query: str = "") -> list[int]:
        answer = await api.call("GET", f"/api/v1/sessions{query}", who)
        assert answer.status == 200
        assert answer.json["pagination"]["total"] >= len(answer.json["items"])
        return [session["id"] for session in answer.json["items"]]

    assert await ids(ann) == [second["id"], first["id"]]
    assert await ids(bob) == [third["id"], second["id"]]
    assert await ids(root) == [third["id"], second["id"], first["id"]]
    assert await ids(ann, f"?user_id={bob.id}") == [second["id"]]
    assert await ids(ann, f"?project_id={project['id']}") == [second["id"]]
    assert await ids(ann, "?status=running") == [second["id"]]
    assert await ids(ann, "?status=error") == []
    assert await ids(ann, f"?workspace_id={team}") == [second["id"]]
    assert await ids(ann, f"?workspace_id={bob.workspace_id}") == []
    assert await ids(root, f"?workspace_id={bob.workspace_id}") == [third["id"]]
    assert await ids(root, "?page=2&page_size=2") == [first["id"]]
    page = (await api.call("GET", "/api/v1/sessions?page_size=2", root)).json["pagination"]
    assert page == {"page": 1, "page_size": 2, "total": 3, "total_pages": 2, "total_is_exact": True}


WRONG_FILTERS = [
    "page=0", "page=-1", "page=x", "page_size=0", "page_size=101", "status=nope", "status=%00", "user_id=0", "sort=id",
    "user_id=9999999999999999999", "project_id=1.5", "page=99999999999999999999", "page=1000000&page_size=100",
]  # fmt: skip


async def test_a_wrong_filter_is_refused_at_its_name(api: Api, ann: Person) -> None:
    for query in WRONG_FILTERS:
        answer = await api.call("GET", f"/api/v1/sessions?{query}", ann)
        assert (answer.status, list(answer.errors)) == (422, [query.split("=")[0]]), query


async def test_a_session_is_stopped_started_and_restarted(api: Api, ann: Person) -> None:
    session = await api.session(ann, await api.project(ann.workspace_id))
    path = f"/api/v1/sessions/{session['id']}"
    stopped = await api.call("POST", f"{path}/stop", ann)
    assert (stopped.status, stopped.json["desired"], stopped.json["status"]) == (202, "stopped", "stopping")
    await set_status(api, session, status="stopped", observed_generation=2)
    started = await api.call("POST", f"{path}/start", ann)
    assert (started.status, started.json["desired"], started.json["status"]) == (202, "running", "pending")
    await set_status(api, session, status="running", observed_generation=3)
    restarted = await api.call("POST", f"{path}/restart", ann)
    assert (restarted.status, restarted.json["reason"]) == (202, "RestartRequested")
    history = (await api.call("GET", f"{path}/events", ann)).json
    assert [event["reason"] for event in history["items"]] == [
        "RestartRequested", "StartRequested", "StopRequested", "Created",
    ]  # fmt: skip
    assert history["pagination"]["total"] == 4
    trail = await api.fetch("SELECT action FROM audit_log WHERE object = $1 ORDER BY id", f"session:{session['id']}")
    assert [row["action"] for row in trail] == [
        "session.create", "session.stop", "session.start", "session.restart",
    ]  # fmt: skip


async def add_sizes(api: Api, *names: str, provider: str = "here") -> None:
    """Machine configs of a provider."""
    for number, name in enumerate(names, start=2):
        await api.fetch(
            """INSERT INTO machine_configs (name, provider_id, cpu) SELECT $1, id, $2 FROM providers
                WHERE name = $3""",
            name, number, provider,
        )  # fmt: skip


async def test_a_running_session_restarts_with_another_machine_config(api: Api, ann: Person) -> None:
    await add_sizes(api, "large")
    session = await api.session(ann, await api.project(ann.workspace_id))
    await set_status(api, session, status="running", observed_generation=1, ip_address="127.0.0.1")
    path = f"/api/v1/sessions/{session['id']}/machine-config"
    # Asking twice is asking once.
    for _ in range(2):
        changed = await api.call("PUT", path, ann, {"machine_config": "large"})
        shown = {
            "machine_config": "large", "status": "stopping", "desired": "running", "reason": "MachineConfigChanged",
            "ip_address": None,
        }  # fmt: skip
        assert (changed.status, changed.json) == (202, changed.json | shown)
    (row,) = await api.fetch("SELECT machine, generation, observed_generation FROM sessions")
    assert (row["machine"]["name"], row["machine"]["cpu"]) == ("large", 2.0)
    assert (row["generation"], row["observed_generation"]) == (2, 1)
    told = await api.fetch("SELECT data FROM outbox WHERE channel = $1 ORDER BY id", f"session:{session['id']}")
    assert [orjson.loads(one["data"])["machine_config"] for one in told] == ["small", "large"]
    await set_status(api, session, status="running", observed_generation=2)
    assert (await api.call("PUT", path, ann, {"machine_config": "large"})).status == 200
    trail = await api.fetch("SELECT details FROM audit_log WHERE action = 'session.machine-config' LIMIT 1")
    assert trail[0]["details"] == {"machine_config": "large"}


async def test_what_could_not_be_run_with_a_machine_config_is_tried_again(api: Api, ann: Person) -> None:
    for columns in ({"status": "error"}, {"status": "running", "reason": "RolledBack"}):
        session = await api.session(ann, await api.project(ann.workspace_id))
        await set_status(api, session, observed_generation=1, **columns)
        path = f"/api/v1/sessions/{session['id']}/machine-config"
        assert (await api.call("PUT", path, ann, {"machine_config": "small"})).status == 202, columns


async def test_a_machine_config_that_was_changed_is_taken_as_it_is_now(api: Api, ann: Person) -> None:
    session = await api.session(ann, await api.project(ann.workspace_id))
    await set_status(api, session, status="running", observed_generation=1)
    await api.fetch("UPDATE machine_configs SET cpu = 3")
    path = f"/api/v1/sessions/{session['id']}/machine-config"
    assert (await api.call("PUT", path, ann, {"machine_config": "small"})).status == 202
    assert (await api.fetch("SELECT machine FROM sessions"))[0]["machine"]["cpu"] == 3.0


async def test_a_stopped_session_takes_a_machine_config_at_its_next_start(api: Api, ann: Person) -> None:
    await add_sizes(api, "large")
    session = await api.session(ann, await api.project(ann.workspace_id))
    await set_status(api, session, desired="stopped", status="stopped", observed_generation=1)
    path = f"/api/v1/sessions/{session['id']}/machine-config"
    changed = await api.call("PUT", path, ann, {"machine_config": "large"})
    assert (changed.status, changed.json["machine_config"], changed.json["status"]) == (200, "large", "stopped")
    (row,) = await api.fetch("SELECT machine, generation FROM sessions")
    assert (row["machine"]["name"], row["generation"]) == ("large", 1)
    told = await api.fetch("SELECT data FROM outbox WHERE channel = $1 ORDER BY id", f"session:{session['id']}")
    assert orjson.loads(told[-1]["data"])["machine_config"] == "large"


async def test_a_machine_config_that_cannot_be_had_is_refused(api: Api, ann: Person, bob: Person) -> None:
    await api.fetch("INSERT INTO providers (name, kind) VALUES ('there', 'kubernetes')")
    await add_sizes(api, "distant", provider="there")
    await add_sizes(api, "large")
    session = await api.session(ann, await api.project(await api.workspace(ann, viewer=bob)))
    path = f"/api/v1/sessions/{session['id']}/machine-config"
    for name in ("huge", "distant"):
        refused = await api.call("PUT", path, ann, {"machine_config": name})
        assert (refused.status, refused.errors) == (422, {"machine_config": [
            f"There is no machine config '{name}' at the provider 'here'; there are: large, small."
        ]})  # fmt: skip
    for wrong in ({}, {"machine_config": None}, {"machine_config": "large", "cpu": 9}):
        assert (await api.call("PUT", path, ann, wrong)).status == 422
    assert (await api.call("PUT", path, bob, {"machine_config": "large"})).status == 403
    assert (
        await api.call("PUT", "/api/v1/sessions/999/machine-config", ann, {"machine_config": "large"})
    ).status == 404
    await set_status(api, session, desired="deleted", status="deleting")
    assert (await api.call("PUT", path, ann, {"machine_config": "large"})).status == 409
    assert (await api.fetch("SELECT machine_config FROM sessions"))[0][0] == "small"


async def test_a_session_is_deleted_in_every_state(api: Api, ann: Person) -> None:
    for status in ("pending", "starting", "running", "stopping", "stopped", "error", "deleting"):
        session = await api.session(ann, await api.project(ann.workspace_id))
        await set_status(api, session, status=status)
        for _ in range(2):
            answer = await api.call("DELETE", f"/api/v1/sessions/{session['id']}", ann)
            assert (answer.status, answer.json["status"], answer.json["desired"]) == (202, "deleting", "deleted"), (
                status
            )


async def test_a_deleted_session_is_still_read_and_deleted_again(api: Api, ann: Person) -> None:
    project = await api.project(ann.workspace_id)
    session = await api.session(ann, project)
    path = f"/api/v1/sessions/{session['id']}"
    await api.call("DELETE", path, ann)
    while_it_goes = await api.call("POST", "/api/v1/sessions", ann, {"project_id": project["id"]})
    assert (while_it_goes.status, while_it_goes.headers["Retry-After"]) == (409, "2")
    assert (await api.call("GET", f"/api/v1/sessions/project/{project['uuid']}", ann)).status == 409
    assert (await api.call("POST", f"{path}/start", ann)).status == 409
    await set_status(api, session, status="deleted", observed_generation=2)
    assert (await api.call("DELETE", path, ann)).status == 200
    assert (await api.call("GET", path, ann)).json["status"] == "deleted"
    assert (await api.call("GET", "/api/v1/sessions", ann)).json["items"] == []
    listed = await api.call("GET", "/api/v1/sessions?status=deleted", ann)
    assert [one["id"] for one in listed.json["items"]] == [session["id"]]
    assert (await api.call("POST", "/api/v1/sessions", ann, {"project_id": project["id"]})).status == 201


async def test_the_pods_of_a_session_are_read_as_they_were_told_last(api: Api, ann: Person, bob: Person) -> None:
    session = await api.session(ann, await api.project(ann.workspace_id))
    path = f"/api/v1/sessions/{session['id']}/pods"
    assert (await api.call("GET", path, ann)).json == {"items": []}
    container = {
        "name": "chat", "init": False, "ready": True, "state": "running", "reason": "", "message": "", "restarts": 0,
        "exit_code": None,
    }  # fmt: skip
    pod = {
        "session_id": session["id"], "provider": "here", "namespace": "n", "uid": "u", "resource_version": "7",
        "phase": "Running", "ready": True, "node": "worker", "reason": "", "message": "", "containers": [container],
    }  # fmt: skip
    for uid, kind, session_id, name in (
        ("1", "pod", session["id"], "b"), ("2", "pod", session["id"], "a"), ("3", "pod", session["id"] + 1, "c"),
        ("4", "event", session["id"], "d"), ("5", "pod", None, "e"),
    ):  # fmt: skip
        await api.fetch(
            """INSERT INTO cluster_objects (provider_id, uid, kind, session_id, version, digest, told)
               SELECT id, $1, $2, $3, 7, 0, $4 FROM providers""",
            uid, kind, session_id, orjson.dumps({**pod, "change": "modified", "pod": name}).decode(),
        )  # fmt: skip
    assert (await api.call("GET", path, ann)).json == {"items": [{**pod, "pod": "a"}, {**pod, "pod": "b"}]}
    assert (await api.call("GET", path, bob)).status == 404


async def test_output_is_read_from_its_end_or_after_a_line(api: Api, ann: Person) -> None:
    session = await api.session(ann, await api.project(ann.workspace_id))
    await api.fetch(
        """INSERT INTO session_logs (session_id, at, service, stream, line)
           SELECT $1, now(), CASE WHEN n % 2 = 0 THEN 'chat' ELSE 'preview' END, 'stdout', 'line ' || n
             FROM generate_series(1, 10) AS n""",
        session["id"],
    )
    path = f"/api/v1/sessions/{session['id']}/logs"

    async def lines(query: str = "") -> list[str]:
        return [item["line"] for item in (await api.call("GET", path + query, ann)).json["items"]]

    assert await lines() == [f"line {n}" for n in range(1, 11)]
    assert await lines("?tail=2") == ["line 9", "line 10"]
    assert await lines("?tail=0") == []
    assert await lines("?service=chat&tail=2") == ["line 8", "line 10"]
    assert await lines("?container=chat&service=chat&tail=2") == ["line 8", "line 10"]
    items = (await api.call("GET", path, ann)).json["items"]
    assert set(items[0]) == {"id", "at", "service", "stream", "line"}
    assert await lines(f"?after={items[3]['id']}&tail=2") == ["line 5", "line 6"]
    assert await lines(f"?after={2**63 - 1}") == []


async def test_output_is_read_from_a_moment_on(api: Api, ann: Person) -> None:
    session = await api.session(ann, await api.project(ann.workspace_id))
    await api.fetch(
        """INSERT INTO session_logs (session_id, at, service, stream, line)
           SELECT $1, now() - make_interval(hours => 10 - n), 'chat', 'stdout', 'line ' || n
             FROM generate_series(1, 10) AS n""",
        session["id"],
    )
    path = f"/api/v1/sessions/{session['id']}/logs"
    moment = (await api.call("GET", f"{path}?tail=3", ann)).json["items"][0]["at"]
    for since in ("150m", "9000", "9000s", moment, moment.replace("Z", "%2B00:00")):
        found = (await api.call("GET", f"{path}?since={since}", ann)).json["items"]
        assert [item["line"] for item in found] == ["line 8", "line 9", "line 10"], since
    assert [one["line"] for one in (await api.call("GET", f"{path}?since=1d&tail=1", ann)).json["items"]] == ["line 10"]
    assert (await api.call("GET", f"{path}?since=0&service=chat", ann)).json["items"] == []


async def test_output_is_read_as_text_by_who_accepts_that(api: Api, ann: Person) -> None:
    session = await api.session(ann, await api.project(ann.workspace_id))
    await api.fetch(
        """INSERT INTO session_logs (session_id, at, service, stream, line) VALUES
           ($1, '2026-03-01T11:02:03.5Z', 'preview', 'stdout', 'hällo'),
           ($1, '2026-03-01T11:02:04Z', '', 'system', 'x')""",
        session["id"],
    )
    path = f"/api/v1/sessions/{session['id']}/logs"
    for accept in ("text/plain", "text/html, Text/Plain;q=0.5", "text/plain, application/json"):
        read = await api.call("GET", path, ann, headers={"Accept": accept})
        assert read.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert read.body.decode() == ("2026-03-01T11:02:03.500000Z preview | hällo\n2026-03-01T11:02:04Z system | x\n")
    for accept in ("*/*", "", "application/json, text/plain", "text/html"):
        assert (await api.call("GET", path, ann, headers={"Accept": accept})).json["items"], accept


WRONG_OUTPUT = [
    "tail=-1", "tail=5001", "after=-1", "service=", "container=" + "x" * 65, "lines=5", "follow=yes", "since=soon",
    "since=10w", "since=-5m", "since=2026-13-01T00:00:00Z", "since=2026-01-01T00:00:00", "since=999999999d",
    "since=0001-01-01T00:00:00%2B10:00", "container=a&service=b",
]  # fmt: skip


async def test_a_wrong_question_about_output_is_refused(api: Api, ann: Person) -> None:
    session = await api.session(ann, await api.project(ann.workspace_id))
    for query in WRONG_OUTPUT:
        answer = await api.call("GET", f"/api/v1/sessions/{session['id']}/logs?{query}", ann)
        assert (answer.status, list(answer.errors)) == (422, [query.split("=")[0]]), query


async def test_people_see_what_they_can_choose_from(api: Api, ann: Person) -> None:
    providers = (await api.call("GET", "/api/v1/providers", ann)).json["items"]
    assert [(one["name"], one["kind"], one["state"], one["is_default"]) for one in providers] == [
        ("here", "local", "unknown", True)
    ]
    configs = (await api.call("GET", "/api/v1/machine-configs", ann)).json["items"]
    assert [(one["name"], one["cpu"], one["memory_bytes"], one["services"]) for one in configs] == [
        ("small", 1.0, 1 << 30, ["preview"])
    ]
    assert "options" not in {*providers[0], *configs[0]}


async def test_a_provider_that_is_down_says_why(api: Api, ann: Person) -> None:
    why = "The cluster 'k8s' (https://10.0.0.1:6443) does not answer: connection refused. Check that it runs."
    await api.fetch(
        """INSERT INTO providers (name, kind, state, message, checked_at)
           VALUES ('k8s', 'kubernetes', 'down', $1, now())""",
        why,
    )
    _, provider = (await api.call("GET", "/api/v1/providers", ann)).json["items"]
    assert (provider["name"], provider["kind"], provider["state"], provider["message"]) == (
        "k8s", "kubernetes", "down", why,
    )  # fmt: skip
    assert provider["checked_at"] is not None
