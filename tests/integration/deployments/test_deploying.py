"""Deployments as a whole: from a repository over HTTP to what answers, by real git and a real Docker engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import aiohttp
import pytest
import pytest_asyncio

from orchestrator.deployments import apps, labels, release
from orchestrator.deployments.apps import App
from orchestrator.deployments.contract import AppSecrets, AppSettings
from orchestrator.deployments.engine_work import EngineWork
from orchestrator.deployments.record import Deployment
from orchestrator.settings import DatabaseSettings, DeploySettings
from tests.docker import Owned
from tests.git_server import GitServer, Repository
from tests.integration.deployments.conftest import KEYS, Place
from tests.integration.deployments.staged import STEPS, Stage, until

SERVE = 'CMD ["httpd", "-f", "-p", "8080", "-h", "/www"]\n'


@dataclass
class Shop:
    """An app, its repository, and workers at a real engine."""

    stage: Stage
    owned: Owned
    app: App
    server: GitServer
    repository: Repository
    base: str

    def commit(self, page: str, dockerfile: str = "") -> str:
        return self.repository.commit(
            {"Dockerfile": f"FROM {self.base}\nCOPY page /www/\n{dockerfile or SERVE}", "page/index.html": page}, page
        )

    async def push(self) -> Deployment:
        return await self.stage.place.enqueue(self.app, cause="push")

    async def answer(self) -> str:
        """What the one container of the app answers whose gate is open."""
        serving = [one for one in await self.containers() if "(healthy)" in one["Status"]]
        [address] = [one["NetworkSettings"]["Networks"][self.stage.settings.network]["IPAddress"] for one in serving]
        async with aiohttp.ClientSession() as session, session.get(f"http://{address}:8080/") as response:
            return await response.text()

    async def containers(self) -> list[dict]:
        return await self.owned.engine.containers.list(labels.ours(self.stage.settings, app_id=self.app.id))

    async def left(self) -> tuple[int, int]:
        """How many containers and images the app has."""
        images = await self.owned.engine.images.list(labels.ours(self.stage.settings, app_id=self.app.id))
        return len(await self.containers()), len(images)


@pytest_asyncio.fixture
async def shop(
    place: Place, database_settings: DatabaseSettings, owned: Owned, busybox: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Shop]:  # fmt: skip
    monkeypatch.setattr(release, "LETS_GO", 0.1)
    monkeypatch.setattr(release, "STEADY", 0.1)
    settings = DeploySettings(
        directory=tmp_path / "deployments", secrets_key=["k" * 42 + "A"], instance=owned.instance,
        network=owned.instance, drain=0.1, free_bytes=1 << 20, probe_deadline=30.0,
    )  # fmt: skip
    stage = Stage(place, database_settings, settings, EngineWork(owned.engine, settings))
    # What the one that sweeps does.
    await release.ensure_network(owned.engine, settings)
    async with GitServer(tmp_path / "repositories") as server:
        server.credentials = "ann:hunter2-0123"
        async with place.pool.acquire() as connection, connection.transaction():
            app, _ = await apps.create(
                connection, KEYS, workspace_id=place.workspace_id, created_by=place.user_id, name=owned.instance,
                repo_url=server.url("shop"), branch=None, auto_deploy=True,
                settings=replace(AppSettings(), keep_images=2, health_path="/"),
                secrets=AppSecrets(deploy_user="ann", deploy_token="hunter2-0123", env={"PASSWORD": "correct horse"}),
            )  # fmt: skip
        yield Shop(stage, owned, app, server, server.repository("shop"), busybox)


async def test_a_commit_becomes_what_answers_a_broken_one_changes_nothing_and_both_are_gone_back_from(
    shop: Shop,
) -> None:
    stage = shop.stage
    async with stage.running():
        commit = shop.commit("one")
        first = await stage.ended(await shop.push(), "live", "failed")
        assert (first.status, first.commit_id, first.commit_message) == ("live", commit, "one"), first.message
        assert [(step["name"], step["status"]) for step in first.steps] == [(step, "done") for step in STEPS]
        assert await shop.answer() == "one"

        shop.commit("two", "RUN echo $PASSWORD; echo no such luck; false\n")
        second = await stage.ended(await shop.push(), "live", "failed")
        assert (second.status, second.reason, second.step) == ("failed", "BuildFailed", "build")
        assert "no such luck" in await stage.log(second)
        assert await shop.answer() == "one"

        shop.commit("three", 'CMD ["sh", "-c", "echo $PASSWORD is told; exit 3"]\n')
        third = await stage.ended(await shop.push(), "live", "failed")
        assert (third.status, third.step) == ("failed", "probe")
        assert "*** is told" in await stage.log(third)
        assert (await shop.answer(), await shop.left()) == ("one", (1, 1))

        shop.commit("four")
        fourth = await stage.ended(await shop.push(), "live", "failed")
        assert (await shop.answer(), await shop.left(), fourth.status) == ("four", (1, 2), "live")
        back = await stage.ended(await stage.roll_back(first), "live", "failed")
        assert (await shop.answer(), back.status) == ("one", "live")

        await stage.delete(shop.app)

        async def gone() -> bool:
            return not await stage.fetch("SELECT id FROM apps")

        await until(gone)
    assert await shop.left() == (0, 0)
    assert list(stage.settings.directory.iterdir()) == []
    told = str(await stage.place.told())
    assert "hunter2-0123" not in told
    assert "correct horse" not in told


@pytest.mark.parametrize("during", ["clone", "build", "probe"])
async def test_cancelling_ends_git_build_and_container_within_seconds(shop: Shop, during: str) -> None:
    stage = shop.stage
    steps = {"build": "RUN sleep 1000\n", "probe": 'CMD ["sleep", "1000"]\n'}
    shop.commit("one", steps.get(during, ""))
    if during == "clone":
        shop.server.silent.add("shop")
    async with stage.running():
        deployment = await shop.push()

        async def there() -> bool:
            now = await stage.get(deployment)
            if during == "clone":
                return now.step == during and shop.server.waiting.is_set()
            if during == "probe":
                return now.step == during
            return "sleep 1000" in await stage.log(deployment)

        await until(there)
        began = monotonic()
        await stage.cancel(deployment)
        cancelled = await stage.ended(deployment, "cancelled")
        took = monotonic() - began
    print(f"{during}: {took:.2f} s")
    assert cancelled.steps[-1]["name"] == during
    assert await shop.left() == (0, 0)
    assert list(stage.settings.directory.iterdir()) == []
    # Five seconds on a machine that has nothing else to do.
    assert took < 20
