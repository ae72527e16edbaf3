"""Providers and machine configs in a real database."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from orchestrator import machine_changes, machine_import, machines
from orchestrator.database import Pool
from orchestrator.errors import Conflict, InUse, Invalid, NotFound
from orchestrator.machine_import import apply, plan, read_text
from orchestrator.machine_schema import ProviderSchema
from orchestrator.machines import choose
from orchestrator.providers.contract import Machine

FILE = """
providers:
  - {name: local, kind: local, default: true, options: {clone_deadline: 60}}
  - {name: cluster, kind: docker}
machine_configs:
  - {name: small, provider: local, default: true, cpu: 500m, memory: 1Gi, services: {preview: {command: [a, b]}}}
  - {name: big, provider: local, cpu: 4, disk: 10Gi}
  - {name: pod, provider: cluster, disk: 3Gi, services: {preview: {image: x}}}
"""


def read(text: str = FILE) -> machine_import.Import:
    return read_text(text, source="file.yaml")


def told(changes: list[machine_import.Change]) -> list[str]:
    return [str(change) for change in changes]


async def contents(connection: asyncpg.Connection) -> list[Any]:
    return [
        tuple(row)
        for table in ("providers", "machine_configs")
        for row in await connection.fetch(f"SELECT * FROM {table} ORDER BY id")  # noqa: S608  Two names of ours.
    ]


async def session(connection: asyncpg.Connection, provider: str, status: str = "running") -> int:
    """A session of a new project at a provider."""
    user = await connection.fetchval(
        "INSERT INTO users (email, name) VALUES ($1, 'n') RETURNING id", f"{uuid4()}@example.com"
    )
    workspace = await connection.fetchval("INSERT INTO workspaces (name) VALUES ('w') RETURNING id")
    project = await connection.fetchrow(
        "INSERT INTO projects (workspace_id, name) VALUES ($1, 'p') RETURNING id, uuid", workspace
    )
    return await connection.fetchval(
        """INSERT INTO sessions (project_id, project_uuid, workspace_id, user_id, provider_id, provider, machine_config,
                                 machine, namespace, container_name, status, expires_at)
           SELECT $1, $2, $3, $4, id, name, 'small', '{}', 'n', 'c', $5, now() FROM providers WHERE name = $6
           RETURNING id""",
        project["id"], project["uuid"], workspace, user, status, provider,
    )  # fmt: skip


async def test_an_import_makes_the_rows_and_another_changes_nothing(connection: asyncpg.Connection) -> None:
    assert told(await plan(connection, read())) == [
        "provider local: added", "provider cluster: added",
        "machine config small: added", "machine config big: added", "machine config pod: added",
    ]  # fmt: skip
    assert await contents(connection) == []
    await apply(connection, read())
    before = await contents(connection)
    assert {change.action for change in await apply(connection, read())} == {"unchanged"}
    assert await contents(connection) == before
    small = next(one for one in await machines.machine_configs(connection) if one.name == "small")
    assert Machine(**small.snapshot()) == Machine("small", 0.5, 1 << 30, None, {"preview": {"command": ["a", "b"]}}, {})
    local = next(one for one in await machines.providers(connection) if one.name == "local")
    assert (local.kind, local.options, local.is_default, local.state) == (
        "local",
        {"clone_deadline": 60},
        True,
        "unknown",
    )


async def test_changes_are_told_by_field_and_made(connection: asyncpg.Connection) -> None:
    await apply(connection, read())
    changed = read(
        FILE.replace("memory: 1Gi", "memory: 2Gi").replace("[a, b]", "[a, c]").replace("docker}", "kubernetes}")
    )
    expected = [
        "provider local: unchanged", "provider cluster: changed (kind)",
        "machine config small: changed (memory, services)", "machine config big: unchanged",
        "machine config pod: unchanged",
    ]  # fmt: skip
    assert told(await plan(connection, changed)) == expected
    assert told(await apply(connection, changed)) == expected
    assert {change.action for change in await plan(connection, changed)} == {"unchanged"}


async def test_a_changed_default_moves_the_default(connection: asyncpg.Connection) -> None:
    await apply(connection, read())
    moved = read(
        """
        providers: [{name: cluster, kind: docker, default: true}]
        machine_configs: [{name: big, provider: local, default: true, cpu: 4, disk: 10Gi}]
        """
    )
    assert told(await apply(connection, moved)) == [
        "provider cluster: changed (default)", "provider local: changed (default)",
        "machine config big: changed (default)", "machine config small: changed (default)",
    ]  # fmt: skip
    assert [row.name for row in await machines.providers(connection) if row.is_default] == ["cluster"]
    assert [row.name for row in await machines.machine_configs(connection) if row.is_default] == ["big"]


async def test_a_default_moves_within_one_file_and_to_another_provider(connection: asyncpg.Connection) -> None:
    await apply(connection, read())
    swapped = FILE.replace("default: true, cpu: 500m", "cpu: 500m").replace(
        "provider: local, cpu: 4", "provider: local, default: true, cpu: 4"
    )
    await apply(connection, read(swapped))
    assert (await choose(connection, None, None))[1].name == "big"
    await apply(connection, read(FILE))
    assert (await choose(connection, None, None))[1].name == "small"
    away = "machine_configs: [{name: big, provider: cluster, default: true}]"
    assert told(await apply(connection, read(away))) == ["machine config big: changed (provider, default, cpu, disk)"]
    assert (await choose(connection, "cluster", None))[1].name == "big"
    assert (await choose(connection, "local", None))[1].name == "small"


async def test_what_does_not_fit_the_database_is_refused_with_its_place(connection: asyncpg.Connection) -> None:
    await apply(connection, read("providers: [{name: local, kind: local}]"))
    with pytest.raises(Invalid) as refused:
        await apply(
            connection,
            read(
                """
                machine_configs:
                  - {name: fine, provider: local}
                  - {name: a, provider: nowhere}
                  - {name: b, provider: local, services: {preview: {image: x}}}
                """
            ),
        )
    assert str(refused.value).splitlines()[1:] == [
        "  machine_configs[1].provider: there is no provider 'nowhere'; there are: local",
        "  machine_configs[2].services.preview.command: Missing data for required field.",
        "  machine_configs[2].services.preview.image: Unknown field.",
    ]
    assert await machines.machine_configs(connection) == []


async def test_all_or_nothing_is_changed(connection: asyncpg.Connection) -> None:
    await apply(connection, read())
    before = await contents(connection)
    # The database refuses the last entry: a trigger stands for whatever may go wrong in the middle.
    await connection.execute(
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
           CREATE TRIGGER refuse BEFORE UPDATE ON machine_configs FOR EACH ROW WHEN (OLD.name = 'pod')
           EXECUTE FUNCTION refuse()"""
    )
    with pytest.raises(asyncpg.RaiseError):
        await apply(connection, read(FILE.replace("cpu: 4", "cpu: 5").replace("3Gi", "4Gi").replace("60", "90")))
    assert await contents(connection) == before


