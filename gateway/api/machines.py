"""What people can choose from: the places where sessions run, and their sizes. Administrators change them."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from marshmallow import Schema, fields

from auth import audit, tenants
from auth.permissions import Action, Scope, decide, has_scope
from gateway.fields import moment
from gateway.operation import Call, Database, PathKind, answer, nothing, operation
from orchestrator import machine_changes, machines
from orchestrator.errors import NotFound
from orchestrator.machine_schema import MachineConfigSchema, ProviderSchema

_DEFINITION = {"description": "What PUT takes to make it what it is; for administrators only."}


class ProviderDefinition(ProviderSchema):
    """What a provider is made from: the same as an entry of `providers` in a file. What is left out has its default."""


class MachineConfigDefinition(MachineConfigSchema):
    """What a machine config is made from: the same as an entry of `machine_configs` in a file."""


class Provider(Schema):
    """A place where sessions run."""

    id = fields.Integer(required=True)
    name = fields.String(required=True)
    kind = fields.String(required=True)
    enabled = fields.Boolean(required=True)
    is_default = fields.Boolean(required=True)
    state = fields.String(required=True, metadata={"description": "unknown, up or down"})
    message = fields.String(required=True)
    checked_at = moment(allow_none=True)
    definition = fields.Dict(keys=fields.String(), metadata=_DEFINITION)


class Providers(Schema):
    """All of them."""

    items = fields.List(fields.Nested(Provider), required=True)


class MachineConfig(Schema):
    """A size of sessions at a provider."""

    id = fields.Integer(required=True)
    name = fields.String(required=True)
    provider = fields.String(required=True)
    is_default = fields.Boolean(required=True)
    cpu = fields.Float(required=True, allow_none=True, metadata={"description": "Cores."})
    memory_bytes = fields.Integer(required=True, allow_none=True)
    disk_bytes = fields.Integer(required=True, allow_none=True)
    services = fields.List(fields.String(), required=True)
    max_sessions = fields.Integer(
        required=True,
        allow_none=True,
        metadata={"description": "How many may run with it at a time; null: any number."},
    )
    definition = fields.Dict(keys=fields.String(), metadata=_DEFINITION)


class MachineConfigs(Schema):
    """Those that the caller may use."""

    items = fields.List(fields.Nested(MachineConfig), required=True)


_PROVIDER = {"provider_id": PathKind.ID}
_MACHINE_CONFIG = {"machine_config_id": PathKind.ID}
_CHANGE: dict[str, Any] = {"tag": "machines", "database": Database.WRITE, "scope": Scope.ADMIN}


@operation("List providers", tag="machines", answers={200: Providers})
async def providers(call: Call) -> web.Response:
    """With what an orchestrator found when it last reached for each. Their options are for administrators only."""
    return answer({"items": [_provider(call, row) for row in await machines.providers(call.connection)]})


@operation("Read a provider", tag="machines", path=_PROVIDER, answers={200: Provider})
async def read_provider(call: Call) -> web.Response:
    """As in the list."""
    row = _of(call.path["provider_id"], await machines.providers(call.connection), "provider")
    return answer(_provider(call, row))


@operation("Add a provider", body=ProviderDefinition, answers={201: Provider}, **_CHANGE)
async def add_provider(call: Call) -> web.Response:
    """For administrators. Orchestrators open it within a second; 409 when there is one of that name."""
    decide(call.identity, Action.PROVIDER_WRITE)
    row = await machine_changes.add_provider(call.connection, call.body)
    await _record(call, "provider.add", f"provider:{row.name}", kind=row.kind)
    return answer(_provider(call, row), 201, location=f"/api/v1/providers/{row.id}")


@operation("Change a provider", path=_PROVIDER, body=ProviderDefinition, answers={200: Provider}, **_CHANGE)
async def replace_provider(call: Call) -> web.Response:
    """For administrators. The whole provider: what is left out has its default.

    Its name stays, and so does its kind while it has sessions.
    """
    decide(call.identity, Action.PROVIDER_WRITE)
    row = await machine_changes.replace_provider(call.connection, call.path["provider_id"], call.body)
    await _record(call, "provider.change", f"provider:{row.name}", kind=row.kind)
    return answer(_provider(call, row))


@operation("Remove a provider", path=_PROVIDER, answers={204: None}, **_CHANGE)
async def remove_provider(call: Call) -> web.Response:
    """For administrators. 409 while machine configs or sessions use it: `in_use_by` says which."""
    decide(call.identity, Action.PROVIDER_WRITE)
    row = await machine_changes.remove_provider(call.connection, call.path["provider_id"])
    await _record(call, "provider.remove", f"provider:{row.name}")
    return nothing()


@operation("List machine configs", tag="machines", answers={200: MachineConfigs})
async def machine_configs(call: Call) -> web.Response:
    """Those that the caller may use, in any workspace.

    Commands and options are for administrators only; the names of the services are for all.
    """
    return answer({"items": [_machine_config(call, row) for row in await _usable(call)]})


@operation("Read a machine config", tag="machines", path=_MACHINE_CONFIG, answers={200: MachineConfig})
async def read_machine_config(call: Call) -> web.Response:
    """As in the list; 404 for one that the caller may not use."""
    row = _of(call.path["machine_config_id"], await _usable(call), "machine config")
    return answer(_machine_config(call, row))


@operation("Add a machine config", body=MachineConfigDefinition, answers={201: MachineConfig}, **_CHANGE)
async def add_machine_config(call: Call) -> web.Response:
    """For administrators. 409 when there is one of that name."""
    decide(call.identity, Action.MACHINE_CONFIG_WRITE)
    row = await machine_changes.add_machine_config(call.connection, call.body)
    await _record(call, "machine-config.add", f"machine-config:{row.name}", provider=row.provider)
    return answer(_machine_config(call, row), 201, location=f"/api/v1/machine-configs/{row.id}")


@operation(
    "Change a machine config",
    path=_MACHINE_CONFIG,
    body=MachineConfigDefinition,
    answers={200: MachineConfig},
    **_CHANGE,
)
async def replace_machine_config(call: Call) -> web.Response:
    """For administrators. The whole machine config: what is left out has its default. Its name stays.

    Sessions keep what they were started with, until `PUT /api/v1/sessions/{session_id}/machine-config`.
    """
    decide(call.identity, Action.MACHINE_CONFIG_WRITE)
    row = await machine_changes.replace_machine_config(call.connection, call.path["machine_config_id"], call.body)
    await _record(call, "machine-config.change", f"machine-config:{row.name}", provider=row.provider)
    return answer(_machine_config(call, row))


@operation("Remove a machine config", path=_MACHINE_CONFIG, answers={204: None}, **_CHANGE)
async def remove_machine_config(call: Call) -> web.Response:
    """For administrators. 409 while sessions have it: `in_use_by` says which."""
    decide(call.identity, Action.MACHINE_CONFIG_WRITE)
    row = await machine_changes.remove_machine_config(call.connection, call.path["machine_config_id"])
    await _record(call, "machine-config.remove", f"machine-config:{row.name}")
    return nothing()


async def _usable(call: Call) -> list[machines.MachineConfig]:
    identity = call.identity
    everywhere = await tenants.workspace_ids(call.connection, identity.user_id)
    asker = machines.Asker(identity.user_id, everywhere, identity.is_admin)
    return await machines.machine_configs(call.connection, asker)


def _of(row_id: int, rows: list[Any], what: str) -> Any:
    found = next((row for row in rows if row.id == row_id), None)
    if found is None:
        raise NotFound(f"There is no such {what}.")
    return found


def _provider(call: Call, row: machines.ProviderRow) -> dict[str, Any]:
    shown = {
        "id": row.id,
        "name": row.name,
        "kind": row.kind,
        "enabled": row.enabled,
        "is_default": row.is_default,
        "state": row.state,
        "message": row.message,
        "checked_at": row.checked_at,
    }
    return {**shown, "definition": row.entry()} if _administers(call) else shown


def _machine_config(call: Call, row: machines.MachineConfig) -> dict[str, Any]:
    shown = {
        "id": row.id,
        "name": row.name,
        "provider": row.provider,
        "is_default": row.is_default,
        "cpu": row.cpu,
        "memory_bytes": row.memory_bytes,
        "disk_bytes": row.disk_bytes,
        "services": sorted(row.services),
        "max_sessions": row.max_sessions,
    }
    return {**shown, "definition": row.entry()} if _administers(call) else shown


def _administers(call: Call) -> bool:
    return call.identity.is_admin and has_scope(call.identity, Scope.ADMIN)


async def _record(call: Call, action: str, what: str, **details: Any) -> None:
    await audit.record(call.connection, call.identity.user_id, action, what, call.address, **details)
