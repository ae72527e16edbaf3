"""Following what containers write."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from orchestrator.sessions.record import Session
from tests.integration.bridge.conftest import Ground, until
from tests.kubernetes import PODS, refused

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


async def stored(ground: Ground, session: Session) -> list[str]:
    rows = await ground.fetch("SELECT line FROM session_logs WHERE session_id = $1 ORDER BY id", session.id)
    return [row["line"] for row in rows]


async def until_stored(ground: Ground, session: Session, *lines: str) -> None:
    async def there() -> bool:
        return len(await stored(ground, session)) >= len(lines)

    await until(there, lambda: stored(ground, session))
    assert await stored(ground, session) == list(lines)


def write(
    ground: Ground, session: Session, *lines: str, at: datetime | None = None, container: str = "preview"
) -> None:
    ground.api.log(session.namespace, f"{session.container_name}-abc", container, *lines, at=at)


async def test_lines_are_stored_with_the_time_that_they_were_written_at(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    write(ground, session, "one", at=NOON + timedelta(microseconds=123456))
    async with ground.bridge():
        await until_stored(ground, session, "one")
        write(ground, session, "two", at=NOON + timedelta(seconds=1))
        await until_stored(ground, session, "one", "two")
    rows = await ground.fetch("SELECT at, service, stream FROM session_logs ORDER BY id")
    assert [row["at"] for row in rows] == [NOON + timedelta(microseconds=123456), NOON + timedelta(seconds=1)]
    assert {(row["service"], row["stream"]) for row in rows} == {("preview", "stdout")}


async def test_a_new_leader_goes_on_after_the_last_line_that_is_stored(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    # Three of one moment, of which another leader has stored two.
    write(ground, session, "a", at=NOON)
    write(ground, session, "b", "b", "c", at=NOON + timedelta(milliseconds=300))
    for line, at in (("a", NOON), ("b", NOON + timedelta(milliseconds=300)), ("b", NOON + timedelta(milliseconds=300))):
        await ground.value(
            "INSERT INTO session_logs (session_id, at, service, stream, line) VALUES ($1, $2, 'preview', 'stdout', $3)",
            session.id,
            at,
            line,
        )
    write(ground, session, "d", at=NOON + timedelta(milliseconds=900))
    async with ground.bridge():
        await until_stored(ground, session, "a", "b", "b", "c", "d")
    async with ground.bridge():
        write(ground, session, "e", at=NOON + timedelta(seconds=1))
        await until_stored(ground, session, "a", "b", "b", "c", "d", "e")


async def test_a_connection_that_breaks_loses_and_repeats_nothing(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    ground.api.fail("log", refused(500, "InternalError", "the kubelet is away"))
    write(ground, session, "one", "two", at=NOON)
    async with ground.bridge():
        await until_stored(ground, session, "one", "two")
        before = len(ground.api.asked("log"))
        await ground.api.refuse()
        ground.api.cut_logs()
        write(ground, session, "three", at=NOON + timedelta(milliseconds=1))
        await ground.api.listen()
        await ground.api.until(lambda: len(ground.api.asked("log")) > before)
        await until_stored(ground, session, "one", "two", "three")


async def test_a_container_that_restarts_goes_on(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    write(ground, session, "first run", at=NOON)
    async with ground.bridge():
        await until_stored(ground, session, "first run")
        ended: dict[str, Any] = {"terminated": {"exitCode": 1, "finishedAt": "2026-01-01T12:00:01Z"}}
        ground.pod(session, ready=False, state=ended)
        ground.api.end_log(session.namespace, f"{session.container_name}-abc", "preview")
        write(ground, session, "second run", at=NOON + timedelta(seconds=3))
        ground.pod(session, restartCount=1, lastState=ended)
        await until_stored(ground, session, "first run", "second run")


async def test_the_bound_keeps_containers_out_until_there_is_room_and_says_so_once(ground: Ground) -> None:
    ground.options["log_streams"] = 1
    one, two = [await ground.session() for _ in range(2)]
    for session in (one, two):
        ground.run(session)
        write(ground, session, f"of {session.id}", at=NOON)
    async with ground.bridge() as orchestrator:

        async def told() -> Any:
            return await ground.fetch("SELECT session_id, line FROM session_logs WHERE stream = 'system'")

        (row,) = await until(told)
        assert "log_streams" in row["line"]
        late = one if row["session_id"] == one.id else two
        early = two if late is one else one
        await until_stored(ground, early, f"of {early.id}")
        (reading,) = orchestrator.bridges.read()
        assert (reading.streams, reading.streams_queued) == (1, 1)
    async with ground.bridge():
        # Whoever has its place leaves.
        ground.api.delete(PODS, f"{early.container_name}-abc", namespace=early.namespace)
        ground.api.end_log(early.namespace, f"{early.container_name}-abc", "preview")
        await until(lambda: _has(ground, late, f"of {late.id}"))
        ground.pod(late, restartCount=0, ready=False)
    assert len(await told()) <= 2


async def _has(ground: Ground, session: Session, line: str) -> bool:
    return line in await stored(ground, session)


async def test_much_that_was_written_before_comes_no_faster_than_it_can_be_stored(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    lines = [str(number) for number in range(50_000)]
    write(ground, session, *lines, at=NOON)
    async with ground.bridge() as one:
        await until(lambda: _has(ground, session, lines[-1]))
        assert one.logs.dropped == 0
