from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gateway.realtime import archive as archives
from gateway.realtime import recovery
from gateway.realtime.archive import Archive
from gateway.realtime.feed import Feed
from gateway.realtime.history import History
from gateway.realtime.hub import Hub
from gateway.realtime.protocol import Subscribe
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.events import Event
from tests.unit.realtime.test_recovery import data, kinds
from tests.unit.realtime.wire import SETTINGS, connection, wire_of


class Stage:
    """A log that keeps everything, a history that keeps the last events only, and what the feed does between."""

    def __init__(self, *, log_bytes: int = 64 << 20, keep: int = 100, **settings: int) -> None:
        self.settings = replace(SETTINGS, **settings)
        self.log = MemoryLog(max_bytes=log_bytes)
        self.hub = Hub(self.settings)
        self.history = History(self.log.epoch, 600, keep * 300)
        self.archive = Archive(self.log, self.history, self.settings)
        self._feed = Feed(self.log, self.history, self.hub, None)  # type: ignore[arg-type]

    async def publish(self, *events: Event) -> None:
        await self.log.publish(events)
        await self.catch_up()

    async def catch_up(self) -> None:
        reader = self.log.read(self.history.head)
        while self.history.head < await self.log.head():
            self._feed.take(await anext(reader))
        await reader.aclose()

    async def fill(self, count: int) -> None:
        for first in range(0, count, 100):
            await self.publish(*(Event("a", f"session:{n % 2}", {}) for n in range(first, min(first + 100, count))))

    async def begin(self, *channels: str, since: int, **fields: object):
        one = connection(*channels, **fields)
        self.hub.add(one)
        await recovery.resume(self.hub, self.history, self.archive, one, f"{self.log.epoch}:{since}")
        return one


async def test_what_the_history_has_dropped_comes_from_the_log_once_and_in_order() -> None:
    stage = Stage()
    await stage.fill(3_000)
    assert stage.history.floor > 2_800
    one = await stage.begin("session:0", since=1_000)
    await stage.fill(4)
    await asyncio.sleep(0)
    assert data(one, "connected")["recovered"] is True
    assert data(one, "connected")["position"] == f"{stage.log.epoch}:1000"
    assert kinds(one) == ["connected", *range(1_001, 3_004, 2)]
    assert (stage.archive.replays, stage.archive.reading) == (1, 0)


async def test_what_the_log_has_dropped_too_is_told() -> None:
    stage = Stage(log_bytes=400_000)
    await stage.fill(3_000)
    one = await stage.begin("session:0", since=1_000)
    assert data(one, "connected") | {"recovered": False} == data(one, "connected")
    assert kinds(one) == ["connected"]
    assert (stage.archive.replays, stage.archive.reading) == (0, 0)


async def test_the_oldest_position_that_the_log_still_has_is_honoured() -> None:
    stage = Stage(log_bytes=400_000)
    await stage.fill(3_000)
    one = await stage.begin("session:0", "session:1", since=stage.log._first - 1)
    assert kinds(one) == ["connected", *range(stage.log._first, 3_001)]