async def test_concurrent_imports_end_like_one(pool: Pool) -> None:
    async def one() -> None:
        async with pool.acquire() as connection:
            await apply(connection, read())

    await asyncio.gather(*(one() for _ in range(5)))
    async with pool.acquire() as connection:
        assert len(await contents(connection)) == 5


async def test_a_provider_with_sessions_keeps_its_kind(connection: asyncpg.Connection) -> None:
    await apply(connection, read())
    await session(connection, "cluster")
    with pytest.raises(Invalid, match=r"providers\[0\]\.kind: 'cluster' has sessions, and is of the kind 'docker'"):
        await apply(connection, read("providers: [{name: cluster, kind: kubernetes}]"))


async def test_a_provider_whose_machine_configs_would_not_fit_keeps_its_kind(connection: asyncpg.Connection) -> None:
    await apply(connection, read())
    with pytest.raises(Invalid, match=r"providers\[0\]\.kind: does not fit the machine configs of 'cluster': pod"):
        await apply(connection, read("providers: [{name: cluster, kind: local}]"))


def provider(name: str, kind: str = "docker", **given: Any) -> Any:
    return ProviderSchema().load({"name": name, "kind": kind, **given})


async def provider_id(connection: asyncpg.Connection, name: str) -> int:
    return next(row.id for row in await machines.providers(connection) if row.name == name)


async def config_id(connection: asyncpg.Connection, name: str) -> int:
    return next(row.id for row in await machines.machine_configs(connection) if row.name == name)


