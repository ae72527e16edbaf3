"""The connections of one log, opened and given back, until it is closed."""

from __future__ import annotations

import asyncio

from orchestrator.database import backoff
from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.rabbitmq.link import Endpoints, Link


class Links:
    """Opens links and knows which are open."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self._closing = asyncio.Event()
        self._opening: set[asyncio.Task[Link]] = set()
        self._links: set[Link] = set()

    def __len__(self) -> int:
        return len(self._links)

    async def close(self) -> None:
        """Open no more; whoever uses one hears that it is lost. Idempotent."""
        self._closing.set()
        if tasks := list(self._opening):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for link in list(self._links):
            link.wire.lose("the event log was closed")
        for link in list(self._links):
            await self.give_back(link)

    async def open(self) -> Link:
        """Open one. Raises Lost, LogUnavailable when the log is closed."""
        self.require_open()
        task = asyncio.create_task(self._endpoints.open(), name="rabbitmq: open")
        self._opening.add(task)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and not task.exception():
                await task.result().abandon()
            raise
        finally:
            self._opening.discard(task)
        if task.cancelled():
            raise LogUnavailable("the event log is closed")
        link = task.result()
        self._links.add(link)
        if self._closing.is_set():
            await self.give_back(link)
        self.require_open()
        return link

    async def give_back(self, link: Link) -> None:
        """Close one. Idempotent."""
        self._links.discard(link)
        await link.close()

    def require_open(self) -> None:
        """Raise LogUnavailable when the log is closed."""
        if self._closing.is_set():
            raise LogUnavailable("the event log is closed")

    async def pause(self, failures: int) -> None:
        """Back off, unless nothing has failed. Raises LogUnavailable when the log is closed."""
        if failures and not self._closing.is_set():
            try:
                async with asyncio.timeout(backoff(failures)):
                    await self._closing.wait()
            except TimeoutError:
                pass
        self.require_open()
