"""The event log in memory: for one process that holds gateway and orchestrator both. It ends with the process."""

from __future__ import annotations

import asyncio
import random
import string
from bisect import bisect_left
from collections.abc import AsyncGenerator, Sequence
from time import monotonic

from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.contract import Entry, Truncated
from orchestrator.events import Event

# Entries and, about, bytes that a reader gets at once.
_BATCH = 512
_BATCH_BYTES = 256 << 10
# What an entry costs beside its body.
_OVERHEAD = 300


class MemoryLog:
    """An `EventLog` of at most `max_bytes`; older entries are dropped. Belongs to one event loop.

    `offset` is the head to begin from (tests and benchmarks: offsets need not begin at 1).
    """

    def __init__(self, *, max_bytes: int = 64 << 20, offset: int = 0) -> None:
        self._epoch = "".join(random.choices(string.ascii_lowercase + string.digits, k=8))
        self._max_bytes = max_bytes
        # `_entries[_start]` has the offset `_first`; what lies before it is dropped, and leaves the list by and by.
        self._entries: list[Entry] = []
        self._times: list[float] = []
        self._start = 0
        self._first = offset + 1
        self._bytes = 0
        self._closed = False
        self._grown = asyncio.Event()

    @property
    def epoch(self) -> str:
        """Another for each log."""
        return self._epoch

    async def head(self) -> int:
        """The offset of the newest entry. Nothing is awaited."""
        return self._head

    async def offset_before(self, seconds: float) -> int:
        """Exactly the offset before the first entry of that time. Nothing is awaited."""
        return self._first - 1 + bisect_left(self._times, monotonic() - seconds, lo=self._start) - self._start

    @property
    def _head(self) -> int:
        return self._first + len(self._entries) - self._start - 1

    async def publish(self, events: Sequence[Event]) -> None:
        """Append all of them or, when the log is closed, none. Raises LogUnavailable. Nothing is awaited."""
        if self._closed:
            raise LogUnavailable("the event log is closed")
        offset = self._head
        added = [
            Entry(offset + place, event.id, event.event_type, event.channel, event.body())
            for place, event in enumerate(events, 1)
        ]
        if added:
            self._entries += added
            self._times += [monotonic()] * len(added)
            self._bytes += sum(len(entry.body) + _OVERHEAD for entry in added)
            self._drop()
            self._wake()

    async def read(self, after: int) -> AsyncGenerator[Sequence[Entry], None]:
        """As the contract says. Ends when the log is closed; raises LogUnavailable when it was closed before."""
        if self._closed:
            raise LogUnavailable("the event log is closed")
        while not self._closed:
            if after + 1 < self._first:
                raise Truncated(self._first)
            if batch := self._batch(after):
                after = batch[-1].offset
                yield batch
            else:
                await self._grown.wait()

    async def check(self) -> None:
        """Raises LogUnavailable when the log is closed."""
        if self._closed:
            raise LogUnavailable("the event log is closed")

    async def close(self) -> None:
        """End all readers. What was published and not read is lost."""
        self._closed = True
        self._wake()

    def _batch(self, after: int) -> Sequence[Entry]:
        begin = self._start + after + 1 - self._first
        batch = self._entries[begin : begin + _BATCH]
        size = 0
        for place, entry in enumerate(batch):
            size += len(entry.body)
            if size >= _BATCH_BYTES:
                return batch[: place + 1]
        return batch

    def _drop(self) -> None:
        while self._bytes > self._max_bytes and self._start < len(self._entries) - 1:
            self._bytes -= len(self._entries[self._start].body) + _OVERHEAD
            self._start += 1
            self._first += 1
        if self._start > 1024 and self._start * 2 > len(self._entries):
            del self._entries[: self._start]
            del self._times[: self._start]
            self._start = 0

    def _wake(self) -> None:
        """Wake all who wait now; those who wait later, wait for the next."""
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()
