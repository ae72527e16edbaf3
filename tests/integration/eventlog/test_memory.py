from __future__ import annotations

import pytest

from orchestrator.eventlog.contract import EventLog
from orchestrator.eventlog.memory import MemoryLog
from tests.integration.eventlog.contract import EventLogContract, numbered, numbers_of, read


class TestMemoryLog(EventLogContract):
    @pytest.fixture
    def event_log(self) -> EventLog:
        return MemoryLog(max_bytes=4 << 20)

    async def truncate(self, event_log: EventLog) -> int:
        after = await event_log.head()
        for _ in range(30):
            await event_log.publish(numbered(range(1_000)))
        return after


class TestMemoryLogThatDoesNotBeginAtOne(TestMemoryLog):
    @pytest.fixture
    def event_log(self) -> EventLog:
        return MemoryLog(max_bytes=4 << 20, offset=1 << 40)


async def test_it_keeps_the_newest_entries_within_its_bytes() -> None:
    log = MemoryLog(max_bytes=400_000)
    for number in range(20_000):
        await log.publish(numbered([number]))
    assert await log.head() == 20_000
    assert log._bytes <= 400_000
    assert len(log._entries) < 4_000
    entries = await read(log, log._first - 1, 20_000 - log._first + 1)
    assert numbers_of(entries) == list(range(log._first - 1, 20_000))


async def test_an_entry_larger_than_the_log_is_kept_until_the_next() -> None:
    log = MemoryLog(max_bytes=10)
    await log.publish(numbered([1]))
    assert numbers_of(await read(log, 0, 1)) == [1]
    await log.publish(numbered([2]))
    assert numbers_of(await read(log, 1, 1)) == [2]


def test_two_logs_have_different_epochs() -> None:
    assert MemoryLog().epoch != MemoryLog().epoch
