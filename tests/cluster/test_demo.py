"""`cluster-code dev` and `demo` with a KUBECONFIG, as a newcomer runs them, on a real cluster."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import pytest
import pytest_asyncio
import yaml

from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import INSTANCE, Namespace
from scripts import cluster as ours
from tests.cluster.conftest import IMAGE
from tests.integration.endtoend.server import Client, Server, command, until
from tests.proxy import TcpProxy

# Pods come and go meanwhile, on a machine that may be busy.
pytestmark = pytest.mark.timeout(300)
DEADLINE = 120.0


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cc-") as folder:
        yield Path(folder) / "data"


@pytest_asyncio.fixture
async def server(data_dir: Path, kubeconfig: Path, cluster: Cluster) -> AsyncIterator[Server]:
    """A server that is not started yet. Nothing of it is left, neither here nor in the cluster."""
    server = Server(data_dir, KUBECONFIG=str(kubeconfig))
    yield server
    if server._process is None:
        return
    mark = await instance(server) if server._process.returncode is None else None
    assert await server.stop() == 0
    await server.until_nothing_is_left()
    for one in await namespaces(cluster, mark) if mark else ():
        await cluster.delete(f"/api/v1/namespaces/{one}")


async def instance(server: Server) -> str:
    """What marks the server's objects in the cluster."""
    url = json.loads((server.data_dir / "dev.json").read_text())["database_url"]
    connection = await asyncpg.connect(url)
    try:
        options = await connection.fetchval("SELECT options FROM providers WHERE name = 'kubernetes'")
        return json.loads(options)["instance"]
    finally:
        await connection.close()


async def namespaces(cluster: Cluster, mark: str) -> list[str]:
    """Those of that installation."""
    pages = cluster.list("/api/v1/namespaces", Namespace, label_selector=f"{INSTANCE}={mark}")
    return [one.metadata.name async for page in pages for one in page.items]


def logged(server: Server, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in server.output.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


async def test_the_demonstration_ends_with_the_namespace_gone(server: Server, cluster: Cluster) -> None:
    await server.start()
    # It need not have come to that yet, where the cluster is busy.
    await until(lambda: bool(logged(server, "the demonstration's machine config runs")))
    (fitted,) = logged(server, "the demonstration's machine config runs")
    assert fitted["image"]
    process = await asyncio.create_subprocess_exec(
        *command("demo", "--provider", "kubernetes"), env=server.environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(200):
        output, errors = (stream.decode() for stream in await process.communicate())
    assert (process.returncode, errors) == (0, ""), output
    assert output.rstrip().endswith("All of it happened.")
    (project,) = re.findall(r"^ *project \d+ \(([0-9a-f-]{36})\)$", output, re.MULTILINE)
    # Pod by pod, from the socket.
    assert output.count(" session.pod ") > 3
    assert " session.event " in output
    assert "serving a page on port 3000" in output
    (pod,) = re.findall(r"^ *pod (session-\S+) on \S+: 3 of 3 containers ready$", output, re.MULTILINE)
    assert f"<h1>It runs</h1><p>in {pod}</p>" in output
    assert f"the namespace {project} is gone: the cluster has none of that name" in output
    assert await ours.gone(cluster, project)
    assert await namespaces(cluster, await instance(server)) == []


@pytest.fixture
def target(kubeconfig: Path) -> tuple[str, int]:
    """Where the cluster's API listens."""
    server = urlsplit(_cluster(yaml.safe_load(kubeconfig.read_text()))["server"])
    return str(server.hostname), server.port or 443


def _cluster(config: dict[str, Any]) -> dict[str, Any]:
    (context,) = [one["context"] for one in config["contexts"] if one["name"] == config["current-context"]]
    return next(one["cluster"] for one in config["clusters"] if one["name"] == context["cluster"])


def through(proxy: TcpProxy, kubeconfig: Path, folder: Path) -> Path:
    """The kubeconfig, by way of the proxy."""
    config = yaml.safe_load(kubeconfig.read_text())
    cluster = _cluster(config)
    cluster.setdefault("tls-server-name", urlsplit(cluster["server"]).hostname)
    cluster["server"] = f"https://127.0.0.1:{proxy.port}"
    for key in ("certificate-authority",):
        if key in cluster:
            cluster[key] = str(kubeconfig.parent / cluster[key])
    (path := folder / "through-the-proxy").write_text(yaml.safe_dump(config))
    return path


async def test_a_cluster_that_is_away_is_told_and_what_waits_for_it_goes_on_when_it_comes(
    server: Server, cluster: Cluster, kubeconfig: Path, target: tuple[str, int], tmp_path: Path
) -> None:
    server.environment["KUBERNETES_DEMO_IMAGE"] = IMAGE
    async with TcpProxy(*target) as proxy, aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
        await proxy.refuse()
        server.environment["KUBECONFIG"] = str(through(proxy, kubeconfig, tmp_path))
        await server.start()
        client = Client(http, server)
        await client.sign_in()

        async def ready() -> dict[str, Any]:
            async with http.get(f"{server.url}/ready") as answer:
                document = await answer.json()
                # Others serve meanwhile.
                assert (answer.status, document["status"]) == (200, "ready")
                return document["providers"]["kubernetes"]

        async def found(state: str) -> dict[str, Any]:
            async with asyncio.timeout(DEADLINE):
                while (told := await ready())["state"] != state:
                    await asyncio.sleep(0.1)
            return told

        told = await found("down")
        assert f"127.0.0.1:{proxy.port}" in told["message"]
        assert [line["message"] for line in logged(server, "provider checked") if line["provider"] == "kubernetes"]

        project = await client.call("POST", "/projects", {"name": "waits", "workspace_id": await workspace(client)})
        wish = {"project_id": project["id"], "provider": "kubernetes"}
        session = await client.call("POST", "/sessions", wish)
        async with asyncio.timeout(DEADLINE):
            while not session["stale"]:
                await asyncio.sleep(0.1)
                session = await client.call("GET", f"/sessions/{session['id']}")
        assert session["reason"] == "ProviderUnavailable"
        assert session["status"] in ("pending", "starting")

        await proxy.resume()
        session = await until_status(client, session["id"], "running")
        assert not session["stale"]
        await found("up")
        await client.call("DELETE", f"/sessions/{session['id']}")
        await until_status(client, session["id"], "deleted")
        assert await ours.gone(cluster, project["uuid"])
        # Before the proxy goes, and with it what the server holds on to.
        mark = await instance(server)
        assert await namespaces(cluster, mark) == []
        assert await server.stop() == 0


async def workspace(client: Client) -> int:
    return (await client.call("GET", "/workspaces"))["items"][0]["id"]


async def until_status(client: Client, session_id: int, status: str) -> dict[str, Any]:
    """The session once it has that status."""
    seen: dict[str, Any] = {}
    try:
        async with asyncio.timeout(DEADLINE):
            while seen.get("status") != status:
                await asyncio.sleep(0.1)
                seen = await client.call("GET", f"/sessions/{session_id}")
    except TimeoutError:
        raise AssertionError(f"the session did not become {status}: {seen}") from None
    return seen
