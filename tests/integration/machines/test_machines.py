"""Providers and machine configs in a real database."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from orchestrator import machines
from orchestrator.database import Pool
from orchestrator.errors import Conflict, Invalid, NotFound
from orchestrator.machines import add_provider, apply, choose, plan, read_text, remove_machine_config, remove_provider
from orchestrator.providers.contract import Machine

FILE = """
providers:
  - {name: local, kind: local, default: true, options: {clone_deadline: 60}}
  - {name: cluster, kind: docker}
machine_configs:
  - {name: small, provider: local, default: true, cpu: 500m, memory: 1Gi, services: {preview: {command: [a, b]}}}
  - {name: big, provider: local, cpu: 4, disk: 10Gi}
  - {name: pod, provider: cluster, services: {preview: {image: x}}, options: {node: fast}}
"""


def read(text: str = FILE) -> machines.Import:
    return read_text(text, source="file.yaml")


def told(changes: list[machines.Change]) -> list[str]:
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
    changed = read(FILE.replace("memory: 1Gi", "memory: 2Gi").replace("[a, b]", "[a, c]").replace("docker}", "devpod}"))
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
    await add_provider(connection, name="local", kind="local")
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
        await apply(connection, read(FILE.replace("cpu: 4", "cpu: 5").replace("fast", "slow").replace("60", "90")))
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
        await apply(connection, read("providers: [{name: cluster, kind: devpod}]"))


async def test_providers_are_added_once(connection: asyncpg.Connection) -> None:
    first = await add_provider(connection, name="one", kind="local", options={"crashes": 3}, default=True)
    assert (first.name, first.options, first.is_default, first.enabled) == ("one", {"crashes": 3}, True, True)
    with pytest.raises(Conflict, match="There is a provider 'one' already"):
        await add_provider(connection, name="one", kind="docker")
    await add_provider(connection, name="two", kind="docker", default=True)
    assert [(row.name, row.is_default) for row in await machines.providers(connection)] == [
        ("one", False),
        ("two", True),
    ]
    with pytest.raises(Invalid, match=r"options\.crashes: Not a valid integer") as refused:
        await add_provider(connection, name="three", kind="local", options={"crashes": "many"})
    assert refused.value.field == "options.crashes"


async def test_a_provider_in_use_stays_and_says_by_what(connection: asyncpg.Connection) -> None:
    await apply(connection, read())
    numbers = [await session(connection, "cluster") for _ in range(12)]
    with pytest.raises(Conflict) as refused:
        await remove_provider(connection, "cluster")
    listed = ", ".join(str(number) for number in numbers[:10])
    assert str(refused.value) == (
        f"The provider 'cluster' is in use by the machine config pod and the sessions {listed} and more: "
        "remove or delete these first."
    )
    with pytest.raises(Conflict, match="in use by the machine configs big, small: remove"):
        await remove_provider(connection, "local")
    with pytest.raises(NotFound, match="There is no provider 'x'; there are: cluster, local"):
        await remove_provider(connection, "x")


async def test_a_provider_that_nothing_uses_goes_and_its_deleted_sessions_stay(connection: asyncpg.Connection) -> None:
    await apply(connection, read())
    number = await session(connection, "cluster", "deleted")
    with pytest.raises(NotFound, match="There is no machine config 'x'; there are: big, pod, small"):
        await remove_machine_config(connection, "x")
    await remove_machine_config(connection, "pod")
    await remove_provider(connection, "cluster")
    row = await connection.fetchrow("SELECT provider, provider_id FROM sessions WHERE id = $1", number)
    assert tuple(row) == ("cluster", None)


async def test_a_provider_taken_into_use_in_the_same_moment_stays(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_provider(connection, name="p", kind="docker")

    async def nobody_yet(connection: asyncpg.Connection, provider_id: int) -> list[str]:
        await session(connection, "p")
        return []

    monkeypatch.setattr(machines, "_users", nobody_yet)
    with pytest.raises(Conflict, match="has just been taken into use"):
        await remove_provider(connection, "p")
    assert [row.name for row in await machines.providers(connection)] == ["p"]


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
