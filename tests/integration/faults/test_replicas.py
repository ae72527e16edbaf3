"""Two gateways and two orchestrators on one RabbitMQ and one PostgreSQL: any one of them may be killed at any time.

What a client of `cluster-code demo` does goes on: whoever is left finishes it, and every event of it arrives once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from auth.permissions import Identity
from orchestrator import machine_import
from scripts.demo_repository import Repository, served
from tests.integration.faults.stage import Gateway, Stage
from tests.integration.faults.viewer import PATIENCE, Viewer

pytestmark = pytest.mark.timeout(240)

CONFIGS = Path(__file__).parents[3] / "configs"
# Seconds. What a killed orchestrator was doing is taken over soon.
HASTE = {"ORCHESTRATOR_LEASE": "3", "ORCHESTRATOR_POLL_INTERVAL": "0.5", "ORCHESTRATOR_RESYNC_INTERVAL": "2"}


@pytest_asyncio.fixture
async def repository() -> AsyncIterator[Repository]:
    async with served({"index.html": "<h1>A page of the replicas</h1>"}) as repository:
        yield repository


class Front:
    """A front end: asks one gateway after the other until one answers."""

    def __init__(self, http: aiohttp.ClientSession, gateways: list[Gateway]) -> None:
        self._http = http
        self._gateways = gateways
        self._token = ""

    async def sign_up(self) -> None:
        account = {"email": "replicas@example.org", "password": "correct horse battery staple"}
        await self.call("POST", "/auth/register", account | {"name": "R"})
        self._token = (await self.call("POST", "/auth/login", account))["access_token"]

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON answered. What cannot be served now is asked for again."""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        async with asyncio.timeout(PATIENCE):
            while True:
                for gateway in tuple(self._gateways):
                    try:
                        async with self._http.request(
                            method, f"{gateway.url}/api/v1{path}", json=body, headers=headers
                        ) as answer:
                            if answer.status == 503:
                                continue
                            assert answer.status < 400, (method, path, answer.status, await answer.text())
                            return await answer.json() if answer.status != 204 else None
                    except aiohttp.ClientError:
                        continue
                await asyncio.sleep(0.05)

    async def shown(self, url: str, page: str) -> None:
        """Return once the preview shows the page."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    async with self._http.get(url) as answer:
                        if page in await answer.text():
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("victim", range(4), ids=["gateway-a", "gateway-b", "orchestrator-a", "orchestrator-b"])
async def test_a_session_comes_and_goes_while_any_replica_is_killed(
    stage: Stage, repository: Repository, victim: int
) -> None:
    async with stage.pool.acquire() as connection:
        for name in ("providers.yaml", "machine-configs.yaml"):
            await machine_import.apply(connection, machine_import.read_file(CONFIGS / name))
    replicas = [stage.process(name, **HASTE) for name in ("gateway", "gateway", "orchestrator", "orchestrator")]
    gateways = replicas[:2]
    for process in replicas:
        await process.start()
    for process in gateways:
        await process.until_answer("/ready", 200)
    for process in replicas[2:]:
        await process.until_logged("orchestrator runs")
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:
            await flow(stage, Front(http, gateways), gateways, replicas[victim], repository)
        for process in replicas:
            assert process is replicas[victim] or await process.stop() == 0
    except BaseException:
        for process in replicas:
            print(f"---- {process.output.name}\n{process.output.read_text()[-5000:]}")
        raise


async def flow(stage: Stage, front: Front, gateways: list[Gateway], victim: Gateway, repository: Repository) -> None:
    await front.sign_up()
    me = await front.call("GET", "/users/me")
    identity = Identity(me["id"], me["email"], False)
    # Each client prefers another gateway.
    clients = [
        Viewer(lambda p=place: [gateways[p].port, gateways[1 - p].port], lambda: stage.tokens.issue_short(identity), [])
        for place in range(2)
    ]
    stage.viewers += clients
    for client in clients:
        client.start()
    await asyncio.gather(*(client.connected.wait() for client in clients))

    workspace = (await front.call("GET", "/workspaces"))["items"][0]["id"]
    project = await front.call(
        "POST", "/projects", {"workspace_id": workspace, "name": "Test", "repo_url": repository.url}
    )
    first = (await front.call("POST", "/sessions", {"project_id": project["id"]}))["id"]
    # The worst moment: the session is on its way, and half of it is there.
    await asyncio.gather(*(client.until(lambda c=client: "starting" in statuses(c, first)) for client in clients))
    await victim.kill()
    await asyncio.gather(*(client.until(lambda c=client: "running" in statuses(c, first)) for client in clients))
    await front.shown((await front.call("GET", f"/sessions/{first}"))["preview_url"], repository.page)
    await front.call("DELETE", f"/sessions/{first}")
    await asyncio.gather(*(client.until(lambda c=client: "deleted" in statuses(c, first)) for client in clients))

    # With one replica fewer everything goes on, from the beginning.
    second = (await front.call("POST", "/sessions", {"project_id": project["id"]}))["id"]
    await asyncio.gather(*(client.until(lambda c=client: "running" in statuses(c, second)) for client in clients))
    await front.call("DELETE", f"/sessions/{second}")
    await asyncio.gather(*(client.until(lambda c=client: "deleted" in statuses(c, second)) for client in clients))

    for client in clients:
        assert client.unrecovered == 0
        offsets = [event["offset"] for event in client.others]
        assert offsets == sorted(set(offsets)), "an event came twice or out of order"
    # Both clients, at whichever gateways they were, have got the same.
    assert clients[0].others == clients[1].others
    history = (await front.call("GET", f"/sessions/{first}/events"))["items"]
    assert len(history) == len(statuses(clients[0], first)), (history, statuses(clients[0], first))
    await stage.leave()


def statuses(client: Viewer, session_id: int) -> list[str]:
    """What the client was told of a session, on its user's channel."""
    return [
        event["data"]["status"]
        for event in client.others
        if event["event_type"] == "session.status"
        and event["data"]["id"] == session_id
        and event["channel"].startswith("user:")
    ]
