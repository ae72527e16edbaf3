"""What every event log must do, as tests: subclass `EventLogContract` and give it the fixture `event_log`.

An implementation that can be made to drop its oldest entries overrides `truncate`, too.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import orjson
import pytest

from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.contract import Entry, EventLog, Truncated
from orchestrator.events import Event


def numbered(numbers: Sequence[int], channel: str = "session:1") -> list[Event]:
    return [Event("test.event", channel, {"n": number}) for number in numbers]


def numbers_of(entries: Sequence[Entry]) -> list[int]:
    return [orjson.loads(entry.body)["data"]["n"] for entry in entries]


async def read(event_log: EventLog, after: int, count: int) -> list[Entry]:
    """The next `count` entries after an offset."""
    entries: list[Entry] = []
    if count == 0:
        return entries
    async with asyncio.timeout(20), aclosing(event_log.read(after)) as reader:  # type: ignore[type-var]
        async for batch in reader:
            assert batch, "a batch is never empty"
            entries += batch
            if len(entries) >= count:
                break
    assert len(entries) >= count
    return entries[:count]


@asynccontextmanager
async def following(event_log: EventLog, after: int) -> AsyncIterator[list[Entry]]:
    """A list that grows by what a reader in the background gets."""
    entries: list[Entry] = []

    async def follow() -> None:
        async with aclosing(event_log.read(after)) as reader:  # type: ignore[type-var]
            async for batch in reader:
                entries.extend(batch)

    task = asyncio.create_task(follow())
    try:
        yield entries
    finally:
        task.cancel()
        await asyncio.wait([task])


async def grown(entries: list[Entry], count: int) -> None:
    async with asyncio.timeout(20):
        while len(entries) < count:
            await asyncio.sleep(0.001)
    assert len(entries) == count


class EventLogContract:
    """The tests. `event_log` is a fixture: an open log, which may hold entries already."""

    async def truncate(self, event_log: EventLog) -> int:
        """Make the log drop entries, without any help of its readers; returns an offset after which some are gone."""
        pytest.skip("this log cannot be made to drop entries at will")

    async def test_the_epoch_can_be_part_of_a_position(self, event_log: EventLog) -> None:
        assert re.fullmatch(r"[a-z0-9]{1,32}", event_log.epoch)
        assert await event_log.head() >= 0

    async def test_what_is_published_is_read_in_order_with_growing_offsets(self, event_log: EventLog) -> None:
        before = await event_log.head()
        events = [*numbered(range(3)), *numbered(range(3, 5), "user:7")]
        await event_log.publish(events)
        entries = await read(event_log, before, 5)
        assert [entry.event_id for entry in entries] == [event.id for event in events]
        assert [entry.body for entry in entries] == [event.body() for event in events]
        assert [(entry.event_type, entry.channel) for entry in entries] == [(e.event_type, e.channel) for e in events]
        offsets = [entry.offset for entry in entries]
        assert offsets == sorted(set(offsets))
        assert before < offsets[0]
        assert offsets[0] >= 1
        assert await event_log.head() == offsets[-1]

    async def test_an_offset_before_a_time_has_all_entries_of_that_time_after_it(self, event_log: EventLog) -> None:
        before = await event_log.head()
        await event_log.publish(numbered(range(5)))
        offset = await event_log.offset_before(600)
        assert offset <= before
        entries = await read(event_log, offset, before - offset + 5)
        assert numbers_of(entries[-5:]) == list(range(5))
        assert await event_log.offset_before(0) <= await event_log.head()

    async def test_publishing_nothing_is_nothing(self, event_log: EventLog) -> None:
        before = await event_log.head()
        await event_log.publish([])
        assert await event_log.head() == before

    async def test_two_readers_see_the_same_entries_with_the_same_offsets(self, event_log: EventLog) -> None:
        before = await event_log.head()
        async with following(event_log, before) as first, following(event_log, before) as second:
            for number in range(20):
                await event_log.publish(numbered([number]))
            await grown(first, 20)
            await grown(second, 20)
            assert first == second

    async def test_reading_from_the_middle_gives_exactly_the_rest(self, event_log: EventLog) -> None:
        before = await event_log.head()
        await event_log.publish(numbered(range(10)))
        entries = await read(event_log, before, 10)
        for place in range(9):
            assert await read(event_log, entries[place].offset, 9 - place) == entries[place + 1 :]

    async def test_a_reader_at_the_head_gets_what_comes(self, event_log: EventLog) -> None:
        await event_log.publish(numbered([1]))
        async with following(event_log, await event_log.head()) as entries:
            await event_log.publish(numbered([2, 3]))
            await grown(entries, 2)
            assert numbers_of(entries) == [2, 3]

    async def test_a_large_log_is_read_completely(self, event_log: EventLog) -> None:
        before = await event_log.head()
        for start in range(0, 5_000, 500):
            await event_log.publish(numbered(range(start, start + 500)))
        assert numbers_of(await read(event_log, before, 5_000)) == list(range(5_000))

    async def test_large_and_odd_bodies_come_back_as_they_were(self, event_log: EventLog) -> None:
        before = await event_log.head()
        texts = ["x" * 300_000, "\0", "\u2028\U0001f600", '"\\'] + ["y" * 100_000] * 8
        await event_log.publish([Event("a", "b:1", {"n": text}) for text in texts])
        assert [orjson.loads(e.body)["data"]["n"] for e in await read(event_log, before, len(texts))] == texts

    async def test_each_publisher_keeps_its_order_beside_others(self, event_log: EventLog) -> None:
        before = await event_log.head()

        async def publish(channel: str) -> None:
            for start in range(0, 100, 5):
                await event_log.publish(numbered(range(start, start + 5), channel))
                await asyncio.sleep(0)

        async with following(event_log, before) as entries:
            await asyncio.gather(*(publish(f"session:{publisher}") for publisher in range(5)))
            await grown(entries, 500)
        for publisher in range(5):
            own = [entry for entry in entries if entry.channel == f"session:{publisher}"]
            assert numbers_of(own) == list(range(100))
        assert [entry.offset for entry in entries] == sorted({entry.offset for entry in entries})

    async def test_a_repeated_event_keeps_its_id(self, event_log: EventLog) -> None:
        before = await event_log.head()
        event = numbered([1])[0]
        await event_log.publish([event])
        await event_log.publish([event])
        await event_log.publish(numbered([2]))
        async with following(event_log, before) as entries:
            async with asyncio.timeout(20):
                while not entries or numbers_of(entries)[-1] != 2:
                    await asyncio.sleep(0.001)
        # The log may drop the repeat, or leave that to its readers.
        assert {entry.event_id for entry in entries[:-1]} == {event.id}
        assert len(entries) in (2, 3)

    async def test_a_reader_that_stops_disturbs_nobody(self, event_log: EventLog) -> None:
        before = await event_log.head()
        async with following(event_log, before) as lasting:
            async with following(event_log, before) as short:
                await event_log.publish(numbered([1]))
                await grown(short, 1)
            await event_log.publish(numbered([2]))
            await grown(lasting, 2)
        assert numbers_of(lasting) == [1, 2]

    @pytest.mark.random
    async def test_readers_at_random_places_lose_nothing(self, event_log: EventLog) -> None:
        seed = random.randrange(1 << 32)
        print(f"seed {seed}")
        draw = random.Random(seed)
        before = await event_log.head()
        published = 0
        seen: list[Entry] = []

        async def publish() -> None:
            nonlocal published
            while published < 2_000:
                size = min(draw.randint(1, 60), 2_000 - published)
                await event_log.publish(numbered(range(published, published + size)))
                published += size
                await asyncio.sleep(0)

        task = asyncio.create_task(publish())
        async with asyncio.timeout(30):
            while len(seen) < 2_000:
                limit = draw.randint(1, 200)
                async with aclosing(event_log.read(seen[-1].offset if seen else before)) as reader:  # type: ignore[type-var]
                    async for batch in reader:
                        seen += batch
                        limit -= len(batch)
                        if limit <= 0 or len(seen) >= 2_000:
                            break
        await task
        assert numbers_of(seen) == list(range(2_000))

    async def test_a_reader_below_what_is_kept_is_told(self, event_log: EventLog) -> None:
        after = await self.truncate(event_log)
        with pytest.raises(Truncated) as caught:
            await read(event_log, after, 1)
        assert after + 1 < caught.value.first <= await event_log.head()
        rest = await read(event_log, caught.value.first - 1, 1)
        assert rest[0].offset >= caught.value.first

    async def test_a_reader_that_falls_behind_is_told_and_never_skipped_ahead(self, event_log: EventLog) -> None:
        before = await event_log.head()
        await event_log.publish(numbered([1]))
        async with asyncio.timeout(20), aclosing(event_log.read(before)) as reader:  # type: ignore[type-var]
            (first,) = await anext(reader)
            assert numbers_of([first]) == [1]
            await self.truncate(event_log)
            with pytest.raises(Truncated):
                await anext(reader)

    async def test_an_open_log_answers(self, event_log: EventLog) -> None:
        await event_log.check()

    async def test_a_closed_log_ends_its_readers_and_takes_nothing(self, event_log: EventLog) -> None:
        ended = asyncio.Event()

        async def follow() -> None:
            try:
                async for _ in event_log.read(await event_log.head()):
                    pass
            except LogUnavailable:
                pass
            ended.set()

        task = asyncio.create_task(follow())
        await asyncio.sleep(0)
        await event_log.close()
        await event_log.close()
        await asyncio.wait_for(ended.wait(), 20)
        await task
        with pytest.raises(LogUnavailable):
            await event_log.publish(numbered([1]))
        with pytest.raises(LogUnavailable):
            await event_log.check()
        with pytest.raises(LogUnavailable):
            await anext(aiter(event_log.read(await event_log.head())))
