"""Consuming a queue or the stream over one lane: deliveries in order, bounded, acknowledged in batches."""

from __future__ import annotations

import asyncio
from typing import Any

from orchestrator.eventlog.rabbitmq.link import Lane, Link
from orchestrator.eventlog.rabbitmq.wire import Incoming, Lost, Taker, acknowledgement

# Bytes that may lie read and not taken, before the connection is read no further.
_MAX_WAITING = 16 << 20


class Subscription(Taker):
    """One consumer on a link of its own. `prefetch`: deliveries that the broker sends ahead."""

    def __init__(self, link: Link, prefetch: int) -> None:
        self.link = link
        self._prefetch = prefetch
        self._lane: Lane
        self._deliveries: list[Incoming] = []
        self._bytes = 0
        self._paused = False
        self._ended: Lost | None = None
        self._come = asyncio.Event()
        self._acknowledged = 0

    @classmethod
    async def open(cls, link: Link, queue: str, prefetch: int, **arguments: Any) -> Subscription:
        """Begin to consume. Raises Lost, with code 404 when there is no such queue."""
        subscription = cls(link, prefetch)
        lane = subscription._lane = await link.lane(subscription)
        await lane.consume(queue, prefetch, arguments)
        return subscription

    @property
    def waiting(self) -> int:
        """Deliveries that have come and were not taken."""
        return len(self._deliveries)

    async def take(self) -> list[Incoming]:
        """What has come, at least one, once it has. Raises Lost when the link is lost or silent, or the queue gone."""
        while not self._deliveries:
            if self._ended:
                raise self._ended
            self._come.clear()
            try:
                async with asyncio.timeout(self.link.heartbeat or None):
                    await self._come.wait()
            except TimeoutError:
                if self.link.silent:
                    self.link.drop("nothing was heard for two heartbeats")
        taken, self._deliveries = self._deliveries, []
        self._bytes = 0
        if self._paused:
            self._paused = False
            self.link.wire.transport.resume_reading()
        return taken

    def acknowledge(self, tag: int, *, at_once: bool = False) -> None:
        """All up to this one are done with. The broker is told when it matters, or `at_once`."""
        if at_once or tag - self._acknowledged > self._prefetch // 4:
            self._acknowledged = tag
            self._lane.write(acknowledgement(self._lane.number, tag))

    @property
    def ended(self) -> bool:
        """Whether no more can come, nor be acknowledged."""
        return self._ended is not None

    async def close(self) -> None:
        """Close the lane; the link is its opener's. Idempotent."""
        await self._lane.close()

    def delivered(self, deliveries: list[Incoming]) -> None:
        self._deliveries += deliveries
        self._bytes += sum([len(delivery.body) for delivery in deliveries])
        if self._bytes > _MAX_WAITING and not self._paused:
            self._paused = True
            self.link.wire.transport.pause_reading()
        self._come.set()

    def cancelled(self) -> None:
        self.lost(Lost("the consumer was ended: its queue is gone, or has moved"))

    def lost(self, error: Lost) -> None:
        self._ended = self._ended or error
        self._come.set()
