"""Changing providers and machine configs, one at a time: what must hold, and what is in use.

Whoever changes any does so alone, and tells the orchestrators in the same transaction (NOTIFY `providers`). Entries are
as `machine_schema` loads them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import asyncpg

from orchestrator.database import Connection
from orchestrator.errors import Conflict, InUse, Invalid, NotFound
from orchestrator.machine_fields import errors_by_field
from orchestrator.machine_schema import errors_for_kind, place_of
from orchestrator.machines import MachineConfig, ProviderRow, machine_configs, providers

Entry = Mapping[str, Any]
Row = TypeVar("Row", ProviderRow, MachineConfig)
# Of `pg_advisory_xact_lock`.
_CHANGES = 0x636C7573_6D636667
# Sessions that are named when they are in the way.
_SHOWN = 20


async def lock(connection: Connection) -> None:
    """Be the only one who changes providers and machine configs until the caller's transaction ends."""
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _CHANGES)


# Providers. -----------------------------------------------------------------------------------------------------------


async def add_provider(connection: Connection, entry: Entry) -> ProviderRow:
    """Add a provider; as the default it takes the old one's place. Raises Invalid, and Conflict when it is there."""
    async with connection.transaction():
        await lock(connection)
        rows = await providers(connection)
        if any(row.name == entry["name"] for row in rows):
            raise Conflict(f"There is a provider {entry['name']!r} already.")
        _refuse("provider", provider_errors(entry, [row.entry() for row in rows]))
        await put_provider(connection, entry)
        return _by_name(await providers(connection), entry["name"])


async def replace_provider(connection: Connection, provider_id: int, entry: Entry) -> ProviderRow:
    """Make a provider what the entry says, wholly. Raises NotFound, and Invalid, also for another name."""
    async with connection.transaction():
        await lock(connection)
        rows = await providers(connection)
        old = _by_id(rows, provider_id, "provider")
        others = [row.entry() for row in rows if row is not old]
        errors = _renamed(old.name, entry) | provider_errors(entry, others)
        if old.kind != entry["kind"]:
            configs = [one.entry() for one in await machine_configs(connection) if one.provider_id == old.id]
            errors |= kind_errors(entry, old.kind, await in_use(connection), configs)
        _refuse("provider", errors)
        await put_provider(connection, entry)
        return _by_name(await providers(connection), old.name)


async def remove_provider(connection: Connection, provider_id: int) -> ProviderRow:
    """Remove a provider that nothing uses; what it was. Raises NotFound, and InUse that says what uses it.

    Sessions that are deleted keep its name, and hold nothing up.
    """
    async with connection.transaction():
        await lock(connection)
        row = _by_id(await providers(connection), provider_id, "provider")
        await _require_unused(connection, f"The provider {row.name!r}", "provider_id", row.id)
        try:
            async with connection.transaction():
                await connection.execute("DELETE FROM providers WHERE id = $1", row.id)
        except (asyncpg.CheckViolationError, asyncpg.ForeignKeyViolationError) as error:
            raise Conflict(
                f"The provider {row.name!r} has just been taken into use: delete its sessions first."
            ) from error
        await _tell(connection)
        return row


def provider_errors(entry: Entry, others: Iterable[Entry]) -> dict[str, list[str]]:
    """What is wrong with a provider beside others, by field: one that would tell everything of another's sessions."""
    place = place_of(entry)
    for other in others:
        if place is not None and place_of(other) == place:
            return {"options.instance": [f"reaches what {other['name']!r} reaches, as the same instance: name another"]}
    return {}


def kind_errors(entry: Entry, old: str, used: Collection[str], configs: Iterable[Entry]) -> dict[str, list[str]]:
    """Why a provider must stay of its old kind, by field: of another it would not find the sessions that it runs.

    `used` are the providers that have sessions, `configs` the machine configs that it keeps.
    """
    if entry["name"] in used:
        return {"kind": [f"{entry['name']!r} has sessions, and is of the kind {old!r}"]}
    unfit = [config["name"] for config in configs if errors_for_kind(entry["kind"], config)]
    if unfit:
        return {"kind": [f"does not fit the machine configs of {entry['name']!r}: {', '.join(unfit)}"]}
    return {}


async def in_use(connection: Connection) -> set[str]:
    """The providers that have sessions."""
    rows = await connection.fetch(
        "SELECT DISTINCT p.name FROM providers p JOIN sessions s ON s.provider_id = p.id WHERE s.status <> 'deleted'"
    )
    return {row["name"] for row in rows}


