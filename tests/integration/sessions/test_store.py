"""Making, asking for and reading sessions."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.database import open_pool
from orchestrator.errors import Conflict, Invalid, NotFound
from orchestrator.sessions import record, store
from tests.integration.sessions.conftest import Stage


async def test_a_session_has_all_that_clients_are_promised(stage: Stage) -> None:
    project = await stage.project()
    session = await stage.create(project)
    public = store.public(session)
    assert public | {"id": 0, "expires_at": "", "created_at": "", "updated_at": ""} == {
        "id": 0,
        "project_uuid": str(project.uuid),
        "project_id": project.id,
        "workspace_id": stage.workspace_id,
        "user_id": stage.user_id,
        "provider": "staged",
        "machine_config": "small",
        "namespace": str(project.uuid),
        "container_name": f"session-{session.id}",
        "desired": "running",
        "status": "pending",
        "reason": "Created",
        "message": "Waiting for its turn to start.",
        "stale": False,
        "ip_address": None,
        "preview_url": None,
        "preview_path": None,
        "chat_url": None,
        "chat_path": None,
        "vscode_url": None,
        "vscode_path": None,
        "expires_at": "",
        "created_at": "",
        "updated_at": "",
    }
    expires = datetime.fromisoformat(public["expires_at"])
    assert timedelta(days=364) < expires - datetime.now(UTC) < timedelta(days=367)
    assert public["created_at"].endswith("Z")


async def test_making_a_session_tells_so_in_the_same_transaction(stage: Stage) -> None:
    session = await stage.create()
    rows = await stage.fetch("SELECT event_type, channel FROM outbox ORDER BY id")
    assert [tuple(row) for row in rows] == [
        ("session.status", f"session:{session.id}"),
        ("session.status", f"user:{stage.user_id}"),
        ("session.status", f"workspace:{stage.workspace_id}"),
    ]
    assert await stage.history(session) == [("pending", "Created")]


async def test_making_it_twice_makes_one(stage: Stage) -> None:
    project = await stage.project()
    first = await stage.create(project)
    async with stage.pool.acquire() as connection, connection.transaction():
        second, made = await store.create(
            connection, project=project, user_id=stage.user_id, provider=None, machine_config=None
        )
    assert (second, made) == (first, False)
    assert await stage.execute("SELECT count(*) FROM outbox") == 3


async def test_fifty_at_once_make_one_session(stage: Stage) -> None:
    project = await stage.project()
    pool = await open_pool(replace(stage.database_settings, pool_size=50, timeout=30.0), name="test")
    begin = asyncio.Event()

    async def create() -> tuple[int, bool]:
        async with pool.acquire() as connection, connection.transaction():
            await begin.wait()
            session, made = await store.create(
                connection, project=project, user_id=stage.user_id, provider=None, machine_config=None
            )
            return session.id, made

    tasks = [asyncio.create_task(create()) for _ in range(50)]
    begin.set()
    answers = await asyncio.gather(*tasks)
    await pool.close()
    assert len({session_id for session_id, _ in answers}) == 1
    assert sum(made for _, made in answers) == 1
    assert await stage.execute("SELECT count(*) FROM sessions") == 1
    assert await stage.execute("SELECT count(*) FROM session_events") == 1


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"provider": "moon"}, "provider"),
        ({"machine_config": "huge"}, "machine_config"),
        ({"user_id": 987_654}, "user_id"),
    ],
)
async def test_what_a_session_refers_to_must_exist(stage: Stage, arguments: dict[str, object], field: str) -> None:
    with pytest.raises(Invalid) as raised:
        await stage.create(**arguments)
    assert raised.value.field == field


async def test_a_project_deleted_meanwhile_is_told(stage: Stage) -> None:
    project = await stage.project()
    await stage.execute("DELETE FROM projects WHERE id = $1", project.id)
    with pytest.raises(Invalid) as raised:
        await stage.create(project)
    assert raised.value.field == "project_uuid"


async def test_while_the_old_session_is_being_deleted_there_is_no_new_one(stage: Stage) -> None:
    project = await stage.project()
    session = await stage.create(project)
    await stage.request(session, "deleted")
    with pytest.raises(Conflict) as raised:
        await stage.create(project)
    assert raised.value.retry_after == 2
    async with stage.running():
        await stage.until(session, "deleted")
    assert (await stage.create(project)).id != session.id


async def test_asking_twice_is_asking_once(stage: Stage) -> None:
    session = await stage.create()
    assert await stage.request(session, "running") == session
    stopping = await stage.request(session, "stopped")
    assert await stage.request(session, "stopped") == stopping
    deleting = await stage.request(session, "deleted")
    assert await stage.request(session, "deleted") == deleting
    assert (stopping.generation, deleting.generation) == (2, 3)


@pytest.mark.parametrize("status", ["deleting", "deleted"])
async def test_nothing_brings_a_deleted_session_back(stage: Stage, status: str) -> None:
    session = await stage.create()
    await stage.request(session, "deleted")
    await stage.execute("UPDATE sessions SET status = $1", status)
    with pytest.raises(Conflict):
        await stage.request(session, "running")


async def test_a_session_that_is_not_there_is_not_found(stage: Stage) -> None:
    async with stage.pool.acquire() as connection:
        assert await store.get(connection, 1) is None
        with pytest.raises(NotFound):
            await store.request(connection, 1, "stopped")


async def test_a_deleted_user_leaves_its_sessions_to_the_workspace(stage: Stage) -> None:
    session = await stage.create()
    await stage.execute("DELETE FROM users")
    await stage.execute("DELETE FROM outbox")
    await stage.request(session, "stopped")
    rows = await stage.fetch("SELECT channel FROM outbox ORDER BY id")
    assert [row["channel"] for row in rows] == [f"session:{session.id}", f"workspace:{stage.workspace_id}"]


async def _fill(stage: Stage, count: int) -> None:
    """So many sessions in ten workspaces of ten users, every tenth deleted; the ids are 1 to `count`."""
    await stage.execute(
        """WITH u AS (INSERT INTO users (email, name) SELECT 'u' || n, 'u' FROM generate_series(1, 9) n)
           INSERT INTO workspaces (name) SELECT 'w' FROM generate_series(1, 9)"""
    )
    await stage.execute(
        """INSERT INTO projects (workspace_id, name)
           SELECT (SELECT min(id) FROM workspaces) + n % 10, 'p' FROM generate_series(1, $1) n""",
        count,
    )
    await stage.execute(
        """INSERT INTO sessions (project_id, project_uuid, workspace_id, user_id, provider_id, provider, machine_config,
                                 machine, namespace, container_name, status, desired, observed_generation, expires_at)
           SELECT p.id, p.uuid, p.workspace_id, (SELECT min(id) FROM users) + p.id / 10 % 10, $1, 'staged', 'small',
                  '{}', 'n', 'c', v.status, 'running', 1, now() + interval '1 year'
             FROM projects p,
                  LATERAL (SELECT CASE WHEN p.id % 10 = 3 THEN 'deleted' WHEN p.id % 7 = 0 THEN 'stopped'
                                       ELSE 'running' END AS status) v
            ORDER BY p.id""",
        stage.provider_id,
    )
    async with stage.pool.acquire() as connection:
        await connection.execute("VACUUM ANALYZE sessions")


FILTERS = [
    {"user_id": user_id, "project_id": project_id, "status": status, "workspaces": workspaces}
    for user_id in (None, 3)
    for project_id in (None, 22)
    for status in (None, "running", "deleted")
    for workspaces in (None, [1], [1, 3, 5])
]


async def test_every_combination_of_filters_lists_what_it_says(stage: Stage) -> None:
    await _fill(stage, 400)
    base = await stage.execute("SELECT min(id) FROM workspaces")
    users = await stage.execute("SELECT min(id) FROM users")
    projects = await stage.execute("SELECT min(id) FROM projects")
    async with stage.pool.acquire() as connection:
        rows = await connection.fetch(f"SELECT {record.COLUMNS} FROM sessions")  # noqa: S608  Our own column names.
        everything = [store.Session(*row) for row in rows]
        for filters in FILTERS:
            workspaces = None if filters["workspaces"] is None else [base + n for n in filters["workspaces"]]
            user_id = None if filters["user_id"] is None else users + filters["user_id"]
            project_id = None if filters["project_id"] is None else projects + filters["project_id"]
            status = filters["status"]
            expected = [
                session
                for session in sorted(everything, key=lambda session: (session.created_at, session.id), reverse=True)
                if (workspaces is None or session.workspace_id in workspaces)
                and user_id in (None, session.user_id)
                and project_id in (None, session.project_id)
                and (session.status == status if status else session.status != "deleted")
            ]
            for page in (1, 2, 3):
                found = await store.list_page(
                    connection, workspace_ids=workspaces, user_id=user_id, project_id=project_id, status=status,
                    page=page, page_size=7,
                )  # fmt: skip
                assert found.items == expected[(page - 1) * 7 : page * 7], filters
                assert (found.total, found.total_is_exact) == (len(expected), True)


async def test_who_is_in_no_workspace_sees_an_empty_list(stage: Stage) -> None:
    await stage.create()
    async with stage.pool.acquire() as connection:
        assert await store.list_page(connection, workspace_ids=[], page=1, page_size=20) == store.Page([], 0, True)


async def test_pages_and_totals_end_at_ten_thousand(stage: Stage) -> None:
    await _fill(stage, 11_500)
    async with stage.pool.acquire() as connection:
        found = await store.list_page(connection, workspace_ids=None, page=100, page_size=100)
        assert (len(found.items), found.total, found.total_is_exact) == (100, 10_000, False)
        with pytest.raises(Invalid) as raised:
            await store.list_page(connection, workspace_ids=None, page=101, page_size=100)
    assert raised.value.field == "page"
    assert "filters" in str(raised.value)


async def test_every_combination_of_filters_is_served_by_an_index(stage: Stage) -> None:
    await _fill(stage, 20_000)
    base = await stage.execute("SELECT min(id) FROM workspaces")
    async with stage.pool.acquire() as connection, connection.transaction():
        # As it is after some calls: planned without the values.
        await connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        for filters in FILTERS:
            workspaces = None if filters["workspaces"] is None else [base + n for n in filters["workspaces"]]
            names = {name: filters[name] for name in ("user_id", "project_id") if filters[name] is not None}
            statement, values = store.list_query(workspaces, names, filters["status"], page=1, page_size=20)
            rows = await connection.fetch(f"EXPLAIN (ANALYZE, TIMING OFF) {statement}", *values)
            plan = "\n".join(row[0] for row in rows)
            assert "Seq Scan on sessions" not in plan, f"{filters}\n{plan}"
            assert "Rows Removed by Filter" not in plan or filters["project_id"] is not None, f"{filters}\n{plan}"


@pytest.mark.parametrize("plans", ["force_custom_plan", "force_generic_plan"])
async def test_a_workspace_that_has_half_of_all_sessions_is_not_read_to_its_end(stage: Stage, plans: str) -> None:
    # So many small workspaces beside it that the planner expects few rows of any.
    await stage.execute("INSERT INTO workspaces (name) SELECT 'w' FROM generate_series(1, 19)")
    await stage.execute(
        """INSERT INTO projects (workspace_id, name)
           SELECT $1 + CASE WHEN n % 2 = 0 THEN 0 ELSE n % 20 END, 'p' FROM generate_series(1, 40000) n""",
        stage.workspace_id,
    )
    await stage.execute(
        """INSERT INTO sessions (project_id, project_uuid, workspace_id, user_id, provider_id, provider, machine_config,
                                 machine, namespace, container_name, status, observed_generation, expires_at)
           SELECT id, uuid, workspace_id, $1, $2, 'staged', 'small', '{}', 'n', 'c', 'running', 1, now()
             FROM projects""",
        stage.user_id,
        stage.provider_id,
    )
    await stage.execute("ANALYZE sessions")
    async with stage.pool.acquire() as connection, connection.transaction():
        await connection.execute(f"SET LOCAL plan_cache_mode = {plans}")
        for filters in ({}, {"user_id": stage.user_id}):
            statement, values = store.list_query([stage.workspace_id], filters, "running", page=1, page_size=20)
            rows = await connection.fetch(f"EXPLAIN (ANALYZE, TIMING OFF) {statement}", *values)
            plan = "\n".join(row[0] for row in rows)
            read = max(float(found) for found in re.findall(r"actual rows=([\d.]+)", plan))
            assert read <= store.COUNTED + 1, plan


async def test_the_history_is_listed_newest_first(stage: Stage) -> None:
    session = await stage.create()
    await stage.request(session, "stopped")
    await stage.request(session, "deleted")
    async with stage.pool.acquire() as connection:
        first = await store.events_page(connection, session.id, page=1, page_size=2)
        second = await store.events_page(connection, session.id, page=2, page_size=2)
        with pytest.raises(Invalid):
            await store.events_page(connection, session.id, page=5001, page_size=2)
    assert [event.status for event in first.items + second.items] == ["deleting", "stopping", "pending"]
    assert (first.total, first.total_is_exact) == (3, True)
    assert first.items[0].session_id == session.id


async def test_output_is_read_from_its_end_or_onwards_from_a_line(stage: Stage) -> None:
    session = await stage.create()
    await stage.execute(
        """INSERT INTO session_logs (session_id, at, service, stream, line)
           SELECT $1, now(), CASE WHEN n % 2 = 0 THEN 'preview' ELSE 'chat' END, 'stdout', 'line ' || n
             FROM generate_series(1, 10) n""",
        session.id,
    )
    async with stage.pool.acquire() as connection:
        last = await store.logs(connection, session.id, tail=3)
        assert [record.line for record in last] == ["line 8", "line 9", "line 10"]
        onwards = await store.logs(connection, session.id, tail=2, after=last[0].id - 3)
        assert [record.line for record in onwards] == ["line 6", "line 7"]
        chat = await store.logs(connection, session.id, tail=2, service="chat")
        assert [record.line for record in chat] == ["line 7", "line 9"]


async def test_sessions_are_counted_by_status(stage: Stage) -> None:
    session = await stage.create()
    await stage.create(await stage.project("other"))
    await stage.request(session, "stopped")
    async with stage.pool.acquire() as connection:
        counts = await store.count_by_status(connection)
    assert counts == {
        "pending": 1, "starting": 0, "running": 0, "stopping": 1, "stopped": 0, "deleting": 0, "error": 0,
    }  # fmt: skip
