"""`import-machine-configs`, `provider add | list | remove | test` and `machine-config list | remove`."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from marshmallow import ValidationError

from auth import audit
from orchestrator import credentials, holds, machine_changes, machine_import, machines
from orchestrator.errors import Invalid, NotFound, ProviderUnavailable, SettingsError
from orchestrator.machine_fields import errors_by_field
from orchestrator.machine_schema import ProviderSchema
from orchestrator.providers.contract import IN_PROCESS
from orchestrator.providers.registry import open_provider
from orchestrator.settings import OrchestratorSettings, load
from scripts import target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from environs import Env

    from orchestrator.providers.contract import Provider

Row = TypeVar("Row", machines.ProviderRow, machines.MachineConfig)
# Seconds that a provider gets to answer `test`, and to close.
TEST_DEADLINE = 30.0
# Seconds for which what an orchestrator has found is believed: it writes it down every minute.
FOUND_AGE = 120.0


async def import_file(env: Env, path: Path, *, dry_run: bool) -> list[machine_import.Change]:
    """Make providers and machine configs what the file says, all or none; a dry run only says what would change."""
    wanted = machine_import.read_file(path)
    async with target.connection(env) as connection:
        if dry_run:
            return await machine_import.plan(connection, wanted)
        async with connection.transaction():
            changes = await machine_import.apply(connection, wanted)
            await audit.record(connection, None, "machines.import", path.name, changes=[str(one) for one in changes])
        return changes


async def add(env: Env, given: Mapping[str, Any]) -> machines.ProviderRow:
    """Add a provider, given as an entry of a file is. Raises Invalid, Conflict."""
    try:
        entry = ProviderSchema().load(given)
    except ValidationError as error:
        errors = errors_by_field(error.messages)
        lines = "; ".join(f"{field}: {problem}" for field, problems in errors.items() for problem in problems)
        raise Invalid(f"The provider is not valid: {lines}.", field=next(iter(errors)), errors=errors) from error
    async with target.connection(env) as connection, connection.transaction():
        row = await machine_changes.add_provider(connection, entry)
        await audit.record(connection, None, "provider.add", f"provider:{row.name}", kind=row.kind)
    return row


async def providers(env: Env) -> list[machines.ProviderRow]:
    """All of them, by name."""
    async with target.connection(env) as connection:
        return await machines.providers(connection)


async def remove(env: Env, name: str) -> None:
    """Remove a provider that nothing uses. Raises NotFound, InUse."""
    async with target.connection(env) as connection, connection.transaction():
        row = _named(await machines.providers(connection), name, "provider")
        await machine_changes.remove_provider(connection, row.id)
        await audit.record(connection, None, "provider.remove", f"provider:{name}")


async def machine_configs(env: Env) -> list[machines.MachineConfig]:
    """All of them, by name."""
    async with target.connection(env) as connection:
        return await machines.machine_configs(connection)


async def remove_machine_config(env: Env, name: str) -> None:
    """Remove a machine config that no session has. Raises NotFound, InUse."""
    async with target.connection(env) as connection, connection.transaction():
        row = _named(await machines.machine_configs(connection), name, "machine config")
        await machine_changes.remove_machine_config(connection, row.id)
        await audit.record(connection, None, "machine-config.remove", f"machine-config:{name}")


async def test(env: Env, name: str) -> str:
    """Reach for a provider as an orchestrator would, with this process's environment; what answers, in a few words.

    One that an orchestrator has for itself is not taken from it: what that found last is the answer. Raises NotFound,
    and ProviderUnavailable when it cannot be opened or does not answer well, after TEST_DEADLINE at the latest.
    """
    # For as long as it is held.
    async with target.connection(env) as connection:
        row = _named(await machines.providers(connection), name, "provider")
        if row.kind in IN_PROCESS and not await holds.take(connection, row.id):
            return _as_found(row)
        provider = await _opened(env, row)
        try:
            async with asyncio.timeout(TEST_DEADLINE) as deadline:
                return await provider.check()
        except TimeoutError:
            if not deadline.expired():
                raise
            raise ProviderUnavailable(f"It did not answer within {TEST_DEADLINE:.0f} seconds.") from None
        finally:
            async with asyncio.timeout(TEST_DEADLINE):
                await provider.close()


async def _opened(env: Env, row: machines.ProviderRow) -> Provider:
    try:
        return open_provider(
            row.kind,
            row.name,
            row.options,
            endpoint=row.endpoint,
            credentials=await asyncio.to_thread(credentials.resolve, row.credentials),
            data_dir=load(OrchestratorSettings, env).data_dir,
            sink=lambda _: None,
        )
    except SettingsError as error:
        raise ProviderUnavailable(f"The provider {row.name!r} cannot be opened: {error}") from error


def _as_found(row: machines.ProviderRow) -> str:
    if row.state == "down":
        raise ProviderUnavailable(row.message)
    age = datetime.now(UTC) - row.checked_at if row.checked_at else None
    if row.state == "unknown" or age is None or age.total_seconds() > FOUND_AGE:
        raise ProviderUnavailable(f"An orchestrator runs the provider {row.name!r}, but has not said how it is.")
    return f"as the orchestrator that runs it found {age.total_seconds():.0f} seconds ago"


def _named(rows: Sequence[Row], name: str, what: str) -> Row:
    for row in rows:
        if row.name == name:
            return row
    raise NotFound(f"There is no {what} {name!r}; there are: {', '.join(row.name for row in rows) or 'none'}.")


def options(pairs: Sequence[str]) -> dict[str, Any]:
    """What `--option key=value` gives; the value is read as YAML. Raises ValueError."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"{pair!r} is no option: write key=value")
        try:
            result[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {key!r} is no YAML: {' '.join(str(error).split())}") from error
    return result


def references(pairs: Sequence[str]) -> dict[str, dict[str, str]]:
    """What `--credential name=env:VARIABLE` and `name=file:PATH` give. Raises ValueError, which repeats no value."""
    result: dict[str, dict[str, str]] = {}
    for pair in pairs:
        name, _, reference = pair.partition("=")
        kind, _, where = reference.partition(":")
        if not name or kind not in ("env", "file") or not where:
            raise ValueError("write name=env:VARIABLE or name=file:/path: a value itself is never taken")
        result[name] = {kind: str(Path(where).absolute()) if kind == "file" else where}
    return result