async def put_provider(connection: Connection, entry: Entry) -> None:
    """Write a provider that was found right, within the caller's transaction."""
    if entry["default"]:
        await connection.execute(
            "UPDATE providers SET is_default = false, updated_at = now() WHERE is_default AND name <> $1", entry["name"]
        )
    await connection.execute(
        """INSERT INTO providers (name, kind, endpoint, options, credentials, enabled, is_default)
           VALUES ($1, $2, $3, $4, $5, $6, $7)
           ON CONFLICT (name) DO UPDATE SET kind = excluded.kind, endpoint = excluded.endpoint,
               options = excluded.options, credentials = excluded.credentials, enabled = excluded.enabled,
               is_default = excluded.is_default, updated_at = now()""",
        entry["name"], entry["kind"], entry["endpoint"], entry["options"], entry["credentials"], entry["enabled"],
        entry["default"],
    )  # fmt: skip
    await _tell(connection)


async def _tell(connection: Connection) -> None:
    await connection.execute("SELECT pg_notify('providers', '')")


# Machine configs. -----------------------------------------------------------------------------------------------------


async def add_machine_config(connection: Connection, entry: Entry) -> MachineConfig:
    """Add a machine config; as the default it takes the old one's place. Raises Invalid, Conflict when it is there."""
    async with connection.transaction():
        await lock(connection)
        if any(config.name == entry["name"] for config in await machine_configs(connection)):
            raise Conflict(f"There is a machine config {entry['name']!r} already.")
        return await _put_checked(connection, entry, None, {})


async def replace_machine_config(connection: Connection, config_id: int, entry: Entry) -> MachineConfig:
    """Make a machine config what the entry says, wholly. Raises NotFound, and Invalid, also for another name.

    Sessions keep what they were started with.
    """
    async with connection.transaction():
        await lock(connection)
        old = _by_id(await machine_configs(connection), config_id, "machine config")
        return await _put_checked(connection, entry, old, _renamed(old.name, entry))


async def remove_machine_config(connection: Connection, config_id: int) -> MachineConfig:
    """Remove a machine config that no session has; what it was. Raises NotFound, and InUse that says which have it."""
    async with connection.transaction():
        await lock(connection)
        config = _by_id(await machine_configs(connection), config_id, "machine config")
        # Waits for sessions that are being made with it.
        await connection.execute("SELECT FROM machine_configs WHERE id = $1 FOR UPDATE", config.id)
        await _require_unused(connection, f"The machine config {config.name!r}", "machine_config", config.name)
        await connection.execute("DELETE FROM machine_configs WHERE id = $1", config.id)
        return config


async def _put_checked(
    connection: Connection, entry: Entry, old: MachineConfig | None, errors: dict[str, list[str]]
) -> MachineConfig:
    kinds = {row.name: row.kind for row in await providers(connection)}
    found, unknown = await with_ids(connection, entry, old)
    _refuse("machine config", errors | machine_config_errors(entry, kinds) | unknown)
    await put_machine_config(connection, found)
    return _by_name(await machine_configs(connection), entry["name"])


def machine_config_errors(entry: Entry, kinds: Mapping[str, str]) -> dict[str, list[str]]:
    """What does not fit its provider, by field. `kinds` of all providers, by name."""
    if (kind := kinds.get(entry["provider"])) is None:
        names = ", ".join(sorted(kinds)) or "none"
        return {"provider": [f"there is no provider {entry['provider']!r}; there are: {names}"]}
    return errors_by_field(errors_for_kind(kind, entry))


async def with_ids(
    connection: Connection, entry: Entry, old: MachineConfig | None
) -> tuple[Entry, dict[str, list[str]]]:
    """The entry with ids in place of addresses, each once, and what is wrong with them, by field.

    An id that it had already may be of somebody who is gone: left out, what was for few might be for all.
    """
    addresses = [one.lower() for one in entry["users"] if isinstance(one, str)]
    rows = await connection.fetch(
        "SELECT id, lower(email) AS email FROM users WHERE id = ANY ($1) OR lower(email) = ANY ($2)",
        [one for one in entry["users"] if isinstance(one, int)],
        addresses,
    )
    by_address = {row["email"]: row["id"] for row in rows}
    users = {one: by_address.get(one.lower()) if isinstance(one, str) else one for one in entry["users"]}
    there = {row["id"] for row in rows} | set(old.users if old else ())
    errors: dict[str, list[str]] = {}
    if missing := [str(one) for one, user_id in users.items() if user_id not in there]:
        errors["users"] = [f"there is no user {', '.join(missing)}"]
    rows = await connection.fetch("SELECT id FROM workspaces WHERE id = ANY ($1)", entry["workspaces"])
    there = {row["id"] for row in rows} | set(old.workspaces if old else ())
    if missing := [str(one) for one in entry["workspaces"] if one not in there]:
        errors["workspaces"] = [f"there is no workspace {', '.join(missing)}"]
    ids = {
        "users": sorted({one for one in users.values() if one is not None}),
        "workspaces": sorted(set(entry["workspaces"])),
    }
    return {**entry, **ids}, errors


