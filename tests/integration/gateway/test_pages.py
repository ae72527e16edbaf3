from __future__ import annotations

import re

import pytest

from tests import asyncapi
from tests.integration.gateway.conftest import Api, Serve


@pytest.mark.parametrize("path", ["/", "/api/docs", "/events"])
async def test_a_page_loads_only_what_this_server_has(api: Api, path: str) -> None:
    page = await api.call("GET", path)
    assert page.status == 200
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    links = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
    assert links
    for link in links:
        if link.startswith("data:"):
            continue
        assert link.startswith("/")
        assert (await api.call("GET", link)).status == 200
    # A policy without 'unsafe-inline' runs no script that is in the page itself.
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=", page.body.decode())


async def test_nothing_else_is_served(api: Api) -> None:
    for name in ("index.html", "swagger-ui.js.map", "..%2Fapp.py", "%2e%2e", "docs.js%00"):
        assert (await api.call("GET", f"/api/docs/{name}")).status == 404

    for name in ("events.html", "package.json", "..%2Fapi%2Fdocs.py"):
        assert (await api.call("GET", f"/static/{name}")).status == 404


async def test_the_client_is_a_module_that_is_asked_for_again(api: Api) -> None:
    script = await api.call("GET", "/static/cluster-code.js")
    assert script.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert script.headers["Cache-Control"] == "no-cache"
    assert b"export class ClusterCode " in script.body
    again = await api.call("GET", "/static/cluster-code.js", headers={"If-None-Match": script.headers["ETag"]})
    assert again.status == 304
    assert "Access-Control-Allow-Origin" not in script.headers
    types = await api.call("GET", "/static/cluster-code.d.ts")
    assert types.headers["Content-Type"] == "text/plain; charset=utf-8"


async def test_pages_of_the_origins_that_are_allowed_may_import_the_client(serve: Serve) -> None:
    api = await serve(cors_origins=["https://shell.example"])
    script = await api.call("GET", "/static/cluster-code.js", headers={"Origin": "https://shell.example"})
    assert script.headers["Access-Control-Allow-Origin"] == "https://shell.example"


async def test_the_document_is_served_as_json(api: Api) -> None:
    answer = await api.call("GET", "/api/openapi.json")
    assert answer.json["openapi"] == "3.1.0"
    assert answer.body == (await api.call("GET", "/api/openapi.json")).body


async def test_the_asyncapi_document_is_served_and_linked(api: Api) -> None:
    answer = await api.call("GET", "/api/asyncapi.yaml")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/yaml")
    assert answer.body == asyncapi.PATH.read_bytes()
    for page in ("/", "/api/docs"):
        assert b'href="/api/asyncapi.yaml"' in (await api.call("GET", page)).body
