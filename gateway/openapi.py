"""The OpenAPI 3.1 document, made from the declarations that also parse the requests."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web
from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from marshmallow import Schema, fields

from gateway.fields import MAX_ID
from gateway.operation import Operation, PathKind, operation_of
from orchestrator.events import MAX_NAME_LENGTH

_PATH_SCHEMAS: dict[PathKind, dict[str, Any]] = {
    PathKind.ID: {"type": "integer", "minimum": 1, "maximum": MAX_ID},
    PathKind.UUID: {"type": "string", "format": "uuid"},
    PathKind.CHANNEL: {"type": "string", "minLength": 1, "maxLength": MAX_NAME_LENGTH},
}

TAGS = {
    "auth": "Sign in, and swap a main token for the short one that opens a WebSocket.",
    "users": "Accounts.",
    "tokens": "Personal API tokens.",
    "workspaces": "Tenants and their members.",
    "projects": "What sessions are made for: a Git repository and its environment.",
    "sessions": "Development environments, one for each project.",
    "apps": "What is deployed from Git, and with what.",
    "deployments": "What was deployed, is being deployed or waits for it.",
    "hooks": "What Git hosts send.",
    "connections": "Who is connected, and by which token.",
    "machines": "Where sessions can run, and in which sizes.",
    "health": "For probes and operators.",
}


class Problem(Schema):
    """An answer that says no (RFC 9457)."""

    type = fields.String(required=True)
    title = fields.String(required=True)
    status = fields.Integer(required=True)
    detail = fields.String(required=True)
    request_id = fields.String(required=True)
    errors = fields.Dict(
        keys=fields.String(), values=fields.List(fields.String()), metadata={"description": "What is wrong, by field."}
    )
    in_use_by = fields.Dict(
        keys=fields.String(),
        metadata={"description": "Why what is in use is not removed: `sessions`, `sessions_total`, `machine_configs`."},
    )


def document(routes: Iterable[web.RouteDef], version: str) -> bytes:
    """The document as JSON, for the routes whose handlers declare an operation."""
    plugin = MarshmallowPlugin()
    spec = APISpec(
        title="Cluster Code",
        version=version,
        openapi_version="3.1.0",
        info={
            "description": "Cloud development environments: sessions, and every event of theirs in the browser. "
            "Events come by the WebSocket at /ws, or as server-sent events at /api/v1/events: see /api/asyncapi.yaml."
        },
        servers=[{"url": "/"}],
        tags=[{"name": name, "description": text} for name, text in TAGS.items()],
        plugins=[plugin],
    )
    converter: Any = plugin.converter
    converter.add_attribute_function(_property_names)
    spec.components.security_scheme("bearer", {"type": "http", "scheme": "bearer"})
    spec.components.schema("Problem", schema=Problem)
    for route in routes:
        handler: Any = route.handler
        declared = operation_of(handler)
        if declared is not None:
            described = _describe(route, declared)
            spec.path(path=route.path, operations={route.method.lower(): described})
    return orjson.dumps(spec.to_dict())


def _property_names(self: Any, field: fields.Field[Any], **_: Any) -> dict[str, Any]:
    """What keys an object may have, which the plugin leaves out."""
    if isinstance(field, fields.Dict) and field.key_field is not None:
        return {"propertyNames": self.field2property(field.key_field)}
    return {}


def _describe(route: web.RouteDef, declared: Operation) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"in": "path", "name": name, "required": True, "schema": _PATH_SCHEMAS[kind]}
        for name, kind in declared.path.items()
    ]
    parameters += [
        {"in": "header", "name": name, "required": False, **described} for name, described in declared.headers.items()
    ]
    if declared.query is not None:
        parameters.append({"in": "query", "schema": declared.query})
    described: dict[str, Any] = {
        "operationId": f"{declared.tag}_{route.handler.__name__}",
        "summary": declared.summary,
        "description": declared.description,
        "tags": [declared.tag],
        "parameters": parameters,
        "responses": {str(status): _answer(status, schema) for status, schema in declared.answers.items()},
    }
    for media_type, schema in declared.formats.items():
        described["responses"]["200"].setdefault("content", {})[media_type] = {"schema": schema or {"type": "string"}}
    problem = {"application/problem+json": {"schema": Problem}}
    described["responses"]["4XX"] = {"description": "The request was refused.", "content": problem}
    described["responses"]["5XX"] = {"description": "Try again later.", "content": problem}
    if declared.signed_in:
        described["security"] = [{"bearer": []}]
    if declared.raw is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
    if declared.body is not None:
        described["requestBody"] = {
            "required": declared.body_required,
            "content": {"application/json": {"schema": declared.body}},
        }
    return described


def _answer(status: int, schema: type[Schema] | None) -> dict[str, Any]:
    described: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if schema is not None:
        described["content"] = {"application/json": {"schema": schema}}
    return described
