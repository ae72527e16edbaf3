"""Follow an informer in a task, as the bridge does, and wait for what it tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from orchestrator.cluster.objects import Pod
from orchestrator.cluster.watch import Batch, Change, Informer

# (kind, name, synthetic) of a change.
Told = tuple[str, str, bool]


class Follower:
    """All that an informer has told so far."""

    def __init__(self, informer: Informer[Pod]) -> None:
        self.informer = informer
        self.batches: list[Batch[Pod]] = []
        self._news = asyncio.Event()

    @property
    def changes(self) -> list[Change[Pod]]:
        """Every change, in order."""
        return [change for batch in self.batches for change in batch.changes]

    @property
    def told(self) -> list[Told]:
        """Every change in short, in order."""
        return [(change.kind, change.object.metadata.name, change.synthetic) for change in self.changes]

    @property
    def syncs(self) -> int:
        """Lists that were complete."""
        return sum(batch.synced for batch in self.batches)

    def names(self) -> list[str]:
        """The names of what is held."""
        return sorted(pod.metadata.name for pod in self.informer.held())

    async def until(self, condition: Callable[[], bool], *, within: float = 20.0) -> None:
        """Return once it is true; looked at with each batch, and a few times a second. Raises TimeoutError."""
        async with asyncio.timeout(within):
            while not condition():
                try:
                    async with asyncio.timeout(0.05):
                        await self._news.wait()
                except TimeoutError:
                    continue
                self._news.clear()

    async def follow(self) -> None:
        """Never returns."""
        async with aclosing(self.informer.batches()) as batches:
            async for batch in batches:
                self.batches.append(batch)
                self._news.set()


@asynccontextmanager
async def following(informer: Informer[Pod]) -> AsyncIterator[Follower]:
    """Follow in a task that ends with the body; what it fails of fails the body."""
    follower = Follower(informer)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(follower.follow())
        try:
            yield follower
        finally:
            task.cancel()
