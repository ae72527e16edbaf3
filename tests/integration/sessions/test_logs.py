"""The output of sessions, from the sink to the table and the log."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.logs import BATCH, LogWriter, _take_turns
from orchestrator.providers.contract import LogLine
from tests.integration.sessions.conftest import Stage


def _line(session_id: int, text: str = "hello", stream: str = "stdout") -> LogLine:
    return LogLine(session_id, "preview", stream, text)


async def _lines(stage: Stage, session_id: int) -> list[str]:
    rows = await stage.fetch("SELECT line FROM session_logs WHERE session_id = $1 ORDER BY id", session_id)
    return [row["line"] for row in rows]


async def _published(log: MemoryLog) -> list[dict[str, object]]:
    if await log.head() == 0:
        return []
    reader = log.read(0)
    entries = await anext(reader)
    await reader.aclose()
    return [orjson.loads(entry.body) for entry in entries]


async def test_a_line_is_stored_and_published(stage: Stage) -> None:
    session = await stage.create()
    writer = LogWriter(stage.pool, stage.log, keep=100)
    writer.sink(_line(session.id))
    await writer.iterate()
    assert await _lines(stage, session.id) == ["hello"]
    (event,) = await _published(stage.log)
    assert (event["event_type"], event["channel"]) == ("session.log", f"session:{session.id}")
    data = event["data"]
    assert isinstance(data, dict)
    assert data.pop("at").endswith("Z")
    assert data == {"session_id": session.id, "service": "preview", "stream": "stdout", "line": "hello"}


async def test_lines_of_a_session_can_be_seen_in_the_order_of_their_ids(stage: Stage) -> None:
    session, other = await stage.create(), await stage.create()
    first, second = (LogWriter(stage.pool, stage.log, keep=10_000) for _ in range(2))
    async with stage.pool.acquire() as connection, connection.transaction():
        # As a writer that is slow to commit.
        await _take_turns(connection, [session.id])
        first.sink(_line(session.id, "later"))
        second.sink(_line(other.id, "of another session"))
        waiting = asyncio.create_task(first.iterate())
        await second.iterate()
        assert await _lines(stage, other.id) == ["of another session"]
        await connection.execute(
            "INSERT INTO session_logs (session_id, at, service, stream, line) VALUES ($1, now(), '', '', 'earlier')",
            session.id,
        )
        assert await _lines(stage, session.id) == []
    async with asyncio.timeout(10):
        await waiting
    assert await _lines(stage, session.id) == ["earlier", "later"]


async def test_a_full_batch_does_not_wait(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.logs.PATIENCE", 60.0)
    session = await stage.create()
    writer = LogWriter(stage.pool, stage.log, keep=10_000)
    for number in range(BATCH + 1):
        writer.sink(_line(session.id, str(number)))
    async with asyncio.timeout(10):
        await writer.iterate()
    assert await _lines(stage, session.id) == [str(number) for number in range(BATCH)]
    await writer.flush(5)
    assert len(await _lines(stage, session.id)) == BATCH + 1


async def test_whatever_a_process_prints_can_be_stored(stage: Stage) -> None:
    session = await stage.create()
    writer = LogWriter(stage.pool, stage.log, keep=100)
    for text in ("a\0b", "\udcff", "ä" * 10_000, ""):
        writer.sink(_line(session.id, text))
    await writer.iterate()
    first, second, third, fourth = await _lines(stage, session.id)
    assert first == "a�b"
    assert set(second) == {"�"}
    assert len(third.encode()) <= 8192
    assert third.endswith("(cut)")
    assert fourth == ""


async def test_lines_of_a_session_that_is_gone_do_not_break_the_batch(stage: Stage) -> None:
    session = await stage.create()
    writer = LogWriter(stage.pool, stage.log, keep=100)
    writer.sink(_line(session.id + 1, "lost"))
    writer.sink(_line(session.id, "kept"))
    await writer.iterate()
    assert await _lines(stage, session.id) == ["kept"]
    assert len(await _published(stage.log)) == 1
    writer.sink(_line(session.id + 1, "lost"))
    await writer.iterate()


async def test_only_the_last_lines_are_kept(stage: Stage) -> None:
    session = await stage.create()
    writer = LogWriter(stage.pool, stage.log, keep=20)
    for number in range(100):
        writer.sink(_line(session.id, str(number)))
        if number % 10 == 9:
            await writer.flush(5)
    lines = await _lines(stage, session.id)
    assert 20 <= len(lines) <= 30
    assert lines[-1] == "99"


@pytest.mark.parametrize("limit", ["MAX_WAITING", "MAX_WAITING_BYTES"])
async def test_what_comes_too_fast_is_dropped_and_told(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(f"orchestrator.logs.{limit}", 3)
    session = await stage.create()
    writer = LogWriter(stage.pool, stage.log, keep=100)
    for number in range(8):
        writer.sink(_line(session.id, str(number)))
    await writer.iterate()
    told = "5 lines were dropped: they came faster than they can be stored."
    assert await _lines(stage, session.id) == ["0", "1", "2", told]
    assert writer.dropped == 5
    writer.sink(_line(session.id, "on"))
    await writer.iterate()
    assert (await _lines(stage, session.id))[-1] == "on"


async def test_lines_wait_for_the_log_and_are_stored_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.logs.backoff", lambda failures, cap: 0.0)
    session = await stage.create()
    refused = 0

    class Refusing(MemoryLog):
        async def publish(self, events: object) -> None:
            nonlocal refused
            if refused < 3:
                refused += 1
                raise LogUnavailable("Away.")
            await super().publish(events)  # type: ignore[arg-type]

    log = Refusing()
    writer = LogWriter(stage.pool, log, keep=100)
    writer.sink(_line(session.id))
    await writer.iterate()
    assert refused == 3
    assert await _lines(stage, session.id) == ["hello"]
    assert len(await _published(log)) == 1


async def test_a_batch_that_was_under_way_is_finished_by_the_flush(stage: Stage) -> None:
    session = await stage.create()
    reached = asyncio.Event()
    blocked = asyncio.Event()

    class Blocking(MemoryLog):
        async def publish(self, events: object) -> None:
            reached.set()
            await blocked.wait()
            await super().publish(events)  # type: ignore[arg-type]

    log = Blocking()
    writer = LogWriter(stage.pool, log, keep=100)
    task = asyncio.create_task(writer.run())
    writer.sink(_line(session.id))
    await reached.wait()
    task.cancel()
    await asyncio.wait({task})
    blocked.set()
    await writer.flush(5)
    assert await _lines(stage, session.id) == ["hello"]
    assert len(await _published(log)) == 1


async def test_a_flush_that_cannot_end_is_given_up(stage: Stage) -> None:
    session = await stage.create()
    await stage.log.close()
    writer = LogWriter(stage.pool, stage.log, keep=100)
    writer.sink(_line(session.id))
    async with asyncio.timeout(5):
        await writer.flush(0.1)


async def test_output_of_a_session_at_work_is_stored(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running():
        await stage.until(session, "running")
    assert await _lines(stage, session.id) == ["listening"]
