"""Releases at an engine that is killed in the middle, and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from orchestrator.deployments import gate, release
from orchestrator.docker.engine import Engine
from orchestrator.errors import ProviderUnavailable
from orchestrator.settings import DeploySettings
from tests import docker
from tests.conftest import no_docker
from tests.docker import Daemon, Owned, make_busybox
from tests.integration.deployments.releasing import Site, until


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """An engine of this test's own, whose containers can be reached."""
    try:
        daemon = Daemon(reachable=True)
    except docker.NoDocker as error:
        no_docker(error)
    async with daemon:
        yield daemon


async def patiently(work: Callable[[], Awaitable[object]]) -> None:
    """Do a step as a worker does: again, while the engine is away."""
    while True:
        try:
            await work()
            return
        except ProviderUnavailable:
            await asyncio.sleep(0.1)


@pytest.mark.timeout(180)
async def test_an_engine_that_is_killed_in_any_step_delays_a_release_and_no_more(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "LETS_GO", 0.1)
    monkeypatch.setattr(release, "STEADY", 0.1)
    settings = DeploySettings(network="apps", instance="test", base_domain="apps.test", drain=0.1, probe_deadline=60.0)
    async with Engine(daemon.host) as engine:
        site = Site(Owned(engine, "test"), await make_busybox(engine, "base:1"), settings)
        await site.deploy(site.task(1))
        task = site.task(2, health_path="/")
        image = await site.image(task)
        steps: list[Callable[[], Awaitable[object]]] = [
            lambda: release.run(engine, task, image, settings),
            lambda: release.probe(engine, task, task.container, settings),
            lambda: release.swap(engine, task, task.container, settings),
            lambda: release.drain(engine, task, settings),
            lambda: release.clean(engine, task, settings),
        ]
        for step in steps:
            killed = asyncio.create_task(kill_and_start(daemon))
            try:
                await patiently(step)
            finally:
                await killed
            # One that was done before is done still.
            await patiently(step)
        assert await site.containers() == ["shop-2"]
        await until(lambda: serves(site))
        assert await site.images() == ["cluster-code-shop:1", "cluster-code-shop:2"]


async def serves(site: Site) -> bool:
    return gate.is_open(await site.inspect("shop-2"))


async def kill_and_start(daemon: Daemon) -> None:
    await asyncio.sleep(0.1)
    daemon.kill()
    await daemon.start()
