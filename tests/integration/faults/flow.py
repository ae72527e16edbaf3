"""Events that are numbered on their channels, published until each is confirmed, as the outbox does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from time import monotonic

from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.contract import EventLog
from orchestrator.events import Event


class Flow:
    """`sent`: the number of the last event of each channel that the log has confirmed. `attempts` counts the rest."""

    def __init__(self, log: EventLog) -> None:
        self.sent: Counter[str] = Counter()
        self.attempts = 0
        self._log = log
        self._locks: dict[str, asyncio.Lock] = {}

    async def send(self, channel: str, count: int = 1, *, size: int = 0) -> None:
        """Publish the next events of a channel, each with `size` bytes of text; returns once they are confirmed."""
        async with self._locks.setdefault(channel, asyncio.Lock()):
            first = self.sent[channel] + 1
            text = {"text": "x" * size} if size else {}
            events = [
                Event("test.event", channel, {"n": n, "t": monotonic(), **text}) for n in range(first, first + count)
            ]
            while True:
                self.attempts += 1
                try:
                    await self._log.publish(events)
                    break
                except LogUnavailable:
                    await asyncio.sleep(0.02)
            self.sent[channel] += count

    async def keep_sending(self, channels: Sequence[str], rate: float, *, size: int = 0) -> None:
        """For ever, so many events a second, to one channel after the other."""
        loop = asyncio.get_running_loop()
        start, number = loop.time(), 0
        while True:
            await self.send(channels[number % len(channels)], size=size)
            number += 1
            # What was late is made up for, but not all of it at once.
            start = max(start, loop.time() - number / rate - 0.2)
            await asyncio.sleep(max(0.0, start + number / rate - loop.time()))

    @asynccontextmanager
    async def flowing(self, channels: Sequence[str], rate: float, *, size: int = 0) -> AsyncIterator[None]:
        """Events flow while the body runs; all that were begun are confirmed when it ends."""
        task = asyncio.create_task(self.keep_sending(channels, rate, size=size), name="flow")
        try:
            yield
            assert not task.done(), task
        finally:
            for lock in self._locks.values():
                # Between two publications; what is under way comes to its end.
                await lock.acquire()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            for lock in self._locks.values():
                lock.release()
