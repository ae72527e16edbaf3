"""Providers and machine configs: their rows, their import from YAML, and which of them a new session gets.

A file holds `providers:` and `machine_configs:`, either or both, each a list. An import says how the entries that it
names shall be, wholly: a key left out has its default. What the file does not name stays, but for one thing: a new
default takes the place of the old one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import asyncpg
import yaml
from marshmallow import Schema, ValidationError, fields

from orchestrator.database import Connection
from orchestrator.errors import Conflict, Invalid, NotFound
from orchestrator.machine_schema import MachineConfigSchema, ProviderSchema, errors_for_kind, flatten

_LARGEST_FILE = 1 << 20
# Of `pg_advisory_xact_lock`: whoever changes providers or machine configs does so alone.
_CHANGES = 0x636C7573_6D636667


@dataclass(frozen=True, slots=True)
class ProviderRow:
    """Where sessions run. `state` (`unknown`, `up`, `down`) is what an orchestrator found at `checked_at`."""

    id: int
    name: str
    kind: str
    options: Mapping[str, Any]
    enabled: bool
    is_default: bool
    state: str
    message: str
    checked_at: datetime | None


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """A size of session at one provider."""

    id: int
    name: str
    provider_id: int
    provider: str
    is_default: bool
    cpu: float | None
    memory_bytes: int | None
    disk_bytes: int | None
    services: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]

    def snapshot(self) -> dict[str, Any]:
        """The arguments of `providers.contract.Machine`, as JSON can hold them: what a session keeps of its size."""
        return {
            "name": self.name,
            "cpu": self.cpu,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "services": self.services,
            "options": self.options,
        }


@dataclass(frozen=True, slots=True)
class Import:
    """A file that was read and found valid: entries as the schemas load them."""

    source: str
    providers: tuple[Mapping[str, Any], ...] = ()
    machine_configs: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """What an import does to one entry: `action` is `added`, `changed` (then `fields` says what) or `unchanged`."""

    kind: str
    name: str
    action: str
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = f" ({', '.join(self.fields)})" if self.fields else ""
        return f"{self.kind} {self.name}: {self.action}{what}"


class _Document(Schema):
    providers = fields.List(fields.Nested(ProviderSchema), load_default=list)
    machine_configs = fields.List(fields.Nested(MachineConfigSchema), load_default=list)


class _Loader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win in silence; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_file(path: Path) -> Import:
    """Read and validate a file, wholly. Raises Invalid that names every wrong place; blocks for the disk."""
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}.", field="file") from error
    if len(text) > _LARGEST_FILE:
        raise Invalid(f"{path} is larger than 1 MiB: that is no file of providers or machine configs.", field="file")
    return read_text(text, source=str(path))


def read_text(text: bytes | str, *, source: str) -> Import:
    """The same, of YAML that is in memory; `source` is what messages call it."""
    try:
        document = yaml.load(text, Loader=_Loader)  # noqa: S506  The loader is a SafeLoader.
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise Invalid(f"{source} is no YAML: {' '.join(str(error).split())}", field="file") from error
    if not isinstance(document, dict):
        raise Invalid(f"{source} must be a mapping with `providers` or `machine_configs`, or both.", field="file")
    try:
        loaded = _Document().load(document)
    except ValidationError as error:
        raise _invalid(source, flatten(error.messages)) from error
    result = Import(source, tuple(loaded["providers"]), tuple(loaded["machine_configs"]))
    _refuse(source, chain(_clashes(result), _wrong_for_kind(result, {})))
    return result


async def plan(connection: Connection, wanted: Import) -> list[Change]:
    """What `apply` would do. Raises Invalid where the file does not fit what is in the database."""
    rows = await providers(connection)
    _refuse(wanted.source, _wrong_for_kind(wanted, {row.name: row.kind for row in rows}, complete=True))
    in_use = {row["name"] for row in await connection.fetch(_PROVIDERS_IN_USE)}
    known = {row.name: _provider_values(row) for row in rows}
    configs = {config.name: _config_values(config) for config in await machine_configs(connection)}
    _refuse(wanted.source, _changed_kinds(wanted, known, in_use))
    return [
        *_changes("provider", wanted.providers, known, lambda entry: True),
        *_changes("machine config", wanted.machine_configs, configs, lambda entry: entry["provider"]),
    ]


async def apply(connection: Connection, wanted: Import) -> list[Change]:
    """Make the entries as the file has them, all or none, and say what that changed. Applying again changes nothing.

    Opens the transaction itself. Raises Invalid, as `plan` does.
    """
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _CHANGES)
        changes = await plan(connection, wanted)
        touched = {(change.kind, change.name) for change in changes if change.action != "unchanged"}
        for entry in wanted.providers:
            if ("provider", entry["name"]) in touched:
                await _put_provider(connection, entry)
        for entry in wanted.machine_configs:
            if ("machine config", entry["name"]) in touched:
                await _put_machine_config(connection, entry)
    return changes


async def providers(connection: Connection) -> list[ProviderRow]:
    """All providers by name."""
    rows = await connection.fetch(
        """SELECT id, name, kind, options, enabled, is_default, state, message, checked_at
             FROM providers ORDER BY name"""
    )
    return [ProviderRow(**row) for row in rows]


async def machine_configs(connection: Connection) -> list[MachineConfig]:
    """All machine configs by name."""
    rows = await connection.fetch(
        """SELECT m.id, m.name, m.provider_id, p.name AS provider, m.is_default, m.cpu, m.memory_bytes, m.disk_bytes,
                  m.services, m.options
             FROM machine_configs m JOIN providers p ON p.id = m.provider_id ORDER BY m.name"""
    )
    return [MachineConfig(**row) for row in rows]


async def add_provider(
    connection: Connection,
    *,
    name: str,
    kind: str,
    options: Mapping[str, Any] | None = None,
    enabled: bool = True,
    default: bool = False,
) -> ProviderRow:
    """Add a provider; as the default it takes the old one's place. Raises Invalid, and Conflict when it is there."""
    given = {"name": name, "kind": kind, "options": dict(options or {}), "enabled": enabled, "default": default}
    try:
        entry = ProviderSchema().load(given)
    except ValidationError as error:
        lines = flatten(error.messages)
        raise Invalid(f"The provider is not valid: {'; '.join(lines)}.", field=lines[0].split(":")[0]) from error
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _CHANGES)
        if await connection.fetchval("SELECT true FROM providers WHERE name = $1", name):
            raise Conflict(f"There is a provider {name!r} already: to change it, import a file.")
        await _put_provider(connection, entry)
    return next(row for row in await providers(connection) if row.name == name)


