from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.realtime import recovery
from gateway.realtime.archive import Archive
from gateway.realtime.history import History
from gateway.realtime.hub import Hub
from gateway.realtime.protocol import CloseCode, Subscribe
from orchestrator.eventlog.memory import MemoryLog
from tests.unit.realtime.wire import SETTINGS, connection, entry, join, wire_of

ALL = ("user:7", "session:1", "session:2")


class Stage:
    """History and hub, fed together as the feed does it."""

    def __init__(self, *, seconds: float = 600) -> None:
        self.hub = Hub(SETTINGS)
        self.history = History("e", seconds, 64 << 20)
        # Its log is empty: what the history has dropped is gone.
        self.archive = Archive(MemoryLog(), self.history, SETTINGS)
        self.now = 0.0

    def feed(self, *offsets: int, size: int = 0) -> None:
        for offset in offsets:
            stored = self.history.append(entry(offset, ALL[offset % 3], text="x" * size), self.now)
            assert stored is not None
            self.hub.publish(stored)

    async def begin(self, *channels: str, since: str | None = None, **fields: Any):
        one = connection(*channels, **fields)
        join(self.hub, one)
        if since is None:
            recovery.connect(self.hub, self.history, one)
        else:
            await recovery.resume(self.hub, self.history, self.archive, one, since)
        return one

    async def subscribe(self, one, channel: str, since: str | None = None) -> None:
        await recovery.subscribe(self.hub, self.history, self.archive, one, Subscribe(channel, since, "q"))


def kinds(one) -> list[Any]:
    """What was written: offsets of events, names of control messages."""
    return [message.get("offset", message["event_type"]) for message in wire_of(one).messages]


def data(one, name: str) -> dict[str, Any]:
    (found,) = [message for message in wire_of(one).messages if message["event_type"] == name]
    assert "offset" not in found
    return found["data"]


async def test_without_a_position_it_begins_at_the_head() -> None:
    stage = Stage()
    stage.feed(1, 2, 3)
    one = await stage.begin(*ALL)
    stage.feed(4)
    await asyncio.sleep(0)
    assert kinds(one) == ["connected", 4]
    assert data(one, "connected") == {
        "connection_id": one.id,
        "position": "e:3",
        "channels": list(ALL),
        "ping_interval": 25.0,
        "expires_at": None,
        "recovered": True,
    }
    assert stage.hub.recoveries == {}


async def test_with_a_position_it_gets_every_later_event_of_all_its_channels_once_in_order() -> None:
    stage = Stage()
    stage.feed(*range(1, 11))
    # Pending for others, in history already: must come once.
    other = await stage.begin("session:1", "session:2", user_id=8)
    stage.feed(11, 12)
    one = await stage.begin("user:7", "session:1", since="e:4")
    stage.feed(13, 15)
    await asyncio.sleep(0)
    assert kinds(one) == ["connected", 6, 7, 9, 10, 12, 13, 15]
    assert data(one, "connected")["position"] == "e:4"
    assert data(one, "connected")["recovered"] is True
    assert kinds(other) == ["connected", 11, 13]
    assert stage.hub.recoveries == {"recovered": 1}


