"""The orchestrator as a whole, and the worker's command line."""

from __future__ import annotations

import asyncio
import resource
import sys
from pathlib import Path
from time import perf_counter

import pytest

import migrations
from orchestrator import __main__ as worker
from orchestrator.errors import SchemaOutdated
from orchestrator.tasks import to_the_end
from tests.integration.sessions.conftest import Stage, until


async def test_a_root_task_that_dies_ends_the_orchestrator(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> None:
        raise KeyError("odd")

    orchestrator = stage.orchestrator()
    monkeypatch.setattr(orchestrator._reconciler, "iterate", broken)
    with pytest.raises(RuntimeError, match="'reconcile' ended") as raised:
        await orchestrator.run()
    assert isinstance(raised.value.__cause__, KeyError)
    assert stage.world.closed == ["staged"]


async def test_an_older_schema_is_told_before_anything_is_done(stage: Stage, database_url: str) -> None:
    await asyncio.to_thread(migrations.rollback, database_url)
    with pytest.raises(SchemaOutdated, match=r"lacks 1 migration\(s\), from \d{4}\.\w+ on: run `cluster"):
        await stage.orchestrator().run()
    assert not stage.world.sinks


async def test_a_task_that_fails_at_the_end_is_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    orchestrator = stage.orchestrator()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise KeyError("odd")

    monkeypatch.setattr(orchestrator._logs, "iterate", stubborn)
    task = asyncio.create_task(orchestrator.run())
    await until(lambda: _opened(stage))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=10)
    assert task.cancelled()


async def _opened(stage: Stage) -> bool:
    return bool(stage.world.sinks) and await stage.execute("SELECT state = 'up' FROM providers")


async def test_the_way_from_a_request_to_its_event_is_short(stage: Stage) -> None:
    async with stage.running(poll_interval=60.0):
        await until(lambda: _opened(stage))
        reader = stage.log.read(await stage.log.head())
        project = await stage.project()
        began = perf_counter()
        await stage.create(project)
        entries = await anext(reader)
        took = perf_counter() - began
        await reader.aclose()
    assert entries[0].event_type == "session.status"
    # Far above what it takes (some milliseconds), far below what any poll would.
    assert took < 2.0


async def test_an_orchestrator_at_rest_uses_next_to_no_cpu(stage: Stage) -> None:
    session = await stage.create()
    async with stage.running(poll_interval=0.5):
        await stage.until(session, "running")
        before = resource.getrusage(resource.RUSAGE_SELF)
        began = perf_counter()
        await asyncio.sleep(2.0)  # What happens while nothing happens is what is measured.
        after = resource.getrusage(resource.RUSAGE_SELF)
        share = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / (perf_counter() - began)
    assert share < 0.1


@pytest.mark.parametrize(("url", "told"), [("", "AMQP_URL is not set"), ("http://x", "AMQP_URL must begin with amqp")])
def test_a_worker_without_a_shared_log_says_so_in_one_line(
    url: str,
    told: str,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMQP_URL", url)
    monkeypatch.setenv("DATABASE_URL", database_url)
    assert worker.main() == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert told in output.err
    assert output.err.count("\n") == 1


async def test_the_worker_is_a_command() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orchestrator", stderr=asyncio.subprocess.PIPE, env={}, cwd="/",
    )  # fmt: skip
    _, error = await process.communicate()
    assert (process.returncode, error.startswith(b"orchestrator: AMQP_URL")) == (2, True)


async def test_work_comes_to_its_end_although_its_caller_is_cancelled() -> None:
    begun, end, told = asyncio.Event(), asyncio.Event(), []

    async def work() -> str:
        begun.set()
        await end.wait()
        told.append("done")
        return "result"

    caller = asyncio.create_task(to_the_end(work(), name="work", on_cancel=lambda: told.append("cancelled")))
    await begun.wait()
    for _ in range(2):
        caller.cancel()
        await asyncio.sleep(0)
    end.set()
    await asyncio.wait({caller})
    assert caller.cancelled()
    assert told == ["cancelled", "cancelled", "done"]
    assert await to_the_end(work(), name="work") == "result"


async def test_a_failure_of_such_work_is_raised_or_logged() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.sleep(0)
        raise KeyError("odd")

    with pytest.raises(KeyError):
        await to_the_end(work(), name="work")
    begun.clear()
    caller = asyncio.create_task(to_the_end(work(), name="work"))
    await begun.wait()
    caller.cancel()
    await asyncio.wait({caller})
    assert caller.cancelled()
