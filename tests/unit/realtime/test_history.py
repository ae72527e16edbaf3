from __future__ import annotations

import asyncio

import orjson
import pytest

from gateway.realtime.history import History, HistoryLost, RecentIds
from gateway.realtime.protocol import Position, payload_of
from tests.unit.realtime.wire import entry


def history(seconds: float = 600, size: int = 64 << 20) -> History:
    return History("e", seconds, size)


def offsets(kept: History, channels: list[str], after: int, max_bytes: int = 1 << 30, until: int | None = None):
    chunk, more = kept.after(channels, after, max_bytes, until)
    return [stored.offset for stored in chunk], more


def test_what_was_appended_comes_back_by_channel_in_the_order_of_offsets() -> None:
    kept = history()
    for offset in range(1, 31):
        kept.append(entry(offset, f"session:{offset % 3}"), 0)
    assert offsets(kept, ["session:0"], 0) == (list(range(3, 31, 3)), None)
    assert offsets(kept, ["session:0", "session:1"], 5) == ([n for n in range(6, 31) if n % 3 != 2], None)
    assert offsets(kept, ["session:9"], 0) == ([], None)
    assert offsets(kept, ["session:0", "session:1", "session:2"], 0, until=4) == ([1, 2, 3, 4], None)
    assert len(kept) == 30
    assert kept.position == Position("e", 30)


def test_a_frame_holds_the_body_with_its_offset() -> None:
    stored = history().append(entry(5, "session:1", a=1), 0)
    assert stored is not None
    assert orjson.loads(payload_of(stored.frame)) == {
        "event_type": "test.event",
        "channel": "session:1",
        "data": {"a": 1},
        "offset": 5,
    }


def test_a_repeat_is_dropped_and_moves_the_head_for_five_minutes_at_least() -> None:
    kept = history(seconds=10_000)
    kept.append(entry(1), 0)
    assert kept.append(entry(2, event_id="x"), 299)
    assert kept.append(entry(3, event_id="x"), 599) is None
    assert (kept.head, kept.repeats, len(kept)) == (3, 1, 2)
    kept.append(entry(4), 600)
    kept.append(entry(5), 900)
    assert kept.append(entry(6, event_id="x"), 901)


def test_ids_are_bounded_in_number() -> None:
    ids = RecentIds(4)
    assert [ids.add(name) for name in "abcbcad"] == [True, True, True, False, False, False, True]
    assert len(ids) == 2
    assert [ids.add(name) for name in "cdea"] == [False, False, True, True]


def test_what_is_too_old_goes_and_the_floor_rises() -> None:
    kept = history(seconds=10)
    kept.append(entry(1), 0)
    kept.append(entry(2), 5)
    kept.append(entry(3), 12)
    assert kept.floor == 1
    assert offsets(kept, ["session:1"], 1) == ([2, 3], None)
    with pytest.raises(HistoryLost):
        kept.after(["session:1"], 0, 100)


def test_it_never_holds_more_bytes_than_allowed_and_forgets_empty_channels() -> None:
    kept = history(size=50_000)
    for offset in range(1, 2_001):
        kept.append(entry(offset, f"session:{offset % 400}", text="x" * 100), 0)
        assert kept.bytes <= 50_000
    assert kept.floor == 2_000 - len(kept)
    assert len(kept._channels) == len(kept)
    assert offsets(kept, [f"session:{n}" for n in range(400)], kept.floor)[0] == list(range(kept.floor + 1, 2_001))


def test_a_busy_channel_keeps_its_index_small() -> None:
    kept = history(size=100_000)
    for offset in range(1, 5_001):
        kept.append(entry(offset), 0)
    assert len(kept._channels["session:1"].events) < 3 * len(kept)
    assert offsets(kept, ["session:1"], kept.floor)[0] == list(range(kept.floor + 1, 5_001))


def test_a_chunk_ends_at_its_size_and_says_where_to_go_on() -> None:
    kept = history()
    for offset in range(1, 11):
        kept.append(entry(offset, f"session:{offset % 2}", text="x" * 100), 0)
    seen: list[int] = []
    place: int | None = 0
    while place is not None:
        chunk, place = offsets(kept, ["session:0", "session:1"], place, max_bytes=300)
        assert 1 <= len(chunk) <= 3
        seen += chunk
    assert seen == list(range(1, 11))
    assert offsets(kept, ["session:0"], 0, max_bytes=1) == ([2], 2)


async def test_a_position_is_reached_when_nothing_after_it_is_missing() -> None:
    kept = history(seconds=10)
    kept.append(entry(1), 0)
    kept.append(entry(2), 20)
    assert await kept.reaches(Position("e", 1), 0)
    assert await kept.reaches(Position("e", 2), 0)
    assert not await kept.reaches(Position("e", 0), 0)
    assert not await kept.reaches(Position("f", 1), 0)
    assert not await kept.reaches(Position("e", 3), 0.01)
    assert kept._waiting == []


async def test_a_position_that_another_gateway_gave_out_is_waited_for() -> None:
    kept = history()
    kept.append(entry(1), 0)
    waiting = asyncio.create_task(kept.reaches(Position("e", 3), 5))
    further = asyncio.create_task(kept.reaches(Position("e", 9), 5))
    await asyncio.sleep(0)
    kept.append(entry(2), 0)
    kept.skip(3)
    assert await waiting
    assert not further.done()
    kept.reset("f", 100)
    assert not await further
    assert (kept.floor, kept.head, kept.epoch, len(kept), kept.bytes) == (100, 100, "f", 0, 0)


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    kept = history()
    waiting = asyncio.create_task(kept.reaches(Position("e", 3), 5))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert kept._waiting == []
    kept.skip(5)
