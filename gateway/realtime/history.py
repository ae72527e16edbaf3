"""The last minutes of the log in memory, ready to be sent: what a client that comes back has missed.

Recovery is never partial: `floor` is the offset after which nothing is missing, and a position below it is refused.
"""

from __future__ import annotations

import asyncio
import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gateway.realtime.protocol import Position, event_frame
from orchestrator.eventlog.contract import Entry

# Seconds within which the same event id is one event: what `docs/protocol.md` promises to publishers.
_REPEAT_WINDOW = 300.0
# An id costs some 120 bytes, so that a flood of events cannot take more than about 120 MiB for them.
_MOST_IDS = 1_000_000
# Seconds that an event may stay beyond its time, so that not every event has the oldest looked at.
_LOOK = 0.5
# What an event costs beside its frame: the objects around it, on CPython 3.11.
_OVERHEAD = 200


class HistoryLost(Exception):
    """Events after the offset asked for are no longer kept."""


@dataclass(slots=True, eq=False)
class Stored:
    """One event as it goes out: `frame` is the whole WebSocket frame. `at` is the loop's time."""

    offset: int
    channel: str
    frame: bytes
    at: float


class RecentIds:
    """The ids that came last: at least `most` / 2 of them, at most `most`, unless `forget` is called before.

    Two sets that take turns, rather than an order: nothing is kept or done for a single id but its place in a set.
    """

    __slots__ = ("_half", "_new", "_old")

    def __init__(self, most: int) -> None:
        self._half = max(1, most // 2)
        self._new: set[str] = set()
        self._old: set[str] = set()

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def add(self, event_id: str) -> bool:
        """Remember it; False when it is known already."""
        if event_id in self._new or event_id in self._old:
            return False
        self._new.add(event_id)
        if len(self._new) >= self._half:
            self.forget()
        return True

    def forget(self) -> None:
        """Forget those that came before the last call."""
        self._old, self._new = self._new, set()


class _Index:
    """One channel's events by offset; the oldest are dropped without moving the others each time."""

    __slots__ = ("events", "start")

    def __init__(self) -> None:
        self.events: list[Stored] = []
        self.start = 0

    def drop_first(self) -> bool:
        """Drop the oldest; whether none is left."""
        self.start += 1
        if self.start == len(self.events):
            return True
        if self.start > 64 and self.start * 2 > len(self.events):
            del self.events[: self.start]
            self.start = 0
        return False

    def after(self, offset: int) -> Iterator[Stored]:
        events = self.events
        start = bisect_right(events, offset, lo=self.start, key=lambda stored: stored.offset)
        return (events[place] for place in range(start, len(events)))


class History:
    """Events of the last `max_seconds`, at most `max_bytes` of them (frames and what surrounds them)."""

    def __init__(self, epoch: str, max_seconds: float, max_bytes: int) -> None:
        self.epoch = epoch
        # Offsets: nothing after `floor` is missing here; `head` is the last that was read from the log.
        self.floor = 0
        self.head = 0
        self.bytes = 0
        self.repeats = 0
        self.max_seconds = max_seconds
        self._max_bytes = max_bytes
        self._events: deque[Stored] = deque()
        self._channels: dict[str, _Index] = {}
        self._ids = RecentIds(_MOST_IDS)
        self._next_forgetting = 0.0
        self._next_look = 0.0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def __len__(self) -> int:
        return len(self._events)

    @property
    def position(self) -> Position:
        """The head, as clients are told it."""
        return Position(self.epoch, self.head)

    @property
    def most_entries(self) -> int:
        """More entries than this are never kept, however small they are."""
        return self._max_bytes // _OVERHEAD

    def reset(self, epoch: str, floor: int) -> None:
        """Forget everything and begin after the offset `floor`, in `epoch`."""
        self.epoch, self.floor, self.head, self.bytes = epoch, floor, floor, 0
        self._events.clear()
        self._channels.clear()
        self._ids = RecentIds(_MOST_IDS)
        self._wake(everybody=True)

    def append(self, entry: Entry, now: float) -> Stored | None:
        """Keep the log's next entry and return it; None when its id was seen before. Raises ValueError on a wrong body.

        Offsets must grow. The head moves in every case.
        """
        self.head = entry.offset
        if self._waiting:
            self._wake()
        if not self._ids.add(entry.event_id):
            self.repeats += 1
            return None
        stored = Stored(entry.offset, entry.channel, event_frame(entry.body, entry.offset), now)
        self._events.append(stored)
        index = self._channels.get(entry.channel)
        if index is None:
            index = self._channels[entry.channel] = _Index()
        index.events.append(stored)
        self.bytes += len(stored.frame) + _OVERHEAD
        if now > self._next_look or self.bytes > self._max_bytes:
            self.expire(now)
        return stored

    def remember(self, entry: Entry) -> None:
        """Note the id of an entry that lies before what is to be told, so that a repeat of it is known."""
        self._ids.add(entry.event_id)

    def skip(self, offset: int) -> None:
        """Note that the log was read up to `offset`."""
        self.head = offset
        if self._waiting:
            self._wake()

    def expire(self, now: float) -> None:
        """Drop what is too old or too much. Its age is looked at by `append` once in a while only."""
        self._next_look = now + _LOOK
        events, oldest = self._events, now - self.max_seconds
        while events and (self.bytes > self._max_bytes or events[0].at < oldest):
            gone = events.popleft()
            self.floor = gone.offset
            self.bytes -= len(gone.frame) + _OVERHEAD
            if self._channels[gone.channel].drop_first():
                del self._channels[gone.channel]
        if now >= self._next_forgetting:
            self._next_forgetting = now + _REPEAT_WINDOW
            self._ids.forget()

    def after(
        self, channels: Iterable[str], offset: int, max_bytes: int, until: int | None = None
    ) -> tuple[list[Stored], int | None]:
        """The events of `channels` after `offset`, up to `until`, in order, about `max_bytes` of them, at least one.

        The second value is the offset to go on from, or None when there is nothing more. Raises HistoryLost.
        """
        if offset < self.floor:
            raise HistoryLost(f"events after offset {offset} are gone; the oldest kept follow {self.floor}")
        indices = [index for name in channels if (index := self._channels.get(name)) is not None]
        if len(indices) == 1:
            merged = indices[0].after(offset)
        else:
            merged = heapq.merge(*(index.after(offset) for index in indices), key=lambda stored: stored.offset)
        chunk: list[Stored] = []
        size = 0
        for stored in merged:
            if until is not None and stored.offset > until:
                break
            if size >= max_bytes:
                return chunk, chunk[-1].offset
            chunk.append(stored)
            size += len(stored.frame)
        return chunk, None

    async def reaches(self, position: Position, patience: float) -> bool:
        """Whether all that follows `position` is or will be here.

        Another gateway may have been ahead of this one by a moment: waits up to `patience` seconds for its offset.
        """
        if position.epoch == self.epoch and position.offset > self.head:
            waiter = asyncio.get_running_loop().create_future()
            pair = (position.offset, waiter)
            self._waiting.append(pair)
            try:
                async with asyncio.timeout(patience):
                    await waiter
            except TimeoutError:
                return False
            finally:
                if pair in self._waiting:
                    self._waiting.remove(pair)
        return position.epoch == self.epoch and self.floor <= position.offset <= self.head

    def _wake(self, *, everybody: bool = False) -> None:
        still = []
        for offset, waiter in self._waiting:
            if not everybody and offset > self.head:
                still.append((offset, waiter))
            elif not waiter.done():
                waiter.set_result(None)
        self._waiting = still
