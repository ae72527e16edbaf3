"""`import-machine-configs` and `provider add | list | remove`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from auth import audit
from orchestrator import machines
from scripts import target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from environs import Env


async def import_file(env: Env, path: Path, *, dry_run: bool) -> list[machines.Change]:
    """Make providers and machine configs what the file says, all or none; a dry run only says what would change."""
    wanted = machines.read_file(path)
    async with target.connection(env) as connection:
        if dry_run:
            return await machines.plan(connection, wanted)
        async with connection.transaction():
            changes = await machines.apply(connection, wanted)
            await audit.record(connection, None, "machines.import", path.name, changes=[str(one) for one in changes])
        return changes


async def add(env: Env, name: str, kind: str, options: Mapping[str, Any], *, default: bool) -> machines.ProviderRow:
    """Add a provider. Raises Invalid, Conflict."""
    async with target.connection(env) as connection, connection.transaction():
        row = await machines.add_provider(connection, name=name, kind=kind, options=options, default=default)
        await audit.record(connection, None, "provider.add", f"provider:{name}", kind=kind)
    return row


async def providers(env: Env) -> list[machines.ProviderRow]:
    """All of them, by name."""
    async with target.connection(env) as connection:
        return await machines.providers(connection)


async def remove(env: Env, name: str) -> None:
    """Remove a provider that nothing uses. Raises NotFound, Conflict."""
    async with target.connection(env) as connection, connection.transaction():
        await machines.remove_provider(connection, name)
        await audit.record(connection, None, "provider.remove", f"provider:{name}")


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
