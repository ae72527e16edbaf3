"""Providers and machine configs: their rows, who may use them, and which of them a new session gets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from auth import tenants
from auth.errors import Forbidden
from orchestrator.database import Connection
from orchestrator.errors import Conflict, Invalid


@dataclass(frozen=True, slots=True)
class ProviderRow:
    """Where sessions run. `state` (`unknown`, `up`, `down`) is what an orchestrator found at `checked_at`."""

    id: int
    name: str
    kind: str
    endpoint: str | None
    options: Mapping[str, Any]
    # References (`orchestrator.credentials`), never values.
    credentials: Mapping[str, Mapping[str, str]]
    enabled: bool
    is_default: bool
    state: str
    message: str
    checked_at: datetime | None

    def entry(self) -> dict[str, Any]:
        """What `machine_schema.ProviderSchema` would load to make it what it is."""
        return {
            "name": self.name,
            "kind": self.kind,
            "endpoint": self.endpoint,
            "options": self.options,
            "credentials": self.credentials,
            "enabled": self.enabled,
            "default": self.is_default,
        }


@dataclass(frozen=True, slots=True)
class Asker:
    """Who wants to use a machine config, in which workspaces: that of a project, or all that the user is in."""

    user_id: int
    workspace_ids: Collection[int]
    is_admin: bool = False


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
    # Ids of who may use it, themselves or in any project of theirs; both empty: everybody.
    users: Sequence[int] = ()
    workspaces: Sequence[int] = ()
    # Sessions that may run with it at a time; None: any number.
    max_sessions: int | None = None

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

    def entry(self) -> dict[str, Any]:
        """What `machine_schema.MachineConfigSchema` would load to make it what it is."""
        return {
            "name": self.name,
            "provider": self.provider,
            "default": self.is_default,
            "cpu": self.cpu,
            "memory": self.memory_bytes,
            "disk": self.disk_bytes,
            "services": self.services,
            "options": self.options,
            "users": self.users,
            "workspaces": self.workspaces,
            "max_sessions": self.max_sessions,
        }

    def permits(self, asker: Asker | None) -> bool:
        """Whether it is for the asker. None: nobody's permission is asked for."""
        return (
            asker is None
            or asker.is_admin
            or not (self.users or self.workspaces)
            or asker.user_id in self.users
            or any(workspace_id in self.workspaces for workspace_id in asker.workspace_ids)
        )


async def providers(connection: Connection) -> list[ProviderRow]:
    """All providers by name."""
    rows = await connection.fetch(
        """SELECT id, name, kind, endpoint, options, credentials, enabled, is_default, state, message, checked_at
             FROM providers ORDER BY name"""
    )
    return [ProviderRow(**row) for row in rows]


async def machine_configs(connection: Connection, asker: Asker | None = None) -> list[MachineConfig]:
    """All machine configs that are for the asker, by name."""
    rows = await connection.fetch(
        """SELECT m.id, m.name, m.provider_id, p.name AS provider, m.is_default, m.cpu, m.memory_bytes, m.disk_bytes,
                  m.services, m.options, m.users, m.workspaces, m.max_sessions
             FROM machine_configs m JOIN providers p ON p.id = m.provider_id ORDER BY m.name"""
    )
    return [config for config in (MachineConfig(**row) for row in rows) if config.permits(asker)]


async def choose(
    connection: Connection, provider: str | None, machine_config: str | None, asker: Asker | None = None
) -> tuple[ProviderRow, MachineConfig]:
    """What a session gets that asks for these, or for none in particular, of what is for the asker.

    Raises Invalid, naming what there is, and Forbidden for a machine config that the asker may use elsewhere only.
    """
    configs = await machine_configs(connection)
    await _require_permitted(connection, configs, machine_config, asker)
    usable = [config for config in configs if config.permits(asker)]
    return pick(await providers(connection), usable, provider, machine_config)


async def named(
    connection: Connection, provider: str, machine_config: str, asker: Asker | None = None
) -> MachineConfig:
    """The provider's machine config of that name. Raises Invalid and Forbidden, as `choose` does."""
    own = [config for config in await machine_configs(connection) if config.provider == provider]
    await _require_permitted(connection, own, machine_config, asker)
    return _named([config for config in own if config.permits(asker)], machine_config, at=provider)


async def take_seat(connection: Connection, machine_config: str) -> bool:
    """Let one more session run with a machine config, within the caller's transaction, which makes it so.

    False when there is none of that name; one that there is stays until the transaction ends. Whoever wants a seat of a
    limited one waits for those before. Raises Conflict when all its seats are taken.
    """
    # The lock that a reference would take.
    limit = await connection.fetchrow(
        "SELECT max_sessions FROM machine_configs WHERE name = $1 FOR KEY SHARE", machine_config
    )
    if limit is None or limit[0] is None:
        return limit is not None
    most = await connection.fetchval(
        "SELECT max_sessions FROM machine_configs WHERE name = $1 FOR NO KEY UPDATE", machine_config
    )
    # A statement of its own, that sees what those before have committed.
    used = await connection.fetchval(
        "SELECT count(*) FROM sessions WHERE machine_config = $1 AND status <> 'deleted' AND desired = 'running'",
        machine_config,
    )
    if most is not None and used >= most:
        raise Conflict(
            f"The machine config {machine_config!r} takes {most} session{'s' * (most > 1)} at a time, and {used} run"
            f"{'s' * (used == 1)} or will: stop or delete one, or choose another machine config."
        )
    return True


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


async def _require_permitted(
    connection: Connection, configs: Collection[MachineConfig], name: str | None, asker: Asker | None
) -> None:
    """Raise Forbidden for one that the asker sees, but not for this workspace; who cannot see it is told of none."""
    config = next((one for one in configs if one.name == name), None)
    if config is None or asker is None or config.permits(asker):
        return
    everywhere = await tenants.workspace_ids(connection, asker.user_id)
    if config.permits(Asker(asker.user_id, everywhere)):
        raise Forbidden(f"The machine config {name!r} is for projects of other workspaces.")


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