@pytest.mark.parametrize("since", [3_001, 1_499])
async def test_neither_the_future_nor_what_is_too_far_back_is_replayed(
    since: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_PATIENCE", 0.01)
    stage = Stage(replay_events=1_000)
    await stage.fill(3_000)
    one = await stage.begin("session:0", since=since)
    assert data(one, "connected")["recovered"] is False


async def test_an_event_that_was_published_twice_is_told_once() -> None:
    stage = Stage()
    repeated = Event("a", "session:1", {})
    await stage.fill(10)
    await stage.publish(repeated)
    await stage.fill(1_000)
    await stage.publish(repeated)
    await stage.fill(1_000)
    # The first time lies before the position, the second after it.
    one = await stage.begin("session:0", "session:1", since=500)
    assert kinds(one) == ["connected", *(offset for offset in range(501, 2_013) if offset != 1_012)]


async def test_only_so_many_read_at_once_and_the_next_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(replay_readers=1)
    await stage.fill(3_000)
    most = 0
    pieces = archives.Replay._take

    def counted(self: archives.Replay, *arguments: object) -> object:
        nonlocal most
        most = max(most, stage.archive.reading)
        return pieces(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(archives.Replay, "_take", counted)
    several = await asyncio.gather(*(stage.begin("session:1", since=100 * n, user_id=n) for n in range(1, 6)))
    assert most == 1
    for n, one in enumerate(several, 1):
        assert kinds(one) == ["connected", *range(100 * n + 2, 3_001, 2)]


async def test_who_finds_no_free_reader_in_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_PATIENCE", 0.01)
    stage = Stage(replay_readers=1)
    await stage.fill(3_000)
    await stage.archive._free.acquire()
    one = await stage.begin("session:1", since=100)
    assert data(one, "connected")["recovered"] is False


async def test_events_that_the_history_drops_meanwhile_are_read_from_the_log_too() -> None:
    stage = Stage()
    await stage.fill(3_000)
    written = 0

    async def slow() -> None:
        nonlocal written
        written += 1
        if written < 5:
            # More than the history keeps.
            await stage.fill(400)

    one = await stage.begin("session:0", since=100, drained=slow)
    await asyncio.sleep(0)
    head = await stage.log.head()
    assert head > 4_000
    assert kinds(one) == ["connected", *range(101, head + 1, 2)]
    assert one.closed is None


async def test_a_replay_that_takes_too_long_asks_the_client_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_DEADLINE", -1.0)
    stage = Stage()
    await stage.fill(3_000)
    one = await stage.begin("session:0", since=100)
    offsets = wire_of(one).offsets
    assert offsets == [*range(101, 101 + 2 * len(offsets), 2)]
    assert one.closed == 4011
    assert stage.archive.reading == 0


async def test_a_log_that_begins_anew_meanwhile_ends_it() -> None:
    stage = Stage()
    await stage.fill(3_000)

    async def anew() -> None:
        stage.history.reset("another", 0)

    one = await stage.begin("session:0", since=100, drained=anew)
    assert one.closed == 4011
    assert stage.archive.reading == 0


async def test_one_channel_is_replayed_from_the_log_before_its_answer() -> None:
    stage = Stage()
    await stage.fill(3_000)
    one = connection("session:0")
    stage.hub.add(one)
    recovery.connect(stage.hub, stage.history, one)
    action = Subscribe("session:1", f"{stage.log.epoch}:500", "q")
    await recovery.subscribe(stage.hub, stage.history, stage.archive, one, action)
    await stage.fill(2)
    await asyncio.sleep(0)
    assert kinds(one) == ["connected", *range(502, 3_001, 2), "subscribed", 3_001, 3_002]
    assert data(one, "subscribed") == {
        "position": f"{stage.log.epoch}:3000",
        "recovered": True,
        "replayed": 1_250,
        "id": "q",
    }


async def test_what_the_log_shows_before_the_feed_has_read_it_is_told_once() -> None:
    stage = Stage()
    await stage.fill(3_000)
    await stage.log.publish([Event("a", "session:0", {}) for _ in range(3)])
    beginning = asyncio.create_task(stage.begin("session:0", since=100))
    async with asyncio.timeout(5):
        while not stage.archive.replays:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
    await stage.catch_up()
    one = await beginning
    await asyncio.sleep(0)
    assert kinds(one) == ["connected", *range(101, 3_001, 2), 3_001, 3_002, 3_003]
    assert one.closed is None


async def test_a_feed_that_stays_behind_asks_the_client_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_BEHIND", 0.01)
    stage = Stage()
    await stage.fill(3_000)
    await stage.log.publish([Event("a", "session:0", {})])
    one = await stage.begin("session:0", since=100)
    assert one.closed == 4011
    offsets = wire_of(one).offsets
    assert offsets == [*range(101, 101 + 2 * len(offsets), 2)]


async def test_what_comes_while_one_channel_is_replayed_is_told_once_and_behind_the_answer() -> None:
    stage = Stage()
    await stage.fill(3_000)
    pieces = 0

    async def reads() -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 2:
            await stage.fill(4)

    one = connection("session:0", drained=reads)
    stage.hub.add(one)
    recovery.connect(stage.hub, stage.history, one)
    action = Subscribe("session:1", f"{stage.log.epoch}:500", "q")
    await recovery.subscribe(stage.hub, stage.history, stage.archive, one, action)
    await asyncio.sleep(0)
    replayed = range(502, 3_001, 2)
    assert kinds(one) == ["connected", *replayed, "subscribed", 3_001, 3_002, 3_003, 3_004]
    assert data(one, "subscribed")["replayed"] == len(replayed)