async def test_providers_are_added_once(connection: asyncpg.Connection) -> None:
    first = await machine_changes.add_provider(
        connection, provider("one", "local", options={"crashes": 3}, default=True)
    )
    assert (first.name, first.options, first.is_default, first.enabled) == ("one", {"crashes": 3}, True, True)
    with pytest.raises(Conflict, match="There is a provider 'one' already"):
        await machine_changes.add_provider(connection, provider("one"))
    await machine_changes.add_provider(connection, provider("two", default=True))
    assert [(row.name, row.is_default) for row in await machines.providers(connection)] == [
        ("one", False),
        ("two", True),
    ]


async def test_one_cluster_is_told_of_once(connection: asyncpg.Connection) -> None:
    await apply(connection, read("providers: [{name: a, kind: kubernetes, options: {context: east}}]"))
    twin = "providers: [{name: b, kind: kubernetes, options: {context: east, request_timeout: 5}}]"
    with pytest.raises(Invalid, match=r"providers\[0\]\.options\.instance: reaches what 'a' reaches"):
        await apply(connection, read(twin))
    with pytest.raises(Invalid, match=r"options\.instance: reaches what 'a' reaches") as refused:
        await machine_changes.add_provider(connection, provider("b", "kubernetes", options={"context": "east"}))
    assert refused.value.field == "options.instance"
    await apply(connection, read(twin.replace("context: east,", "context: east, instance: other,")))
    await apply(connection, read("providers: [{name: c, kind: kubernetes, enabled: false, options: {context: east}}]"))


async def test_a_provider_in_use_stays_and_says_by_what(connection: asyncpg.Connection) -> None:
    await apply(connection, read())
    numbers = [await session(connection, "cluster") for _ in range(22)]
    with pytest.raises(InUse) as refused:
        await machine_changes.remove_provider(connection, await provider_id(connection, "cluster"))
    listed = ", ".join(f"{number} (project p, running)" for number in numbers[:20])
    assert str(refused.value) == (
        f"The provider 'cluster' is in use by the machine config pod and by the sessions {listed} and 2 more: "
        "remove or delete these first."
    )
    assert refused.value.by["machine_configs"] == ["pod"]
    assert refused.value.by["sessions_total"] == 22
    assert [(one["id"], one["status"]) for one in refused.value.by["sessions"]] == [
        (number, "running") for number in numbers[:20]
    ]
    with pytest.raises(InUse, match="in use by the machine configs big, small: remove"):
        await machine_changes.remove_provider(connection, await provider_id(connection, "local"))
    with pytest.raises(NotFound):
        await machine_changes.remove_provider(connection, 999)


async def test_a_provider_that_nothing_uses_goes_and_its_deleted_sessions_stay(connection: asyncpg.Connection) -> None:
    await apply(connection, read())
    number = await session(connection, "cluster", "deleted")
    with pytest.raises(NotFound):
        await machine_changes.remove_machine_config(connection, 999)
    await machine_changes.remove_machine_config(connection, await config_id(connection, "pod"))
    await machine_changes.remove_provider(connection, await provider_id(connection, "cluster"))
    row = await connection.fetchrow("SELECT provider, provider_id FROM sessions WHERE id = $1", number)
    assert tuple(row) == ("cluster", None)


