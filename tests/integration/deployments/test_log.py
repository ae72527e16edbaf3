"""The log of a deployment: whole, in order, masked, bounded, and soon told."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import pytest

from orchestrator.database import Pool, Wakeup, listen
from orchestrator.deployments import leases
from orchestrator.deployments.logs import PIECE, DeploymentLog
from orchestrator.deployments.record import Deployment
from orchestrator.eventlog import outbox
from orchestrator.eventlog.memory import MemoryLog
from orchestrator.settings import DatabaseSettings
from tests.integration.deployments.conftest import Place
from tests.integration.deployments.staged import Stage, until

MiB = 1 << 20


@asynccontextmanager
async def writing(
    stage: Stage,
    deployment: Deployment,
    *,
    secrets: tuple[str, ...] = (),
    limit: int = 16 * MiB,
    pool: Pool | None = None,
) -> AsyncIterator[DeploymentLog]:
    """The log of a claimed deployment, which goes on after what is there."""
    assert deployment.lease_owner is not None
    lines = DeploymentLog(
        pool or stage.pool, deployment_id=deployment.id, app_id=deployment.app_id, owner=deployment.lease_owner,
        secrets=secrets, limit=limit, on_stored=lambda _: None,
    )  # fmt: skip
    async with stage.pool.acquire() as connection:
        await lines.resume(connection)
    task = asyncio.create_task(lines.run())
    try:
        yield lines
    finally:
        task.cancel()
        await asyncio.wait([task])


async def claimed(stage: Stage) -> Deployment:
    await stage.place.enqueue(await stage.place.app())
    async with stage.pool.acquire() as connection, connection.transaction():
        [deployment] = await leases.claim(connection, 300.0, 1)
    return deployment


async def pieces(stage: Stage) -> list[dict[str, Any]]:
    return [data for event_type, _, data in await stage.place.told() if event_type == "deployment.log"]


async def test_what_is_said_is_stored_and_told_in_the_same_pieces(stage: Stage) -> None:
    deployment = await claimed(stage)
    text = "\x1b[32mgreen\x1b[0m, a NUL \0, half a character \udcff, \u00fc and \U0001f680\n"
    async with writing(stage, deployment) as lines:
        lines.begin("build")
        lines.say(text)
        lines.say("more\n")
        await lines.flush()
        lines.begin("run")
        lines.say("x" * 100_000)
        await lines.close()
    stored = await stage.fetch("SELECT position, length, step, text FROM deployment_logs ORDER BY position")
    shown = "\x1b[32mgreen\x1b[0m, a NUL �, half a character ���, ü and 🚀\nmore\n"
    assert await stage.log(deployment) == shown + "x" * 100_000
    assert [(row["step"], row["length"]) for row in stored] == [
        ("build", len(shown.encode())), ("run", PIECE), ("run", PIECE), ("run", PIECE), ("run", 100_000 - 3 * PIECE)
    ]  # fmt: skip
    told = await pieces(stage)
    assert [(data["position"], data["length"], data["step"], data["text"]) for data in told] == [
        tuple(r) for r in stored
    ]
    assert {(data["deployment_id"], data["app_id"]) for data in told} == {(deployment.id, deployment.app_id)}


async def test_no_piece_is_longer_than_it_may_be_nor_ends_in_the_middle_of_a_character(stage: Stage) -> None:
    deployment = await claimed(stage)
    text = "a" + "🚀" * 20_000
    async with writing(stage, deployment) as lines:
        lines.say(text)
        await lines.close()
    assert await stage.log(deployment) == text
    assert max(data["length"] for data in await pieces(stage)) <= PIECE


async def test_a_secret_that_comes_in_two_pieces_is_masked_and_one_step_ends_before_the_next(stage: Stage) -> None:
    deployment = await claimed(stage)
    async with writing(stage, deployment, secrets=("hunter2",)) as lines:
        lines.begin("build")
        lines.say("password: hun")
        # So long that what can be shown is.
        await until(lambda: stage.log(deployment))
        assert await stage.log(deployment) == "password: "
        lines.say("ter2\nhun")
        lines.begin("run")
        lines.say("ter\n")
        await lines.close()
    assert await stage.log(deployment) == "password: ***\nhunter\n"
    assert [data["step"] for data in await pieces(stage)] == ["build", "build", "build", "run"]


@pytest.mark.parametrize("size", [1, 1000, 300_000])
async def test_a_log_that_is_too_long_keeps_its_beginning_and_its_end(stage: Stage, size: int) -> None:
    deployment = await claimed(stage)
    limit = 100_000
    text = "".join(f"line {number}, and hunter2\n" for number in range(20_000))
    async with writing(stage, deployment, secrets=("hunter2",), limit=limit) as lines:
        lines.begin("build")
        for start in range(0, len(text), size):
            lines.say(text[start : start + size])
        await lines.flush()
        cut = await stage.log(deployment)
        assert cut.endswith("\n[This log is longer than 100000 bytes: what follows is left out, but for the last 25000 "
                            "bytes, which are added at the end.]\n")  # fmt: skip
        lines.begin("probe")
        lines.say("the last words")
        await lines.close()
    log = await stage.log(deployment)
    assert log.startswith(cut)
    assert log.count("[This log is longer than") == 1
    assert 0.75 * limit < len(log.encode()) <= limit
    assert "hunter2" not in log
    whole = text.replace("hunter2", "***")
    head, _, tail = log.partition("\n[This log")
    assert whole.startswith(head[:-30])
    tail = tail.partition("]\n")[2]
    # It begins with a whole line.
    assert tail.startswith("line ")
    assert tail.endswith("line 19999, and ***\nthe last words")
    assert whole.endswith(tail.removesuffix("the last words"))
    assert [data["step"] for data in await pieces(stage)][-1] == "probe"


async def test_who_takes_over_goes_on_at_the_next_byte_and_says_only_once_that_the_log_is_cut(stage: Stage) -> None:
    deployment = await claimed(stage)
    for number in range(3):
        async with writing(stage, deployment, limit=20_000) as lines:
            lines.say(f"worker {number}\n" + "x" * 8000)
            await lines.flush()
            # Killed: the end that was kept for later goes with it.
    async with writing(stage, deployment, limit=20_000) as lines:
        lines.say("the end")
        await lines.close()
    log = await stage.log(deployment)
    assert log.startswith("worker 0\n" + "x" * 8000 + "worker 1\n")
    assert log.endswith("]\nthe end")
    assert log.count("[This log is longer than") == 1
    assert len(log) <= 20_000


async def test_a_log_whose_lease_is_lost_is_not_gone_on_with(stage: Stage) -> None:
    deployment = await claimed(stage)
    async with writing(stage, deployment) as lines:
        lines.say("before\n")
        await lines.flush()
        await stage.place.set(deployment, lease_owner=None)
        lines.say("after\n")
        await lines.close()
        lines.say("after\n")
        await lines.close()
    assert await stage.log(deployment) == "before\n"


async def test_a_database_that_was_away_gets_all_of_it_once(stage: Stage, own: Pool) -> None:
    deployment = await claimed(stage)
    async with writing(stage, deployment, pool=own) as lines:
        for number in range(60):
            lines.say(f"line {number}\n")
            if number % 6 == 0:
                await stage.fetch(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'own' AND datname = current_database()"
                )
            await asyncio.sleep(0.005)
        await lines.close()
    assert (await stage.log(deployment)).splitlines() == [f"line {number}" for number in range(60)]
    assert "".join(data["text"] for data in await pieces(stage)) == await stage.log(deployment)


async def test_an_answer_that_was_lost_after_the_commit_doubles_nothing(
    stage: Stage, own: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = await claimed(stage)
    lost = 0

    async with writing(stage, deployment) as lines:
        store: Callable[[], Any] = lines._store

        async def stored_but_not_heard_of() -> None:
            nonlocal lost
            batch = list(lines._batch)
            await store()
            if lost < 2:
                lost += 1
                lines._batch, lines._tried = batch, True
                raise ConnectionResetError

        monkeypatch.setattr(lines, "_store", stored_but_not_heard_of)
        lines.say("once\n")
        await lines.flush()
        lines.say("and once\n")
        await lines.close()
    assert lost == 2
    assert await stage.log(deployment) == "once\nand once\n"
    assert [data["text"] for data in await pieces(stage)] == ["once\n", "and once\n"]


async def test_a_gigabyte_takes_little_time_and_memory(stage: Stage) -> None:
    deployment = await claimed(stage)
    piece = "".join(f"{number:63}\n" for number in range(1024))
    async with writing(stage, deployment, secrets=("hunter2",)) as lines:
        lines.begin("build")
        tracemalloc.start()
        try:
            slowest = 0.0
            for number in range(1 << 14):
                began = perf_counter()
                lines.say(piece)
                slowest = max(slowest, perf_counter() - began)
                if number % 64 == 0:
                    await asyncio.sleep(0)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        lines.say("the last words\n")
        await lines.close()
    # What waits for the database is what is kept of it, at most, and what it is made of when it is written.
    assert peak < 64 * MiB
    log = await stage.log(deployment)
    assert 15 * MiB < len(log) <= 16 * MiB
    assert log.endswith("the last words\n")


@pytest.mark.alone
async def test_a_line_is_in_the_event_log_within_200_milliseconds(
    stage: Stage, place: Place, database_settings: DatabaseSettings
) -> None:
    deployment = await claimed(stage)
    events, wakeup = MemoryLog(), Wakeup()
    tasks = [
        asyncio.create_task(listen(database_settings, {"outbox": wakeup})),
        asyncio.create_task(outbox.relay(database_settings, events, wakeup, 60.0)),
    ]
    took = []
    try:
        await until(lambda: _empty(place))
        async with writing(stage, deployment) as lines:
            reader = events.read(await events.head())
            for number in range(20):
                began = perf_counter()
                lines.say(f"line {number}\n")
                await anext(reader)
                took.append(perf_counter() - began)
            await reader.aclose()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await events.close()
    took.sort()
    print(f"median {took[10] * 1000:.0f} ms, slowest {took[-1] * 1000:.0f} ms")
    assert took[10] < 0.2


async def _empty(place: Place) -> bool:
    async with place.pool.acquire() as connection:
        return not await connection.fetchval("SELECT count(*) FROM outbox")
