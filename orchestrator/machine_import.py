"""Providers and machine configs from YAML.

A file holds `providers:` and `machine_configs:`, either or both, each a list. An import says how the entries that it
names shall be, wholly: a key left out has its default. What the file does not name stays, but for one thing: a new
default takes the place of the old one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from marshmallow import Schema, ValidationError, fields

from orchestrator import machine_changes
from orchestrator.database import Connection
from orchestrator.errors import Invalid
from orchestrator.machine_fields import flatten
from orchestrator.machine_schema import MachineConfigSchema, ProviderSchema
from orchestrator.machines import MachineConfig, ProviderRow, machine_configs, providers

_LARGEST_FILE = 1 << 20


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
    kinds = {entry["name"]: entry["kind"] for entry in result.providers}
    own = ((index, entry) for index, entry in enumerate(result.machine_configs) if entry["provider"] in kinds)
    _refuse(source, chain(_clashes(result), _wrong_machine_configs(own, kinds)))
    return result


async def plan(connection: Connection, wanted: Import) -> list[Change]:
    """What `apply` would do. Raises Invalid where the file does not fit what is in the database."""
    return (await _planned(connection, wanted))[1]


async def apply(connection: Connection, wanted: Import) -> list[Change]:
    """Make the entries as the file has them, all or none, and say what that changed. Applying again changes nothing.

    Opens the transaction itself. Raises Invalid, as `plan` does.
    """
    async with connection.transaction():
        await machine_changes.lock(connection)
        wanted, changes = await _planned(connection, wanted)
        touched = {(change.kind, change.name) for change in changes if change.action != "unchanged"}
        for entry in wanted.providers:
            if ("provider", entry["name"]) in touched:
                await machine_changes.put_provider(connection, entry)
        for entry in wanted.machine_configs:
            if ("machine config", entry["name"]) in touched:
                await machine_changes.put_machine_config(connection, entry)
    return changes


async def _planned(connection: Connection, wanted: Import) -> tuple[Import, list[Change]]:
    """The file with ids in place of addresses, and what it would change. Raises Invalid."""
    rows = await providers(connection)
    configs = {config.name: config for config in await machine_configs(connection)}
    kinds = {**{row.name: row.kind for row in rows}, **{entry["name"]: entry["kind"] for entry in wanted.providers}}
    _refuse(wanted.source, _wrong_machine_configs(enumerate(wanted.machine_configs), kinds))
    found = []
    wrong: list[str] = []
    for index, entry in enumerate(wanted.machine_configs):
        with_ids, errors = await machine_changes.with_ids(connection, entry, configs.get(entry["name"]))
        wrong += flatten(errors, f"machine_configs[{index}]")
        found.append(with_ids)
    wanted = replace(wanted, machine_configs=tuple(found))
    known = {row.name: row.entry() for row in rows}
    changes = [
        *_changes("provider", wanted.providers, known, lambda entry: True),
        *_changes(
            "machine config",
            wanted.machine_configs,
            {name: config.entry() for name, config in configs.items()},
            lambda entry: entry["provider"],
        ),
    ]
    touched = {change.name for change in changes if change.kind == "provider" and change.action != "unchanged"}
    used = await machine_changes.in_use(connection)
    _refuse(wanted.source, chain(wrong, _wrong_providers(wanted, rows, configs.values(), used, touched)))
    return wanted, changes


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


def _wrong_machine_configs(entries: Iterable[tuple[int, Mapping[str, Any]]], kinds: Mapping[str, str]) -> Iterator[str]:
    """What does not fit the provider, and providers that do not exist. `kinds` by name of those that are looked at."""
    for index, entry in entries:
        yield from flatten(machine_changes.machine_config_errors(entry, kinds), f"machine_configs[{index}]")


def _wrong_providers(
    wanted: Import,
    rows: Iterable[ProviderRow],
    configs: Iterable[MachineConfig],
    used: Collection[str],
    touched: Collection[str],
) -> Iterator[str]:
    """What does not fit the other providers and what there is of each, of those that would change (`touched`)."""
    known = {row.name: row for row in rows}
    final = {name: row.entry() for name, row in known.items()} | {entry["name"]: entry for entry in wanted.providers}
    anew = {entry["name"] for entry in wanted.machine_configs}
    kept = [config.entry() for config in configs if config.name not in anew]
    for index, entry in enumerate(wanted.providers):
        name = entry["name"]
        if name not in touched:
            continue
        errors = machine_changes.provider_errors(entry, [other for other in final.values() if other is not entry])
        if (old := known.get(name)) is not None and old.kind != entry["kind"]:
            own = [config for config in kept if config["provider"] == name]
            errors |= machine_changes.kind_errors(entry, old.kind, used, own)
        yield from flatten(errors, f"providers[{index}]")


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
