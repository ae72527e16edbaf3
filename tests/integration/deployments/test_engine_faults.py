"""Deployments at an engine that is killed in the middle, and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.deployments import gate, labels, pipeline, release
from orchestrator.deployments.engine_work import EngineWork
from orchestrator.deployments.sweep import sweep
from orchestrator.docker import labels as marks
from orchestrator.docker.engine import Engine
from orchestrator.settings import DatabaseSettings, DeploySettings
from tests import docker
from tests.conftest import no_docker
from tests.docker import Daemon, make_busybox
from tests.git_server import GitServer
from tests.integration.deployments import staged
from tests.integration.deployments.conftest import KEYS, Place
from tests.integration.deployments.staged import Stage, until


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """An engine of this test's own, whose containers can be reached."""
    try:
        daemon = Daemon(reachable=True)
    except docker.NoDocker as error:
        no_docker(error)
    async with daemon:
        yield daemon


class Killing:
    """`EngineWork` whose engine is killed soon after each of the `steps` has begun for the first time."""

    def __init__(self, work: EngineWork, daemon: Daemon, steps: set[str]) -> None:
        self._work = work
        self._daemon = daemon
        self.steps = steps

    def __getattr__(self, name: str) -> Any:
        step = getattr(self._work, name)
        if name not in self.steps:
            return step
        self.steps.remove(name)
        return lambda *given: self._during(step, *given)

    async def _during(self, step: Callable[..., Awaitable[Any]], *given: Any) -> Any:
        killing = asyncio.create_task(self._kill())
        try:
            return await step(*given)
        finally:
            await killing

    async def _kill(self) -> None:
        await asyncio.sleep(0.1)
        self._daemon.kill()
        await self._daemon.start()


@pytest.mark.timeout(180)
async def test_an_engine_that_is_killed_during_build_run_and_swap_delays_a_deployment_and_no_more(
    place: Place, database_settings: DatabaseSettings, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "LETS_GO", 0.1)
    monkeypatch.setattr(release, "STEADY", 0.1)
    monkeypatch.setattr(pipeline, "_PATIENCE", 0.5)
    # For three starts of an engine.
    monkeypatch.setattr(staged, "DEADLINE", 120.0)
    settings = DeploySettings(
        network="apps", instance="test", base_domain="apps.test", directory=tmp_path / "deployments", drain=0.1,
        probe_deadline=60.0, free_bytes=1 << 20, secrets_key=["k" * 42 + "A"],
    )  # fmt: skip
    async with Engine(daemon.host) as engine, GitServer(tmp_path / "repositories") as server:
        base = await make_busybox(engine, "base:1")
        await release.ensure_network(engine, settings)
        app = await place.app(health_path="/", repo_url=server.url("shop"))
        work = Killing(EngineWork(engine, settings), daemon, set())
        stage = Stage(place, database_settings, settings, work)
        dockerfile = f'FROM {base}\nCOPY . /www\nRUN sleep 0.3\nCMD ["httpd", "-f", "-p", "8080", "-h", "/www"]\n'
        repository = server.repository("shop")
        async with stage.running():
            for page, killed in (("one", ()), ("two", ("build", "run", "swap"))):
                work.steps.update(killed)
                repository.commit({"Dockerfile": dockerfile, "index.html": page}, page)
                deployment = await stage.ended(await place.enqueue(app), "live", "failed")
                assert (deployment.status, work.steps) == ("live", set()), deployment
        await sweep(engine, place.pool, KEYS, settings)
        [container] = await engine.containers.list(labels.ours(settings))
        assert container["Names"] == [f"/shop-{deployment.id}"]

        async def serves() -> bool:
            return gate.is_open(await engine.containers.inspect(container["Id"]))

        await until(serves)
        rows = await place.pool.fetch("SELECT status, image_id FROM deployments ORDER BY id")
        assert [row["status"] for row in rows] == ["retired", "live"]
        images = await engine.images.list(labels.ours(settings))
        assert {image["Id"] for image in images if image["RepoTags"]} == {row["image_id"] for row in rows}
        assert len(await engine.networks.list({marks.INSTANCE: "test"})) == 1
    assert list(settings.directory.iterdir()) == []