async def remove_provider(connection: Connection, name: str) -> None:
    """Remove a provider that nothing uses. Raises NotFound, and Conflict that says what uses it.

    Sessions that are deleted keep its name, and hold nothing up.
    """
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _CHANGES)
        provider_id = await connection.fetchval("SELECT id FROM providers WHERE name = $1", name)
        if provider_id is None:
            known = ", ".join(row.name for row in await providers(connection)) or "none"
            raise NotFound(f"There is no provider {name!r}; there are: {known}.")
        if users := await _users(connection, provider_id):
            raise Conflict(f"The provider {name!r} is in use by {' and '.join(users)}: remove or delete these first.")
        try:
            async with connection.transaction():
                await connection.execute("DELETE FROM providers WHERE id = $1", provider_id)
        except (asyncpg.CheckViolationError, asyncpg.ForeignKeyViolationError) as error:
            raise Conflict(f"The provider {name!r} has just been taken into use: delete its sessions first.") from error


async def remove_machine_config(connection: Connection, name: str) -> None:
    """Remove a machine config; sessions that were made with it keep their copy. Raises NotFound."""
    if not await connection.fetchval("DELETE FROM machine_configs WHERE name = $1 RETURNING true", name):
        known = ", ".join(config.name for config in await machine_configs(connection)) or "none"
        raise NotFound(f"There is no machine config {name!r}; there are: {known}.")


async def choose(
    connection: Connection, provider: str | None, machine_config: str | None
) -> tuple[ProviderRow, MachineConfig]:
    """What a session gets that asks for these, or for none in particular. Raises Invalid, naming what there is."""
    return pick(await providers(connection), await machine_configs(connection), provider, machine_config)


async def named(connection: Connection, provider: str, machine_config: str) -> MachineConfig:
    """The provider's machine config of that name. Raises Invalid, naming what there is."""
    own = [config for config in await machine_configs(connection) if config.provider == provider]
    return _named(own, machine_config, at=provider)


