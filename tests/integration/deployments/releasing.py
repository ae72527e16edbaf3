"""Apps to be released in tests: images of what answers and of what does not, and the steps that release them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.deployments import labels, release
from orchestrator.deployments.contract import AppSecrets, AppSettings, Image, Task
from orchestrator.docker import labels as marks
from orchestrator.settings import DeploySettings
from tests.docker import Owned, tar

# What runs in a container: `httpd` that answers `{text}` at `/`, and in `/cgi-bin` after two seconds at `slow`, with
# 500 at `bad`, and with 302 at `login?next=/`.
SERVE = "exec httpd -f -p $PORT -h /www"
# Seconds for what happens at an engine that has much to do.
DEADLINE = 30.0


@dataclass
class Site:
    """One app at the engine, `settings.network` and all."""

    owned: Owned
    base: str
    settings: DeploySettings
    # Containers and images are named after it, at an engine that all tests share.
    name: str
    app_id: int = 1
    said: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        """What was said so far."""
        return "".join(self.said)

    def task(self, number: int, secrets: AppSecrets | None = None, image: str | None = None, **settings: Any) -> Task:
        """The deployment with this number; so is its id."""
        return Task(
            app_id=self.app_id, app_name=self.name, workspace_id=1, deployment_id=number, number=number,
            repo_url="https://git.test/shop", branch=None, commit_id=None, image=image,
            settings=replace(AppSettings(), **settings), secrets=secrets or AppSecrets(),
            directory=Path("/nonexistent"), say=self.said.append,
        )  # fmt: skip

    async def image(self, task: Task, script: str = SERVE, text: str = "", **config: Any) -> Image:
        """The image that a build of this deployment would have made: it runs a shell script."""
        text = text or f"v{task.number}"
        slow = f"#!/bin/sh\nsleep 2\nprintf 'Content-Type: text/plain\\r\\n\\r\\n{text}'\n"
        files = {"www/": b"", "www/index.html": text, "www/cgi-bin/": b"", "www/cgi-bin/slow": slow}
        files |= {"www/cgi-bin/bad": "#!/bin/sh\nprintf 'Status: 500 Broken\\r\\n\\r\\n'\n"}
        moved = "printf 'Status: 302 Found\\r\\nLocation: /x\\r\\n\\r\\n'"
        files |= {"www/cgi-bin/login": f'#!/bin/sh\n[ "$QUERY_STRING" = next=/ ] && {moved}\n'}
        engine = self.owned.engine
        own = {**labels.ours(self.settings, app_id=task.app_id, deployment_id=task.deployment_id)}
        given = config.pop("Labels", {})
        made = await engine.containers.create(
            "", {"Image": self.base, "Cmd": ["sh", "-c", script], "Labels": own | given, **config}
        )
        try:
            await engine.containers.put_archive(made, "/", tar(files))
            repository, _, tag = task.tag.partition(":")
            params = {"container": made, "repo": repository, "tag": tag}
            committed = await engine.json("POST", "/commit", params=params, body={"Labels": own | given})
        finally:
            await engine.containers.remove(made)
        return Image(task.tag, str(committed["Id"]))

    async def deploy(self, task: Task, image: Image | None = None, *, tidy: bool = True) -> str:
        """All the steps that a worker takes after the build; the container's id."""
        engine, settings = self.owned.engine, self.settings
        if image is None:
            image = await self.image(task)
        container = await release.run(engine, task, image, settings)
        await release.probe(engine, task, container, settings)
        await release.swap(engine, task, container, settings)
        if tidy:
            await release.drain(engine, task, settings)
            await release.clean(engine, task, settings)
        return container

    async def containers(self) -> list[int]:
        """The deployments that the app's containers are of, by their names."""
        found = await self.owned.engine.containers.list(labels.ours(self.settings, app_id=self.app_id))
        return sorted(int(one["Names"][0].removeprefix(f"/{self.name}-")) for one in found)

    async def images(self) -> list[int | str]:
        """The deployments that the app's images are of, by their names; other names that they have as they are."""
        found = await self.owned.engine.images.list(
            {marks.INSTANCE: self.settings.instance, marks.APP: str(self.app_id)}
        )
        own = f"cluster-code-{self.name}:"
        names = sorted(name for one in found for name in one["RepoTags"] or ["<none>"])
        return [int(name.removeprefix(own)) if name.startswith(own) else name for name in names]

    async def runs(self, container: str | int, command: str) -> bool:
        """Whether a process with just this command line is in a container."""
        found = await self.owned.engine.json("GET", f"/containers/{self._ref(container)}/top")
        return any(process[-1] == command for process in found["Processes"])

    async def inspect(self, container: str | int) -> dict[str, Any]:
        """What the engine knows of a container that is there."""
        found = await self.owned.engine.containers.inspect(self._ref(container))
        assert found is not None
        return found

    def _ref(self, container: str | int) -> str:
        """By its id, or the deployment that it is of."""
        return container if isinstance(container, str) else f"{self.name}-{container}"


async def until(condition: Any, deadline: float = DEADLINE) -> None:
    """Return when an async condition holds."""
    end = time.monotonic() + deadline
    while not await condition():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.05)
