"""What a worker does, at a real Docker engine and with real git: the steps, each in its module."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from orchestrator.deployments import building, labels, release, source, sweep
from orchestrator.deployments.contract import Image, Source, Task
from orchestrator.docker.engine import Engine
from orchestrator.errors import ProviderUnavailable
from orchestrator.settings import DeploySettings


@dataclass(slots=True)
class EngineWork:
    """`worker.Work` at one engine."""

    engine: Engine
    settings: DeploySettings
    _network_seen: bool = False

    async def check(self) -> None:
        """Return when the engine answers, with an API that we speak, and has had the network of the apps.

        Engines before 25 let several networks have one name, which then names none of them: so one orchestrator makes
        it, the one that sweeps, before anybody begins.
        """
        await self.engine.connection.version()
        await self.engine.connection.ping()
        if not self._network_seen:
            if await self.engine.networks.inspect(self.settings.network) is None:
                raise ProviderUnavailable(f"Its network {self.settings.network} is about to be made.")
            self._network_seen = True

    async def clone(self, task: Task) -> Source:
        """See `source`."""
        return await source.checkout(task, self.settings)

    async def build(self, task: Task, source: Source) -> Image:
        """Unless the engine's disk has too little room. See `building`."""
        await sweep.require_room(self.engine, self.settings)
        return await building.build(self.engine, task, source, self.settings)

    async def run(self, task: Task, image: Image) -> str:
        """See `release`."""
        return await release.run(self.engine, task, image, self.settings)

    async def probe(self, task: Task, container: str) -> None:
        """See `release`."""
        await release.probe(self.engine, task, container, self.settings)

    async def swap(self, task: Task, container: str) -> None:
        """See `release`."""
        await release.swap(self.engine, task, container, self.settings)

    async def drain(self, task: Task) -> None:
        """See `release`."""
        await release.drain(self.engine, task, self.settings)

    async def clean(self, task: Task) -> None:
        """See `release`."""
        await release.clean(self.engine, task, self.settings)

    async def image_ids(self, app_id: int) -> set[str]:
        """The ids of the images that the engine has of an app."""
        found = await self.engine.images.list(labels.ours(self.settings, app_id=app_id))
        return {image["Id"] for image in found}

    async def discard(self, task: Task) -> None:
        """See `release`."""
        await release.discard(self.engine, task, self.settings)

    async def remove_app(self, app_id: int) -> None:
        """With what was kept to build it. See `release`."""
        await release.remove_app(self.engine, app_id, self.settings)
        await building.prune_cache(self.engine, self.settings, app_id=app_id, older=timedelta())

    def url(self, task: Task) -> str:
        """Where the app answers."""
        return labels.url(task.app_name, self.settings)
