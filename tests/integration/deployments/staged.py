"""A stage for workers: real rows and leases, and an engine of which a test says what its steps do."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.database import Pool, Wakeup, guard, listen
from orchestrator.deployments import queue, record
from orchestrator.deployments.apps import App
from orchestrator.deployments.contract import Image, Source, Task
from orchestrator.deployments.record import Deployment
from orchestrator.deployments.worker import Worker
from orchestrator.errors import ProviderUnavailable
from orchestrator.settings import DatabaseSettings, DeploySettings
from tests.conftest import no_task_left
from tests.integration.deployments.conftest import Place

DEADLINE = 30.0
STEPS = ["clone", "build", "run", "probe", "swap", "drain", "clean"]

# What a step does beside what it is expected to.
Act = Callable[[Task], Awaitable[None]]


@dataclass
class Engine:
    """An engine whose containers and images are two sets of names. `acts` by step, or by `(step, number)`."""

    away: str = ""
    acts: dict[Any, Act] = field(default_factory=dict)
    done: list[tuple[int, str]] = field(default_factory=list)
    containers: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)
    tasks: dict[int, Task] = field(default_factory=dict)
    asked: int = 0
    begun: dict[Any, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))

    async def check(self) -> None:
        self.asked += 1
        self._reach()

    async def clone(self, task: Task) -> Source:
        assert task.directory.is_dir()
        assert not list(task.directory.iterdir())
        await self._act("clone", task)
        (task.directory / "README").write_text("hello")
        return Source(task.directory, task.commit_id or "c" * 40, f"Commit of {task.number}")

    async def build(self, task: Task, source: Source) -> Image:
        assert (source.directory / "README").exists()
        await self._act("build", task)
        self.images.add(task.tag)
        return Image(task.tag, f"sha256:{task.deployment_id}")

    async def run(self, task: Task, image: Image) -> str:
        self.containers.add(task.container)
        await self._act("run", task)
        assert image.name in self.images
        return f"id-of-{task.container}"

    async def probe(self, task: Task, container: str) -> None:
        assert container == f"id-of-{task.container}"
        await self._act("probe", task)

    async def swap(self, task: Task, container: str) -> None:
        assert container == f"id-of-{task.container}"
        await self._act("swap", task)

    async def drain(self, task: Task) -> None:
        await self._act("drain", task)

    async def clean(self, task: Task) -> None:
        await self._act("clean", task)
        self.containers = {name for name in self.containers if name == task.container or not _of(task.app_name, name)}

    async def image_ids(self, app_id: int) -> set[str]:
        return {f"sha256:{image.rpartition(':')[2]}" for image in self.images}

    async def discard(self, task: Task) -> None:
        await self._act("discard", task)
        self.containers.discard(task.container)
        self.images.discard(task.tag)

    async def remove_app(self, app_id: int) -> None:
        self._reach()
        if act := self.acts.get("remove_app"):
            await act(None)  # type: ignore[arg-type]
        self.done.append((app_id, "remove_app"))

    def url(self, task: Task) -> str:
        return f"http://{task.app_name}.localhost"

    async def _act(self, step: str, task: Task) -> None:
        self.tasks[task.number] = task
        self.begun[step].set()
        self.begun[step, task.number].set()
        self._reach()
        act = self.acts.get((step, task.number)) or self.acts.get(step)
        if act is not None:
            await act(task)
        self.done.append((task.number, step))

    def _reach(self) -> None:
        if self.away:
            raise ProviderUnavailable(self.away)


def _of(app: str, container: str) -> bool:
    return container.rpartition("-")[0] == app


@dataclass
class Stage:
    """The database's side, an engine, and workers on demand."""

    place: Place
    database_settings: DatabaseSettings
    settings: DeploySettings
    # Or a real one.
    engine: Any = field(default_factory=Engine)

    @property
    def pool(self) -> Pool:
        return self.place.pool

    def worker(self, *, pool: Pool | None = None, engine: Any = None, **settings: Any) -> Worker:
        made = Worker(replace(self.settings, **settings), pool or self.pool, Wakeup(), engine or self.engine)
        assert made.working == 0
        return made

    @asynccontextmanager
    async def running(self, *, grace: float = 0.1, **kwargs: Any) -> AsyncIterator[Worker]:
        """A worker at work. In the end what it has is given back, and no task of it may be left."""
        worker = self.worker(**kwargs)
        async with no_task_left():
            tasks = [
                asyncio.create_task(listen(self.database_settings, {"deployments": worker._wakeup}), name="listen"),
                asyncio.create_task(guard("deployments", worker.iterate), name="deployments"),
                asyncio.create_task(guard("engine", worker.look_at_engine), name="engine"),
            ]
            try:
                yield worker
            finally:
                await worker.drain(grace)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=DEADLINE)
            assert all(task.cancelled() for task in tasks), tasks

    async def get(self, deployment: Deployment) -> Deployment:
        async with self.pool.acquire() as connection:
            found = await record.get(connection, deployment.id)
        assert found is not None
        return found

    async def until(self, deployment: Deployment, *statuses: str, **fields: Any) -> Deployment:
        """The deployment as soon as it is one of these, and its fields are so."""

        async def there() -> Deployment | None:
            now = await self.get(deployment)
            fits = now.status in statuses and all(getattr(now, name) == value for name, value in fields.items())
            return now if fits else None

        return await until(there, lambda: self.get(deployment))

    async def ended(self, deployment: Deployment, *statuses: str) -> Deployment:
        return await self.until(deployment, *statuses, finished=True)

    async def cancel(self, deployment: Deployment) -> Deployment:
        async with self.pool.acquire() as connection, connection.transaction():
            return await queue.cancel(connection, deployment.id)

    async def roll_back(self, deployment: Deployment) -> Deployment:
        async with self.pool.acquire() as connection, connection.transaction():
            return await queue.roll_back(connection, deployment.id, user_id=None)

    async def delete(self, app: App) -> None:
        async with self.pool.acquire() as connection, connection.transaction():
            await queue.delete_app(connection, app.id)

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        async with self.pool.acquire() as connection:
            return await connection.fetch(statement, *arguments)

    async def log(self, deployment: Deployment) -> str:
        """The whole log, whose pieces must follow one another without gaps."""
        rows = await self.fetch(
            "SELECT position, length, text FROM deployment_logs WHERE deployment_id = $1 ORDER BY position",
            deployment.id,
        )
        position = 0
        for row in rows:
            assert (row["position"], row["length"]) == (position, len(row["text"].encode()))
            position += row["length"]
        return "".join(row["text"] for row in rows)