def pick(
    rows: Collection[ProviderRow], configs: Collection[MachineConfig], provider: str | None, machine_config: str | None
) -> tuple[ProviderRow, MachineConfig]:
    """The decision of `choose`: a machine config that is named brings its provider; what is not named is the default,
    or the only one there is."""
    by_name = {row.name: row for row in rows}
    if provider is None and machine_config is not None:
        provider = _named(configs, machine_config).provider
    chosen = _default_provider(rows) if provider is None else by_name.get(provider)
    enabled = ", ".join(row.name for row in rows if row.enabled) or "none"
    if chosen is None:
        raise Invalid(f"There is no provider {provider!r}; there are: {enabled}.", field="provider")
    if not chosen.enabled:
        raise Invalid(f"The provider {chosen.name!r} is disabled; enabled are: {enabled}.", field="provider")
    own = [config for config in configs if config.provider == chosen.name]
    if machine_config is not None:
        return chosen, _named(own, machine_config, at=chosen.name)
    defaults = [config for config in own if config.is_default] or (own if len(own) == 1 else [])
    if not defaults:
        raise Invalid(
            f"The provider {chosen.name!r} has no default machine config: name one of: {_names(own)}.",
            field="machine_config",
        )
    return chosen, defaults[0]


def _named(configs: Collection[MachineConfig], name: str, at: str | None = None) -> MachineConfig:
    for config in configs:
        if config.name == name:
            return config
    where = f" at the provider {at!r}" if at else ""
    raise Invalid(f"There is no machine config {name!r}{where}; there are: {_names(configs)}.", field="machine_config")


def _names(configs: Collection[MachineConfig]) -> str:
    return ", ".join(sorted(config.name for config in configs)) or "none"


def _default_provider(rows: Collection[ProviderRow]) -> ProviderRow:
    enabled = [row for row in rows if row.enabled]
    defaults = [row for row in enabled if row.is_default] or (enabled if len(enabled) == 1 else [])
    if not defaults:
        known = ", ".join(row.name for row in enabled) or "none"
        raise Invalid(f"There is no default provider: name one of: {known}.", field="provider")
    return defaults[0]


# The rest is what the import is made of.

_PROVIDERS_IN_USE = """
    SELECT DISTINCT p.name FROM providers p JOIN sessions s ON s.provider_id = p.id WHERE s.status <> 'deleted'"""


def _invalid(source: str, lines: Collection[str]) -> Invalid:
    return Invalid(
        f"{source} is not valid, nothing was changed:\n" + "\n".join(f"  {one}" for one in lines), field="file"
    )


def _refuse(source: str, lines: Iterable[str]) -> None:
    if wrong := list(lines):
        raise _invalid(source, wrong)


def _clashes(wanted: Import) -> Iterator[str]:
    """Names and defaults that are there twice."""
    for key, entries in (("providers", wanted.providers), ("machine_configs", wanted.machine_configs)):
        names: dict[str, int] = {}
        defaults: dict[str, int] = {}
        for index, entry in enumerate(entries):
            if (first := names.setdefault(entry["name"], index)) != index:
                yield f"{key}[{index}].name: {entry['name']!r} is the name of {key}[{first}] already"
            if not entry["default"]:
                continue
            among = entry.get("provider", "")
            if (first := defaults.setdefault(among, index)) != index:
                of = f" of the provider {among!r}" if among else ""
                yield f"{key}[{index}].default: {key}[{first}] is the default{of} already"


def _wrong_for_kind(wanted: Import, known: Mapping[str, str], *, complete: bool = False) -> Iterator[str]:
    """What does not fit the provider's kind, and, when all providers are known, providers that do not exist."""
    kinds = {**known, **{entry["name"]: entry["kind"] for entry in wanted.providers}}
    for index, entry in enumerate(wanted.machine_configs):
        place = f"machine_configs[{index}]"
        if (kind := kinds.get(entry["provider"])) is not None:
            yield from flatten(errors_for_kind(kind, entry), place)
        elif complete:
            names = ", ".join(sorted(kinds)) or "none"
            yield f"{place}.provider: there is no provider {entry['provider']!r}; there are: {names}"


