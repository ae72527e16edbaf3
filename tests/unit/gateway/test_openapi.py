from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway import openapi
from gateway.operation import operation_of
from gateway.routes import operations, routes


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    made: dict[str, Any] = orjson.loads(openapi.document(operations(), "1.2.3"))
    return made


def test_every_operation_is_described_once(document: dict[str, Any]) -> None:
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == {(route.method, route.path) for route in operations()}
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(ids)) == len(ids)


def test_every_route_of_the_api_is_described_or_an_alias_of_one_that_is() -> None:
    described = {route.handler for route in operations()}
    declared = {route.handler for route in routes() if operation_of(route.handler)}
    assert declared == described


def test_what_needs_a_token_says_so(document: dict[str, Any]) -> None:
    open_to_all = {
        (method, path)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if "security" not in operation
    }
    assert open_to_all == {
        ("post", "/api/v1/auth/register"),
        ("post", "/api/v1/auth/login"),
        ("post", "/api/v1/auth/refresh"),
        ("post", "/api/v1/auth/logout"),
        *(("post", f"/api/v1/hooks/{{app_id}}/{kind}") for kind in ("github", "gitlab", "generic")),
        ("get", "/health"),
        ("get", "/ready"),
    }


def test_bodies_take_no_unknown_fields(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    schema = document["components"]["schemas"]["NewProject"]
    assert schema["additionalProperties"] is False
    assert sorted(schema["required"]) == ["name", "workspace_id"]
    assert schema["properties"]["repo_url"]["type"] == ["string", "null"]


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    text = orjson.dumps(document).decode()
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
    assert "Session" in names
