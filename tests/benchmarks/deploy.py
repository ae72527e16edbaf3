"""From a push to an app that is healthy, against git, docker build and docker run by hand, in turns.

Both clone the same commit from the same server, build it on the same base with a warm cache, run it and wait until it
answers. Ours begins with the webhook and ends with the status `live`, when Traefik is told to route to it; what follows
(the old one drained and removed) is waited for and not counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import secrets
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
import orjson

from orchestrator.docker.engine import Engine
from scripts.demo_repository import Repository, served
from tests import docker
from tests.benchmarks.report import Figure, Progress
from tests.benchmarks.servers import Missing
from tests.integration.endtoend.server import Client, Server

_ROUNDS = 5
_DOCKERFILE = """\
FROM {base}
COPY index.html /www/index.html
CMD ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"]
"""


@dataclass(slots=True)
class Bench:
    """What both are measured on."""

    engine: Engine
    base: str
    repository: Repository
    client: Client
    http: aiohttp.ClientSession
    server: Server
    app: dict[str, Any]
    folder: Path

    async def push(self) -> str:
        """One more commit; its id."""
        return await self.repository.commit({"index.html": f"<h1>{secrets.token_hex(8)}</h1>"}, "Another page")

    async def ours(self) -> float:
        """Seconds from a webhook to `live`."""
        commit = await self.push()
        socket = await self.follow()
        body = orjson.dumps({"branch": "main", "commit_id": commit})
        signature = hmac.new(self.app["hook_secret"].encode(), body, hashlib.sha256).hexdigest()
        headers = {"X-Signature-256": f"sha256={signature}", "X-Delivery-Id": secrets.token_hex(8)}
        url = f"{self.server.url}/api/v1/hooks/{self.app['id']}/generic"
        began = perf_counter()
        async with self.http.post(url, data=body, headers=headers) as answer:
            deployment = (await answer.json())["deployment_id"]
        took = await self.until(socket, deployment, began)
        await socket.close()
        return took

    async def follow(self) -> aiohttp.ClientWebSocketResponse:
        """A socket that hears what becomes of the app's deployments."""
        socket = await self.client.connect()
        await socket.send_json({"action": "subscribe", "channel": f"workspace:{self.app['workspace_id']}"})
        assert (await socket.receive_json())["event_type"] == "subscribed"
        return socket

    async def until(self, socket: aiohttp.ClientWebSocketResponse, deployment: int, began: float) -> float:
        """Seconds until it was live; returns when it has ended."""
        took = 0.0
        while True:
            message = await socket.receive_json()
            if message["event_type"] != "deployment.status" or message["data"]["id"] != deployment:
                continue
            data = message["data"]
            if data["status"] == "live" and not took:
                took = perf_counter() - began
            if data["finished_at"]:
                assert data["status"] == "live", data
                return took

    async def first(self) -> None:
        """Wait until the app's first deployment has ended."""
        while (await self.client.call("GET", f"/apps/{self.app['id']}"))["live_deployment"] is None:
            await asyncio.sleep(0.1)

    async def by_hand(self) -> float:
        """Seconds of the same with the commands."""
        await self.push()
        name = f"bench-{secrets.token_hex(4)}"
        with tempfile.TemporaryDirectory(dir=self.folder) as directory:
            began = perf_counter()
            await _run(
                "git", "clone", "--quiet", "--depth", "1", "--branch", "main", self.repository.url, f"{directory}/r"
            )
            await _run("docker", "build", "--quiet", "--tag", name, f"{directory}/r", host=self.engine.host)
            await _run("docker", "run", "--detach", "--name", name, name, host=self.engine.host)
            found = await self.engine.containers.inspect(name)
            assert found is not None
            address = next(iter(found["NetworkSettings"]["Networks"].values()))["IPAddress"]
            await self._answers(f"http://{address}:8080/")
            took = perf_counter() - began
        await self.engine.containers.remove(name)
        await self.engine.images.remove(name, force=True)
        return took

    async def _answers(self, url: str) -> None:
        while True:
            try:
                async with self.http.get(url) as answer:
                    assert answer.status == 200
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.01)


async def measure(rounds: int = _ROUNDS) -> list[Figure]:
    """Both in turns. Raises Missing without a Docker engine."""
    with Progress("from a push to a healthy app") as progress, tempfile.TemporaryDirectory(prefix="cc-") as name:
        try:
            engine = await docker.find()
        except docker.NoDocker as error:
            raise Missing(str(error)) from error
        async with engine, aiohttp.ClientSession() as http:
            base = await docker.make_busybox(engine, f"cluster-code-bench-busybox:{os.getpid()}")
            files = {"index.html": "<h1>first</h1>", "Dockerfile": _DOCKERFILE.format(base=base)}
            # It drains soon: that is not what is measured.
            server = Server(Path(name) / "data", DOCKER_HOST=engine.host, DEPLOY_DRAIN="0.1")
            await server.start()
            try:
                async with served(files) as repository:
                    client = Client(http, server)
                    await client.sign_in()
                    app = await _app(client, repository)
                    bench = Bench(engine, base, repository, client, http, server, app, Path(name))
                    await bench.first()
                    await bench.by_hand()
                    ours, by_hand = [], []
                    for number in range(rounds):
                        progress.at(f"{number + 1} of {rounds}")
                        by_hand.append(await bench.by_hand())
                        ours.append(await bench.ours())
                    await _remove(client, app)
            finally:
                await server.stop()
                await engine.images.remove(base, force=True)
    beyond = [one - other for one, other in zip(ours, by_hand, strict=True)]
    return [
        Figure(
            "push to healthy, beyond git, docker build and docker run by hand",
            f"+ {statistics.median(beyond):.2f} s (worst {max(beyond):.2f} s)",
            "at most 1.5 s",
            f"{statistics.median(ours):.2f} s and {statistics.median(by_hand):.2f} s, medians of {rounds} in turns",
        )
    ]


async def _app(client: Client, repository: Repository) -> dict[str, Any]:
    workspaces = await client.call("GET", "/workspaces")
    body = {
        "workspace_id": workspaces["items"][0]["id"], "name": f"bench-{secrets.token_hex(4)}",
        "repo_url": repository.url, "branch": "main", "port": 8080, "health_path": "/",
    }  # fmt: skip
    app: dict[str, Any] = await client.call("POST", "/apps", body)
    return app


async def _remove(client: Client, app: dict[str, Any]) -> None:
    await client.call("DELETE", f"/apps/{app['id']}")
    while (await client.request("GET", f"/api/v1/apps/{app['id']}"))[0] != 404:
        await asyncio.sleep(0.1)


async def _run(*argv: str, host: str = "") -> None:
    environment = {**os.environ, "DOCKER_BUILDKIT": "0", **({"DOCKER_HOST": host} if host else {})}
    process = await asyncio.create_subprocess_exec(
        *argv, env=environment, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0, argv