async def put_machine_config(connection: Connection, entry: Entry) -> None:
    """Write a machine config that was found right, within the caller's transaction."""
    provider_id = await connection.fetchval("SELECT id FROM providers WHERE name = $1", entry["provider"])
    if entry["default"]:
        await connection.execute(
            """UPDATE machine_configs SET is_default = false, updated_at = now()
                WHERE is_default AND provider_id = $1 AND name <> $2""",
            provider_id, entry["name"],
        )  # fmt: skip
    await connection.execute(
        """INSERT INTO machine_configs (name, provider_id, is_default, cpu, memory_bytes, disk_bytes, services, options,
                                        users, workspaces, max_sessions)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
           ON CONFLICT (name) DO UPDATE SET provider_id = excluded.provider_id, is_default = excluded.is_default,
               cpu = excluded.cpu, memory_bytes = excluded.memory_bytes, disk_bytes = excluded.disk_bytes,
               services = excluded.services, options = excluded.options, users = excluded.users,
               workspaces = excluded.workspaces, max_sessions = excluded.max_sessions, updated_at = now()""",
        entry["name"], provider_id, entry["default"], entry["cpu"], entry["memory"], entry["disk"],
        entry["services"], entry["options"], entry["users"], entry["workspaces"], entry["max_sessions"],
    )  # fmt: skip


# Both. ----------------------------------------------------------------------------------------------------------------


def _by_id(rows: Iterable[Row], row_id: int, what: str) -> Row:
    found = next((row for row in rows if row.id == row_id), None)
    if found is None:
        raise NotFound(f"There is no such {what}.")
    return found


def _by_name(rows: Iterable[Row], name: str) -> Row:
    return next(row for row in rows if row.name == name)


def _renamed(old: str, entry: Entry) -> dict[str, list[str]]:
    """Sessions and files know both by their names."""
    return {} if entry["name"] == old else {"name": [f"stays {old!r}: add another, and remove this one"]}


def _refuse(what: str, errors: Mapping[str, Sequence[str]]) -> None:
    if errors:
        lines = "; ".join(f"{field}: {problem}" for field, problems in errors.items() for problem in problems)
        raise Invalid(f"The {what} is not valid: {lines}.", field=next(iter(errors)), errors=errors)


async def _require_unused(connection: Connection, what: str, column: str, value: Any) -> None:
    configs = []
    if column == "provider_id":
        rows = await connection.fetch("SELECT name FROM machine_configs WHERE provider_id = $1 ORDER BY name", value)
        configs = [row["name"] for row in rows]
    rows = await connection.fetch(
        f"""SELECT s.id, s.project_uuid, p.name AS project, s.status, count(*) OVER () AS total
              FROM sessions s JOIN projects p ON p.id = s.project_id
             WHERE s.{column} = $1 AND s.status <> 'deleted' ORDER BY s.id LIMIT $2""",  # noqa: S608  Our own names.
        value,
        _SHOWN,
    )
    users = []
    if configs:
        users.append(f"the machine config{'s' * (len(configs) > 1)} {', '.join(configs)}")
    if rows:
        total = rows[0]["total"]
        listed = ", ".join(f"{row['id']} (project {row['project']}, {row['status']})" for row in rows)
        more = f" and {total - len(rows)} more" if total > len(rows) else ""
        users.append(f"the session{'s' * (total > 1)} {listed}{more}")
    if users:
        raise InUse(
            f"{what} is in use by {' and by '.join(users)}: remove or delete these first.",
            machine_configs=configs,
            sessions=[
                {
                    "id": row["id"],
                    "project_uuid": str(row["project_uuid"]),
                    "project": row["project"],
                    "status": row["status"],
                }
                for row in rows
            ],
            sessions_total=rows[0]["total"] if rows else 0,
        )
