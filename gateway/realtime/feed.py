"""The event log into history and hub: one reader a process, one frame an event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import orjson
import structlog

from gateway.realtime import liveness, rechecks
from gateway.realtime.history import History
from gateway.realtime.hub import Hub
from gateway.realtime.protocol import CloseCode
from orchestrator.database import Pool, backoff
from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.contract import Entry, EpochChanged, EventLog, Truncated
from orchestrator.eventlog.dead_letters import DeadLetters
from orchestrator.events import GATEWAY, PERMISSIONS_CHANGED

log = structlog.get_logger("gateway.feed")

# Entries before the history that a process which begins reads for their ids alone: what was published twice, the first
# time there, is told once.
_LOOK_BACK = 5_000

# What is done with the data of a control event. It must be quick.
Order = Callable[[Mapping[str, Any]], None]


class Feed:
    """Follows the log. `ready`: it has read all that was there when it began, or began anew in another epoch."""

    def __init__(self, event_log: EventLog, history: History, hub: Hub, pool: Pool) -> None:
        self.ready = False
        # For the metrics: bodies that were no envelope, starts from scratch, failures of the log.
        self.invalid = 0
        self.resets = 0
        self.failures = 0
        self.dead_letters = DeadLetters(pool)
        self._log = event_log
        self._history = history
        self._hub = hub
        self._pool = pool
        self._orders: dict[str, Order] = {PERMISSIONS_CHANGED: self._permissions_changed}
        # The epoch that the history is of; None before the first. The offset from which on it is warm.
        self._epoch: str | None = None
        self._target = 0
        # The log begins behind this offset, as far as it is known.
        self._oldest = 0
        self._last_event_at: float | None = None
        self._failures_in_a_row = 0

    @property
    def offset(self) -> int:
        """The last offset read."""
        return self._history.head

    @property
    def age(self) -> float | None:
        """Seconds since an entry was last read; None before the first."""
        at = self._last_event_at
        return None if at is None else asyncio.get_running_loop().time() - at

    async def run(self) -> None:
        """Follow the log, look after the connections, re-check permissions, note dead letters, for ever.

        Raises (in an ExceptionGroup) what ends any of these unexpectedly: the process must end then, since its
        clients would hear nothing more. Cancelling stops all of them.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="feed")
            group.create_task(liveness.watch(self._hub), name="feed: liveness")
            group.create_task(rechecks.run(self._hub, self._pool), name="feed: rechecks")
            group.create_task(self.dead_letters.run(), name="feed: dead letters")

    async def _follow(self) -> None:
        while True:
            try:
                if self._log.epoch != self._epoch:
                    await self._begin()
                else:
                    await self._read()
            except EpochChanged as lost:
                log.warning("the log has begun anew", epoch=lost.epoch)
            except Truncated as lost:
                self._oldest = lost.first - 1
                # Unless it is only what would have been read for its ids.
                if self.ready or self._oldest > self.offset:
                    self._start_anew(self._oldest)
            except LogUnavailable as error:
                self.failures += 1
                self._failures_in_a_row += 1
                log.warning("the log cannot be read", error=str(error), failures=self._failures_in_a_row)
                await asyncio.sleep(backoff(self._failures_in_a_row))

    async def _begin(self) -> None:
        """Begin with what the history would hold by now, so that clients of other gateways can resume here."""
        self.ready = False
        epoch = self._log.epoch
        if self._epoch is not None:
            # Whatever follows, it does not connect to what these clients have seen.
            self._hub.close_all(CloseCode.POSITION_LOST)
        floor = await self._log.offset_before(self._history.max_seconds)
        self._target = await self._log.head()
        if self._log.epoch == epoch:
            self._epoch, self._oldest = epoch, 0
            self._start_anew(max(floor, self._target - self._history.most_entries))

    async def _read(self) -> None:
        """Read on from the history's head, for ever. Raises what the log raises, RuntimeError when it ends."""
        self._look_ready()
        after = self.offset if self.ready else max(self.offset - _LOOK_BACK, self._oldest)
        async with aclosing(self._log.read(after)) as reader:
            async for batch in reader:
                self._failures_in_a_row = 0
                self.take(batch)
                self._look_ready()
                # Batches that lie ready must not keep the hub from writing, nor anybody else from running.
                await asyncio.sleep(0)
        raise RuntimeError("the event log has ended, which it must not while the feed reads it")

    def _look_ready(self) -> None:
        if not self.ready and self.offset >= self._target:
            log.info("history is warm", events=len(self._history), bytes=self._history.bytes, offset=self.offset)
            self.ready = True

    def take(self, batch: Sequence[Entry]) -> None:
        """Put a batch into the history and hand it to the hub. Repeats, and what was read before, go no further."""
        self._last_event_at = now = asyncio.get_running_loop().time()
        for entry in batch:
            if entry.offset <= self._history.head:
                self._history.remember(entry)
                continue
            if not entry.channel:
                self._history.skip(entry.offset)
                if entry.invalid:
                    self.invalid += 1
                    self.dead_letters.add(self._history.epoch, entry)
                    log.warning("skipped what is no event", offset=entry.offset, reason=entry.invalid)
                continue
            if entry.channel == GATEWAY:
                self._history.skip(entry.offset)
                self._obey(entry)
                continue
            try:
                stored = self._history.append(entry, now)
            except ValueError as error:
                self.invalid += 1
                self.dead_letters.add(self._history.epoch, entry, reason=str(error))
                log.warning("skipped an event", offset=entry.offset, error=str(error))
                continue
            if stored is not None:
                self._hub.publish(stored)

    def obey(self, event_type: str, order: Order) -> None:
        """Call `order` with the data of each control event of that type; its KeyError and TypeError: they are wrong."""
        self._orders[event_type] = order

    def _obey(self, entry: Entry) -> None:
        """Do what another part of the system asks of all gateways."""
        # Those of later versions are not for this one.
        if (order := self._orders.get(entry.event_type)) is None:
            return
        try:
            order(orjson.loads(entry.body)["data"])
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            self.invalid += 1
            log.warning("a control event is wrong", offset=entry.offset, event_type=entry.event_type, error=repr(error))

    def _permissions_changed(self, data: Mapping[str, Any]) -> None:
        user_id = data["user_id"]
        if not isinstance(user_id, int):
            raise TypeError("user_id is no whole number")
        self._hub.permissions_changed(user_id)

    def _start_anew(self, floor: int) -> None:
        """Nothing of what was read before connects to what comes: clients begin anew, too."""
        if self._hub.connections:
            log.warning("position lost", connections=len(self._hub.connections), floor=floor)
        self.resets += 1
        self._history.reset(self._log.epoch, floor)
        self._hub.close_all(CloseCode.POSITION_LOST)