def _changed_kinds(wanted: Import, known: Mapping[str, Mapping[str, Any]], in_use: Collection[str]) -> Iterator[str]:
    """A provider of another kind would not find the sessions that the old one runs."""
    for index, entry in enumerate(wanted.providers):
        old = known.get(entry["name"])
        if old and old["kind"] != entry["kind"] and entry["name"] in in_use:
            yield f"providers[{index}].kind: {entry['name']!r} has sessions, and is of the kind {old['kind']!r}"


def _provider_values(row: ProviderRow) -> dict[str, Any]:
    return {"kind": row.kind, "options": row.options, "enabled": row.enabled, "default": row.is_default}


def _config_values(config: MachineConfig) -> dict[str, Any]:
    return {
        "provider": config.provider,
        "default": config.is_default,
        "cpu": config.cpu,
        "memory": config.memory_bytes,
        "disk": config.disk_bytes,
        "services": config.services,
        "options": config.options,
    }


def _changes(
    kind: str, entries: Collection[Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]], among: Any
) -> Iterator[Change]:
    """The difference that each entry makes, and those that lose their place as the default.

    `among` tells which group a default is the default of.
    """
    named = {entry["name"] for entry in entries}
    for entry in entries:
        old = known.get(entry["name"])
        if old is None:
            yield Change(kind, entry["name"], "added")
        else:
            fields = tuple(name for name, value in old.items() if entry[name] != value)
            yield Change(kind, entry["name"], "changed" if fields else "unchanged", fields)
        if entry["default"]:
            for name, other in known.items():
                if other["default"] and name not in named and among(other) == among(entry):
                    yield Change(kind, name, "changed", ("default",))


async def _put_provider(connection: Connection, entry: Mapping[str, Any]) -> None:
    if entry["default"]:
        await connection.execute(
            "UPDATE providers SET is_default = false, updated_at = now() WHERE is_default AND name <> $1", entry["name"]
        )
    await connection.execute(
        """INSERT INTO providers (name, kind, options, enabled, is_default) VALUES ($1, $2, $3, $4, $5)
           ON CONFLICT (name) DO UPDATE SET kind = excluded.kind, options = excluded.options,
               enabled = excluded.enabled, is_default = excluded.is_default, updated_at = now()""",
        entry["name"], entry["kind"], entry["options"], entry["enabled"], entry["default"],
    )  # fmt: skip


async def _put_machine_config(connection: Connection, entry: Mapping[str, Any]) -> None:
    provider_id = await connection.fetchval("SELECT id FROM providers WHERE name = $1", entry["provider"])
    if entry["default"]:
        await connection.execute(
            """UPDATE machine_configs SET is_default = false, updated_at = now()
                WHERE is_default AND provider_id = $1 AND name <> $2""",
            provider_id, entry["name"],
        )  # fmt: skip
    await connection.execute(
        """INSERT INTO machine_configs (name, provider_id, is_default, cpu, memory_bytes, disk_bytes, services, options)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
           ON CONFLICT (name) DO UPDATE SET provider_id = excluded.provider_id, is_default = excluded.is_default,
               cpu = excluded.cpu, memory_bytes = excluded.memory_bytes, disk_bytes = excluded.disk_bytes,
               services = excluded.services, options = excluded.options, updated_at = now()""",
        entry["name"], provider_id, entry["default"], entry["cpu"], entry["memory"], entry["disk"],
        entry["services"], entry["options"],
    )  # fmt: skip


async def _users(connection: Connection, provider_id: int) -> list[str]:
    """Who uses a provider, in words."""
    configs = [
        row["name"]
        for row in await connection.fetch(
            "SELECT name FROM machine_configs WHERE provider_id = $1 ORDER BY name", provider_id
        )
    ]
    sessions = [
        str(row["id"])
        for row in await connection.fetch(
            "SELECT id FROM sessions WHERE provider_id = $1 AND status <> 'deleted' ORDER BY id LIMIT 11", provider_id
        )
    ]
    users = []
    if configs:
        users.append(f"the machine config{'s' * (len(configs) > 1)} {', '.join(configs)}")
    if sessions:
        more = " and more" if len(sessions) > 10 else ""
        users.append(f"the session{'s' * (len(sessions) > 1)} {', '.join(sessions[:10])}{more}")
    return users
