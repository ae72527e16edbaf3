"""What a client has missed that the history no longer holds, from the log itself: slow, so only a few at a time.

Reading the log costs this process some ten deliveries an event, which is why the number of readers, the way back and
the time that one may take are bounded. Beyond, the client is told that it was not recovered, or to come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import structlog

from gateway.realtime.history import History, RecentIds, Stored
from gateway.realtime.protocol import Position, event_frame
from gateway.settings import RealtimeSettings
from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.contract import Entry, EpochChanged, EventLog, Truncated

log = structlog.get_logger("gateway.archive")

# Seconds to wait for a free reader, and for the log to show the first entries.
_PATIENCE = 5.0
# Seconds that a replay may take. Whoever is not done by then comes back from where it is.
_DEADLINE = 60.0
# Seconds to wait for the feed to read what a replay has read already.
_BEHIND = 5.0
# Entries before the position that are read for their ids alone, and ids that are remembered: an event that was
# published twice is told once.
_LOOK_BACK = 5_000
_IDS = 20_000


class ArchiveLost(Exception):
    """The replay cannot go on. The client has what it was sent, and may resume after it."""


class Archive:
    """Makes replays from the log, as many at once as the settings allow."""

    def __init__(self, event_log: EventLog, history: History, settings: RealtimeSettings) -> None:
        # For the metrics.
        self.reading = 0
        self.replays = 0
        self._log = event_log
        self._history = history
        self._most_events = settings.replay_events
        self._free = asyncio.Semaphore(settings.replay_readers)

    async def open(self, position: Position) -> Replay | None:
        """A replay from `position`; to be closed. None when all that follows it cannot be had, or not now."""
        missed = self._history.floor - position.offset
        if not (position.epoch == self._history.epoch == self._log.epoch and 0 < missed <= self._most_events):
            return None
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._free.acquire()
        except TimeoutError:
            log.info("no reader is free for a replay", reading=self.reading)
            return None
        replay = Replay(self, position.offset)
        try:
            async with asyncio.timeout(_PATIENCE):
                await replay.begin(self._log)
        except BaseException as error:
            await replay.close()
            if not isinstance(error, Truncated | EpochChanged | LogUnavailable | TimeoutError):
                raise
            log.info("no replay from the log", after=position.offset, reason=str(error) or type(error).__name__)
            return None
        self.replays += 1
        return replay

    def enter(self) -> None:
        """Note that one more replay is under way."""
        self.reading += 1

    def leave(self) -> None:
        """Let the next one in."""
        self.reading -= 1
        self._free.release()


class Replay:
    """One pass over the log, from a client's position to where the history begins."""

    def __init__(self, archive: Archive, after: int) -> None:
        self._archive = archive
        self._after = after
        self._ids = RecentIds(_IDS)
        self._first: Sequence[Entry] = ()
        self._reader: AsyncGenerator[Sequence[Entry], None] | None = None
        self._open = True
        archive.enter()

    async def begin(self, event_log: EventLog) -> None:
        """Read the first entries. Raises Truncated when some after the position are gone, and what the log raises."""
        start = max(0, self._after - _LOOK_BACK)
        try:
            await self._begin(event_log, start)
        except Truncated as truncated:
            if truncated.first > self._after + 1:
                raise
            await self._begin(event_log, truncated.first - 1)

    async def _begin(self, event_log: EventLog, start: int) -> None:
        self._reader = event_log.read(start)
        self._first = await anext(self._reader)

    async def close(self) -> None:
        """Stop reading. Idempotent."""
        if self._open:
            self._open = False
            try:
                if self._reader is not None:
                    await self._reader.aclose()
            finally:
                self._archive.leave()

    async def pieces(
        self, history: History, channels: Sequence[str], until: int | None = None
    ) -> AsyncIterator[tuple[list[Stored], int]]:
        """The events of `channels` up to the offset `until`, in order, in pieces, each with the offset that is reached.

        Ends at the moment when the history holds all that follows, wherever that begins by then. Raises ArchiveLost.
        """
        epoch, wanted, loop = history.epoch, frozenset(channels), asyncio.get_running_loop()
        deadline = loop.time() + _DEADLINE
        assert self._reader is not None  # noqa: S101  For mypy: it has begun.
        batch = self._first
        while True:
            # What the feed reads later is told live, or from the history: it must not be told here, too.
            end = batch[-1].offset if until is None else min(batch[-1].offset, until)
            if end > history.head and not await history.reaches(Position(epoch, end), _BEHIND):
                raise ArchiveLost("the feed is behind")
            yield self._take(batch, wanted, end, loop.time()), end
            # Nothing is awaited between this look at the floor and the caller's next step.
            if history.epoch != epoch:
                raise ArchiveLost("the log has begun anew")
            if end >= history.floor or end == until:
                return
            if loop.time() > deadline:
                raise ArchiveLost("it takes too long")
            try:
                batch = await anext(self._reader)
            except (Truncated, EpochChanged, LogUnavailable, StopAsyncIteration) as error:
                raise ArchiveLost(str(error) or "the log has ended") from error

    def _take(self, batch: Sequence[Entry], wanted: frozenset[str], end: int, now: float) -> list[Stored]:
        taken = []
        for entry in batch:
            if entry.offset > end:
                break
            if not self._ids.add(entry.event_id):
                continue
            if entry.offset > self._after and entry.channel in wanted:
                try:
                    taken.append(Stored(entry.offset, entry.channel, event_frame(entry.body, entry.offset), now))
                except ValueError:
                    # The feed has told of it.
                    continue
        return taken
