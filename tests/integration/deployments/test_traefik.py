"""Releases behind a real Traefik: whoever asks at any moment is answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from orchestrator.deployments import release
from orchestrator.deployments.contract import StepFailed
from tests.integration.deployments.releasing import SERVE, Site, until
from tests.programs import program
from tests.traefik import Traefik

# It may have to wait until Traefik is built.
pytestmark = [pytest.mark.late, pytest.mark.timeout(1500)]


@pytest.fixture
async def traefik(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Traefik]:
    """In front of the site. It obeys after 100 ms, and once it has looked at all that is at a busy engine."""
    monkeypatch.setattr(release, "LETS_GO", 2.0)
    binary = await asyncio.to_thread(program, "traefik")
    async with Traefik(binary, site.owned.engine.host, site.settings.instance, tmp_path) as traefik:
        yield traefik


class Asking:
    """Asks again and again, over connections that are kept and over new ones, and counts the answers."""

    def __init__(self, url: str, host: str) -> None:
        self.answers: Counter[str] = Counter()
        self._url, self._host = url, host

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Ask meanwhile."""
        async with asyncio.TaskGroup() as group:
            askers = [group.create_task(self._ask(kept)) for kept in (True, True, False)]
            yield
            for asker in askers:
                asker.cancel()

    async def _ask(self, kept: bool) -> None:
        connector = aiohttp.TCPConnector(force_close=not kept)
        async with aiohttp.ClientSession(connector=connector) as session:
            while True:
                self.answers[await once(session, self._url, self._host)] += 1
                await asyncio.sleep(0.01)


async def once(session: aiohttp.ClientSession, url: str, host: str) -> str:
    """What is answered, or what went wrong."""
    try:
        async with session.get(url, headers={"Host": host}) as response:
            return await response.text() if response.status == 200 else str(response.status)
    except (aiohttp.ClientError, OSError) as error:
        return type(error).__name__


async def test_nobody_is_turned_away_while_versions_good_and_bad_follow_each_other(
    site: Site, traefik: Traefik
) -> None:
    engine, settings = site.owned.engine, site.settings
    url, host = f"http://{traefik.address}/", f"{site.name}.apps.test"
    first = site.task(1, health_path="/")
    image = await site.image(first)
    await site.deploy(first, image)
    await until(lambda: routed(site, traefik))
    asking = Asking(url, host)
    async with asking.going_on(), aiohttp.ClientSession() as session:
        await until(lambda: seen(asking, "v1"))

        second = site.task(2, health_path="/", domains=("shop.example.org",))
        container = await release.run(engine, second, await site.image(second), settings)
        await release.probe(engine, second, container, settings)
        # Begun at the old one, it is answered, though it takes a while.
        slow = asyncio.create_task(once(session, f"{url}cgi-bin/slow", host))
        await until(lambda: site.runs(1, "sleep 2"))
        await release.swap(engine, second, container, settings)
        await until(lambda: seen(asking, "v2"))
        await release.drain(engine, second, settings)
        await release.clean(engine, second, settings)
        assert await slow == "v1"
        assert await once(session, url, "shop.example.org") == "v2"

        broken = {
            "NotHealthy": ({"health_path": "/cgi-bin/bad"}, SERVE),
            "Crashed": ({}, "sleep 0.5; exit 1"),
        }
        for number, (reason, (options, script)) in enumerate(broken.items(), start=3):
            task = site.task(number, **options)
            made = await release.run(engine, task, await site.image(task, script, text="broken"), settings)
            with pytest.raises(StepFailed) as failed:
                await release.probe(
                    engine, task, made, replace(settings, probe_deadline=1.0 if reason == "NotHealthy" else 30.0)
                )
            assert failed.value.reason == reason
            await release.discard(engine, task, settings)

        # One that was cancelled while it was swapped.
        cancelled = site.task(6)
        await site.deploy(cancelled, tidy=False)
        await until(lambda: seen(asking, "v6"))
        await release.discard(engine, cancelled, settings)
        assert await site.containers() == [2]
        assert (await site.inspect(2))["Id"] == container

        del asking.answers["v1"]
        await site.deploy(site.task(7, image=image.name), image)
        await until(lambda: seen(asking, "v1"))
        assert await site.containers() == [7]
    assert set(asking.answers) == {"v1", "v2", "v6"}
    assert "multiple times" not in traefik.log


async def test_an_app_that_is_removed_is_served_no_more_and_others_are(site: Site, traefik: Traefik) -> None:
    await site.deploy(site.task(1))
    other = replace(site, app_id=2, name=f"bank-{site.name}")
    await other.deploy(other.task(2))
    await until(lambda: routed(site, traefik))
    async with aiohttp.ClientSession() as session:
        url, host = f"http://{traefik.address}/", f"{site.name}.apps.test"
        assert await once(session, url, host) == "v1"
        await release.remove_app(site.owned.engine, 1, site.settings)
        await until(lambda: answers(session, url, host, "404"))
        assert await once(session, url, f"bank-{host}") == "v2"
        assert await once(session, url, "unknown.apps.test") == "404"


async def routed(site: Site, traefik: Traefik) -> bool:
    return len(await traefik.servers(site.name)) == 1


async def seen(asking: Asking, answer: str) -> bool:
    return asking.answers[answer] > 0


async def answers(session: aiohttp.ClientSession, url: str, host: str, answer: str) -> bool:
    return await once(session, url, host) == answer
