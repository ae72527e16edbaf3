"""What people can choose from: the places where sessions run, and their sizes. Operators change them by command."""

from __future__ import annotations

from aiohttp import web
from marshmallow import Schema, fields

from gateway.fields import moment
from gateway.operation import Call, answer, operation
from orchestrator import machines


class Provider(Schema):
    """A place where sessions run."""

    name = fields.String(required=True)
    kind = fields.String(required=True)
    enabled = fields.Boolean(required=True)
    is_default = fields.Boolean(required=True)
    state = fields.String(required=True, metadata={"description": "unknown, up or down"})
    message = fields.String(required=True)
    checked_at = moment(allow_none=True)


class Providers(Schema):
    """All of them."""

    items = fields.List(fields.Nested(Provider), required=True)


class MachineConfig(Schema):
    """A size of sessions at a provider."""

    name = fields.String(required=True)
    provider = fields.String(required=True)
    is_default = fields.Boolean(required=True)
    cpu = fields.Float(required=True, allow_none=True, metadata={"description": "Cores."})
    memory_bytes = fields.Integer(required=True, allow_none=True)
    disk_bytes = fields.Integer(required=True, allow_none=True)
    services = fields.List(fields.String(), required=True)


class MachineConfigs(Schema):
    """All of them."""

    items = fields.List(fields.Nested(MachineConfig), required=True)


@operation("List providers", tag="machines", answers={200: Providers})
async def providers(call: Call) -> web.Response:
    """With what an orchestrator found when it last reached for each. Their options are for operators only."""
    rows = await machines.providers(call.connection)
    items = [
        {
            "name": row.name,
            "kind": row.kind,
            "enabled": row.enabled,
            "is_default": row.is_default,
            "state": row.state,
            "message": row.message,
            "checked_at": row.checked_at,
        }
        for row in rows
    ]
    return answer({"items": items})


@operation("List machine configs", tag="machines", answers={200: MachineConfigs})
async def machine_configs(call: Call) -> web.Response:
    """Commands and options are for operators only; the names of the services are for all."""
    rows = await machines.machine_configs(call.connection)
    items = [
        {
            "name": row.name,
            "provider": row.provider,
            "is_default": row.is_default,
            "cpu": row.cpu,
            "memory_bytes": row.memory_bytes,
            "disk_bytes": row.disk_bytes,
            "services": sorted(row.services),
        }
        for row in rows
    ]
    return answer({"items": items})