@pytest.mark.parametrize("since", ["f:4", "e:0", "e:99", "nonsense", ""])
async def test_a_position_that_cannot_be_honoured_begins_at_the_head_and_says_so(
    since: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_PATIENCE", 0.01)
    stage = Stage(seconds=10)
    stage.feed(1, 2)
    stage.now = 20
    stage.feed(3, 4)
    one = await stage.begin(*ALL, since=since)
    stage.feed(5)
    await asyncio.sleep(0)
    assert kinds(one) == ["connected", 5]
    assert data(one, "connected")["position"] == "e:4"
    assert data(one, "connected")["recovered"] is False
    await stage.subscribe(one, "session:1", since)
    assert data(one, "subscribed") == {"position": "e:5", "recovered": False, "replayed": 0, "id": "q"}
    assert stage.hub.recoveries == {"lost": 2}


async def test_a_later_subscription_replays_its_channel_first_and_answers_then() -> None:
    stage = Stage()
    stage.feed(*range(1, 10))
    one = await stage.begin("user:7", since="e:6")
    stage.feed(10, 11, 12)
    await stage.subscribe(one, "session:1", since="e:2")
    stage.feed(13, 14, 15)
    await asyncio.sleep(0)
    assert kinds(one) == ["connected", 9, 12, 4, 7, 10, "subscribed", 13, 15]
    assert data(one, "subscribed") == {"position": "e:12", "recovered": True, "replayed": 3, "id": "q"}


async def test_a_subscription_without_a_position_begins_at_the_head_after_all_that_is_pending() -> None:
    stage = Stage()
    one = await stage.begin("user:7")
    stage.feed(1, 2, 3)
    await stage.subscribe(one, "session:1")
    stage.feed(4)
    await asyncio.sleep(0)
    assert kinds(one) == ["connected", 3, "subscribed", 4]
    assert data(one, "subscribed") == {"position": "e:3", "recovered": True, "replayed": 0, "id": "q"}


async def test_subscribing_twice_is_answered_twice_and_delivers_once() -> None:
    stage = Stage()
    one = await stage.begin("user:7")
    await stage.subscribe(one, "session:1")
    await stage.subscribe(one, "session:1")
    stage.feed(1)
    await asyncio.sleep(0)
    assert kinds(one) == ["connected", "subscribed", "subscribed", 1]


class Valve:
    """The client's side of the pacing: `drained` returns when the test lets it."""

    def __init__(self) -> None:
        self.waits = 0
        self._open = asyncio.Event()

    async def drained(self) -> None:
        self.waits += 1
        await self._open.wait()
        self._open.clear()

    async def reached(self, waits: int) -> None:
        async with asyncio.timeout(5):
            while self.waits < waits:
                await asyncio.sleep(0)

    def let(self) -> None:
        self._open.set()


async def test_a_long_replay_is_paced_and_live_events_wait_in_the_history() -> None:
    stage, valve = Stage(), Valve()
    stage.feed(*range(1, 61), size=20_000)
    task = asyncio.create_task(stage.begin(*ALL, since="e:0", drained=valve.drained))
    await valve.reached(1)
    (one,) = stage.hub.connections.values()
    assert wire_of(one).offsets == list(range(1, 8))
    assert one.stalled_since is not None
    assert not one.live
    stage.feed(61, 62)
    await asyncio.sleep(0)
    assert wire_of(one).offsets == list(range(1, 8))
    waits = 1
    while not task.done():
        written = sum(map(len, wire_of(one).written))
        valve.let()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert sum(map(len, wire_of(one).written)) - written < 160_000
        waits += 1
    stage.feed(63)
    await asyncio.sleep(0)
    assert wire_of(one).offsets == list(range(1, 64))
    assert one.stalled_since is None
    assert one.live


async def test_a_long_replay_of_a_later_subscription_holds_the_other_channels_back() -> None:
    stage, valve = Stage(), Valve()
    stage.feed(*range(1, 61), size=20_000)
    one = await stage.begin("user:7", drained=valve.drained)
    task = asyncio.create_task(stage.subscribe(one, "session:1", "e:0"))
    await valve.reached(1)
    stage.feed(63, 64)
    while not task.done():
        valve.let()
        await asyncio.sleep(0)
    stage.feed(66, 67)
    await asyncio.sleep(0)
    assert kinds(one) == ["connected", *range(1, 61, 3), "subscribed", 63, 64, 66, 67]
    assert data(one, "subscribed") == {"position": "e:60", "recovered": True, "replayed": 20, "id": "q"}


@pytest.mark.parametrize("end", ["closed", "lost", "evicted", "anew"])
async def test_a_replay_ends_with_its_connection_or_its_history(end: str) -> None:
    stage, valve = Stage(seconds=10), Valve()
    stage.feed(*range(1, 61), size=20_000)
    one = await stage.begin("user:7", drained=valve.drained)
    task = asyncio.create_task(stage.subscribe(one, "session:1", "e:0"))
    await valve.reached(1)
    if end == "closed":
        stage.hub.close(one, CloseCode.RECONNECT)
    elif end == "lost":
        wire_of(one).closing = True
    elif end == "evicted":
        stage.now = 100
        stage.feed(61)
    else:
        stage.history.reset("f", 1)
    valve.let()
    await task
    assert one.closed == {"closed": 4011, "lost": None, "evicted": 4011, "anew": 4010}[end]
    assert not one.live
    assert "subscribed" not in kinds(one)


async def test_a_connection_that_ends_while_its_position_is_awaited_is_left_alone() -> None:
    stage = Stage()
    stage.feed(1)
    one = await stage.begin("user:7")
    task = asyncio.create_task(stage.subscribe(one, "session:1", "e:5"))
    await asyncio.sleep(0)
    stage.hub.close(one, CloseCode.RECONNECT)
    stage.feed(5)
    await task
    assert kinds(one) == ["connected"]
    assert "session:1" not in one.channels
