from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from gateway.realtime.feed import Feed
from gateway.realtime.history import History
from gateway.realtime.hub import Hub
from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.contract import Entry, EpochChanged, Truncated
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.events import GATEWAY, PERMISSIONS_CHANGED, Event
from tests.unit.realtime.wire import SETTINGS, connection, wire_of


class FailingLog(MemoryLog):
    """A memory log whose reading can be made to fail, and which can begin a new epoch."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.failure: Exception | None = None

    def fail(self, error: Exception) -> None:
        self.failure = error
        self._wake()

    def begin_anew(self) -> None:
        self._epoch = "second"
        self._entries, self._times, self._start, self._first = [], [], 0, 1
        self._wake()

    async def read(self, after: int) -> AsyncIterator[Sequence[Entry]]:
        epoch = self.epoch
        while epoch == self.epoch:
            if self.failure is not None:
                failure, self.failure = self.failure, None
                raise failure
            if after + 1 < self._first:
                raise Truncated(self._first)
            if batch := self._batch(after):
                after = batch[-1].offset
                yield batch
            elif self._closed:
                return
            else:
                await self._grown.wait()
        raise EpochChanged(self.epoch)


class Stage:
    def __init__(self, log: MemoryLog) -> None:
        self.log = log
        self.hub = Hub(SETTINGS)
        self.history = History(log.epoch, 600, 64 << 20)
        self.feed = Feed(log, self.history, self.hub, None)  # type: ignore[arg-type]
        self.task: asyncio.Task[None]

    def join(self, *channels: str):
        one = connection(*channels)
        self.hub.add(one)
        self.hub.attach(one)
        return one

    async def publish(self, *numbers: int, channel: str = "session:1") -> None:
        await self.log.publish([Event("a", channel, {"n": number}) for number in numbers])

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                assert not self.task.done()
                await asyncio.sleep(0)


@asynccontextmanager
async def running(log: MemoryLog) -> AsyncIterator[Stage]:
    stage = Stage(log)
    stage.task = asyncio.create_task(stage.feed.run())
    try:
        yield stage
    finally:
        stage.task.cancel()
        await asyncio.wait([stage.task])


async def test_events_go_from_the_log_to_history_and_subscribers() -> None:
    async with running(MemoryLog()) as stage:
        await stage.until(lambda: stage.feed.ready)
        assert stage.feed.age is None
        one = stage.join("session:1")
        await stage.publish(1, 2, 3)
        await stage.until(lambda: wire_of(one).offsets == [1, 2, 3])
        assert wire_of(one).messages[1] == {
            "event_type": "a",
            "channel": "session:1",
            "data": {"n": 2},
            "offset": 2,
        }
        assert stage.feed.offset == 3
        assert len(stage.history) == 3
        assert stage.feed.age is not None


async def test_a_new_process_reads_what_is_there_before_it_is_ready() -> None:
    log = MemoryLog(offset=500)
    await log.publish([Event("a", "session:1", {}) for _ in range(2_000)])
    stage = Stage(log)
    assert not stage.feed.ready
    async with running(log) as stage:
        await stage.until(lambda: stage.feed.ready)
        assert stage.feed.offset == 2_500
        assert stage.history.floor == 500
        assert len(stage.history) == 2_000


@pytest.mark.parametrize("kept", [20, 5])
async def test_a_new_process_knows_what_was_published_before_its_history_begins(kept: int) -> None:
    class Warm(MemoryLog):
        async def offset_before(self, seconds: float) -> int:
            return 500 + 20

    log = Warm(offset=500)
    repeated = [Event("a", "session:1", {"n": n}) for n in range(10)]
    await log.publish([Event("a", "session:1", {}) for _ in range(10)])
    await log.publish(repeated)
    await log.publish([Event("a", "session:1", {}), *repeated, Event("a", "session:1", {})])
    # The log itself may begin behind where it is looked for.
    while log._first <= 520 - kept:
        log._max_bytes = log._bytes - 1
        log._drop()
    async with running(log) as stage:
        await stage.until(lambda: stage.feed.ready)
        # Who resumes here has seen the others at another gateway.
        events, _ = stage.history.after(["session:1"], 520, 1 << 20)
        unknown = 10 - min(10, kept)
        assert [stored.offset for stored in events] == [521, *range(522, 522 + unknown), 532]
        assert (stage.history.floor, stage.feed.resets) == (520, 1)


async def test_an_event_published_twice_is_delivered_once() -> None:
    async with running(MemoryLog()) as stage:
        await stage.until(lambda: stage.feed.ready)
        one = stage.join("session:1")
        event = Event("a", "session:1", {})
        await stage.log.publish([event])
        await stage.log.publish([event, Event("a", "session:1", {})])
        await stage.until(lambda: wire_of(one).offsets == [1, 3])
        assert stage.history.repeats == 1


async def test_after_an_outage_it_goes_on_at_the_next_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.realtime.feed.backoff", lambda _: 0.0)
    log = FailingLog()
    async with running(log) as stage:
        await stage.until(lambda: stage.feed.ready)
        one = stage.join("session:1")
        for number in range(1, 4):
            await stage.publish(number)
            log.fail(LogUnavailable("staged"))
            await stage.until(lambda number=number: stage.feed.failures == number)
        await stage.publish(4)
        await stage.until(lambda: wire_of(one).offsets == [1, 2, 3, 4])
        assert one.closed is None


async def test_a_truncated_log_closes_all_clients_and_the_feed_begins_anew() -> None:
    log = FailingLog()
    async with running(log) as stage:
        await stage.publish(*range(1, 11))
        await stage.until(lambda: stage.feed.offset == 10)
        one = stage.join("session:1")
        log.fail(Truncated(8))
        await stage.until(lambda: one.closed is not None)
        assert wire_of(one).close_code == 4010
        await stage.until(lambda: stage.feed.offset == 10)
        assert stage.history.floor == 7
        assert stage.feed.ready


async def test_a_new_epoch_closes_all_clients_and_the_feed_begins_anew() -> None:
    log = FailingLog()
    async with running(log) as stage:
        await stage.publish(*range(1, 11))
        await stage.until(lambda: stage.feed.offset == 10)
        one = stage.join("session:1")
        log.begin_anew()
        await stage.until(lambda: one.closed is not None)
        assert wire_of(one).close_code == 4010
        await stage.publish(1)
        await stage.until(lambda: stage.feed.offset == 1)
        assert str(stage.history.position) == "second:1"


async def test_a_new_epoch_after_an_outage_is_noticed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.realtime.feed.backoff", lambda _: 0.0)
    log = FailingLog()
    async with running(log) as stage:
        await stage.publish(*range(1, 11))
        await stage.until(lambda: stage.feed.offset == 10)
        one = stage.join("session:1")
        log.fail(LogUnavailable("staged"))
        log._epoch, log._entries, log._times, log._first = "third", [], [], 1
        await stage.until(lambda: one.closed is not None)
        assert (wire_of(one).close_code, str(stage.history.position)) == (4010, "third:0")


async def test_the_end_of_the_log_ends_the_feed_with_an_error() -> None:
    async with running(MemoryLog()) as stage:
        await stage.publish(1)
        await stage.until(lambda: stage.feed.offset == 1)
        await stage.log.close()
        with pytest.raises(ExceptionGroup) as caught:
            await asyncio.wait_for(stage.task, 5)
    assert caught.group_contains(RuntimeError, match="must not")


async def test_messages_to_gateways_reach_no_client_and_are_obeyed() -> None:
    stage = Stage(MemoryLog())
    one = stage.join(GATEWAY)
    stage.hub.admit(7)
    await stage.log.publish(
        [
            Event(PERMISSIONS_CHANGED, GATEWAY, {"user_id": 7}),
            Event(PERMISSIONS_CHANGED, GATEWAY, {"user_id": "7"}),
            Event(PERMISSIONS_CHANGED, GATEWAY, []),  # type: ignore[arg-type]
            Event("gateway.other", GATEWAY, {}),
        ]
    )
    stage.feed.take([entry async for batch in _first(stage.log) for entry in batch])
    await asyncio.sleep(0)
    assert wire_of(one).written == []
    assert stage.hub.changed_users == {7}
    assert (stage.feed.offset, len(stage.history), stage.feed.invalid) == (4, 0, 2)


async def _first(log: MemoryLog) -> AsyncIterator[Sequence[Entry]]:
    reader = log.read(0)
    yield await anext(reader)
    await reader.aclose()  # type: ignore[attr-defined]


async def test_a_body_that_is_no_object_is_counted_and_stops_nothing() -> None:
    stage = Stage(MemoryLog())
    one = stage.join("session:1")
    good = Entry(2, "b", "a", "session:1", b'{"event_type":"a","channel":"session:1","data":1}')
    stage.feed.take([replace(good, offset=1, event_id="a", body=b"[]"), good, good])
    await asyncio.sleep(0)
    assert wire_of(one).offsets == [2]
    assert stage.feed.invalid == 1