async def test_a_provider_taken_into_use_in_the_same_moment_stays(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await machine_changes.add_provider(connection, provider("p"))

    async def nobody_yet(connection: asyncpg.Connection, *_: Any) -> None:
        await session(connection, "p")

    monkeypatch.setattr(machine_changes, "_require_unused", nobody_yet)
    with pytest.raises(Conflict, match="has just been taken into use"):
        await machine_changes.remove_provider(connection, await provider_id(connection, "p"))
    assert [row.name for row in await machines.providers(connection)] == ["p"]


async def test_a_machine_config_in_use_stays_and_is_free_when_its_sessions_are_gone(pool: Pool) -> None:
    async with pool.acquire() as connection, pool.acquire() as other:
        await apply(connection, read())
        small = await config_id(connection, "small")
        making = connection.transaction()
        await making.start()
        assert await machines.take_seat(connection, "small")
        removal = asyncio.create_task(machine_changes.remove_machine_config(other, small))
        await until_waiting(pool)
        number = await session(connection, "local")
        await making.commit()
        with pytest.raises(InUse, match=rf"The machine config 'small' is in use by the session {number} \(project p"):
            await removal
        await connection.execute("UPDATE sessions SET status = 'deleted'")
        await machine_changes.remove_machine_config(connection, small)
        async with connection.transaction():
            assert not await machines.take_seat(connection, "small")


async def until_waiting(pool: Pool) -> None:
    """Return when somebody waits for a lock."""
    async with asyncio.timeout(30), pool.acquire() as connection:
        while not await connection.fetchval(
            """SELECT EXISTS (SELECT FROM pg_stat_activity
                               WHERE wait_event_type = 'Lock' AND datname = current_database())"""
        ):
            await asyncio.sleep(0.01)


async def test_users_are_named_by_address_or_id_and_kept_by_id(connection: asyncpg.Connection) -> None:
    ann = await connection.fetchval("INSERT INTO users (email, name) VALUES ('Ann@example.com', 'n') RETURNING id")
    bob = await connection.fetchval("INSERT INTO users (email, name) VALUES ('bob@example.com', 'n') RETURNING id")
    team = await connection.fetchval("INSERT INTO workspaces (name) VALUES ('w') RETURNING id")
    few = f"""
        providers: [{{name: local, kind: local}}]
        machine_configs:
          - {{name: gpu, provider: local, users: [{bob}, ann@EXAMPLE.com, {ann}], workspaces: [{team}, {team}]}}
    """
    await apply(connection, read(few))
    assert {change.action for change in await plan(connection, read(few))} == {"unchanged"}
    (gpu,) = await machines.machine_configs(connection)
    assert (gpu.users, gpu.workspaces) == (sorted([ann, bob]), [team])
    unknown = few.replace(f"[{bob}, ", "[nobody@example.com, 999, ").replace(f"[{team}, ", "[998, ")
    with pytest.raises(Invalid) as refused:
        await apply(connection, read(unknown))
    assert str(refused.value).splitlines()[1:] == [
        "  machine_configs[0].users: there is no user nobody@example.com, 999",
        "  machine_configs[0].workspaces: there is no workspace 998",
    ]
    # Who is gone does not open it to all; the file that names the address must be corrected.
    await connection.execute("DELETE FROM users")
    assert {change.action for change in await plan(connection, read(few.replace("ann@EXAMPLE.com, ", "")))} == {
        "unchanged"
    }
    with pytest.raises(Invalid, match=r"there is no user ann@EXAMPLE\.com"):
        await plan(connection, read(few))


async def test_seats_are_taken_one_by_one(pool: Pool) -> None:
    limited = FILE.replace("name: big,", "name: big, max_sessions: 3,")
    async with pool.acquire() as connection:
        await apply(connection, read(limited))

    async def take() -> bool:
        async with pool.acquire() as connection:
            try:
                async with connection.transaction():
                    await machines.take_seat(connection, "big")
                    number = await session(connection, "local")
                    await connection.execute("UPDATE sessions SET machine_config = 'big' WHERE id = $1", number)
            except Conflict as full:
                told.add(str(full))
                return False
            return True

    told: set[str] = set()

    assert sorted(await asyncio.gather(*(take() for _ in range(9)))) == [False] * 6 + [True] * 3
    async with pool.acquire() as connection:
        await connection.execute("UPDATE sessions SET desired = 'stopped' WHERE id = (SELECT min(id) FROM sessions)")
    assert sorted(await asyncio.gather(*(take() for _ in range(3)))) == [False, False, True]
    (full,) = told
    assert full == (
        "The machine config 'big' takes 3 sessions at a time, and 3 run or will: "
        "stop or delete one, or choose another machine config."
    )


async def test_a_session_gets_what_it_names_or_the_default(connection: asyncpg.Connection) -> None:
    with pytest.raises(Invalid, match="There is no default provider: name one of: none"):
        await choose(connection, None, None)
    await apply(connection, read())
    row, config = await choose(connection, None, None)
    assert (row.name, config.name, config.provider_id) == ("local", "small", row.id)
    assert (await choose(connection, None, "pod"))[0].name == "cluster"
    with pytest.raises(Invalid) as refused:
        await choose(connection, "x'; DROP TABLE providers; --\0", None)
    assert refused.value.field == "provider"