def wait_for(event: asyncio.Event) -> Act:
    """A step that waits; cancelling ends it."""

    async def act(_: Task) -> None:
        await event.wait()

    return act


def say(*texts: str) -> Act:
    async def act(task: Task) -> None:
        for text in texts:
            task.say(text)

    return act


def fail(error: Exception) -> Act:
    async def act(_: Task) -> None:
        raise error

    return act


def history(told: Iterable[tuple[str, str, dict[str, Any]]], deployment: Deployment) -> list[str]:
    """What was told of a deployment on its channel: its status, and its steps as they were."""
    return [
        " ".join([data["status"], *(f"{step['name']}:{step['status']}" for step in data["steps"][-1:])])
        for event_type, channel, data in told
        if event_type == "deployment.status" and channel == f"deployment:{deployment.id}"
    ]


async def until(there: Callable[[], Awaitable[Any]], otherwise: Callable[[], Awaitable[Any]] | None = None) -> Any:
    """The first true answer, within a deadline; `otherwise` says what there is instead."""
    try:
        async with asyncio.timeout(DEADLINE):
            while not (answer := await there()):
                await asyncio.sleep(0.005)
            return answer
    except TimeoutError:
        pass
    raise AssertionError(f"did not come about; instead: {await otherwise() if otherwise else 'nothing'}")
