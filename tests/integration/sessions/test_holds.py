"""A provider that only one orchestrator may have open: who has it, and who takes it over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from orchestrator.database import UNAVAILABLE, Pool, connect
from orchestrator.holds import Holds
from orchestrator.settings import DatabaseSettings
from tests.integration.sessions.conftest import Stage, until


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.fleet.LOOK_INTERVAL", 0.05)


@pytest_asyncio.fixture
async def local(stage: Stage) -> Stage:
    await stage.execute("UPDATE providers SET kind = 'local'")
    return stage


@pytest_asyncio.fixture
async def two(database_settings: DatabaseSettings) -> AsyncIterator[tuple[Holds, Holds]]:
    first, second = Holds(database_settings), Holds(database_settings)
    yield first, second
    first.close()
    second.close()


async def _cut(pool: Pool) -> None:
    """End the connections that hold, as a crash of the server does."""
    await pool.fetch(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'cluster-code holds'"
    )


async def _anew(holds: Holds) -> frozenset[int]:
    """Look; if that is how the lost connection shows, once more."""
    try:
        return await holds.look([1])
    except UNAVAILABLE:
        return await holds.look([1])


async def _when(wanted: set[int], holds: Holds) -> bool:
    return await holds.look(wanted) == wanted


async def test_of_two_who_want_the_same_one_has_it_until_it_lets_go(two: tuple[Holds, Holds]) -> None:
    first, second = two
    assert await first.look([1, 2]) == {1, 2}
    assert await second.look([2, 3]) == {3}
    assert await first.look([1]) == {1}
    assert await second.look([2, 3]) == {2, 3}
    second.close()
    assert await until(lambda: _when({1, 2, 3}, first))


async def test_after_a_lost_connection_those_who_held_come_first(two: tuple[Holds, Holds], pool: Pool) -> None:
    first, second = two
    await first.look([1])
    await second.look([1])
    await _cut(pool)
    # The other one is quicker, and waits.
    assert await _anew(second) == frozenset()
    assert await _anew(first) == {1}


async def test_one_that_has_died_is_followed_by_another(
    two: tuple[Holds, Holds], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    await first.look([1])
    assert await second.look([1]) == frozenset()
    first.close()
    assert await until(lambda: second.look([1])) == {1}


async def test_one_orchestrator_works_on_a_local_provider_and_the_next_takes_it_over(
    local: Stage, own_pool: Pool
) -> None:
    session = await local.create()
    async with local.running(pool=own_pool):
        await local.until(session, "running")
        assert local.world.called("start") == 1
        async with local.running():
            again = await local.request(session, "running", restart=True)
            await local.until(again, "running", observed_generation=again.generation)
            # All of it was done by one of them.
            assert len(local.world.sinks) == 1
    async with local.running():
        await local.request(session, "stopped")
        await local.until(session, "stopped")
    assert local.world.overlaps == []


async def test_what_a_dead_holder_worked_on_is_taken_over_at_once(local: Stage, own_pool: Pool) -> None:
    """Although its lease lasts much longer."""
    session = await local.create()
    hung, gate = asyncio.Event(), asyncio.Event()

    async def hang(_: object) -> None:
        hung.set()
        await gate.wait()

    local.world.hooks["start"] = hang
    first = local.orchestrator(pool=own_pool, lease=600.0)
    first._fleet.look = gate.wait
    task = asyncio.create_task(first.run())
    await hung.wait()
    async with local.running(lease=600.0):
        # Of the holder all that is left is its connection, and then not that.
        own_pool.terminate()
        local.world.hooks.clear()
        first._fleet._holds.close()
        await local.until(session, "running")
        assert len(local.world.sinks) == 2
        gate.set()
        task.cancel()
        task.cancel()
        await asyncio.wait({task}, timeout=20)


async def test_a_holder_that_has_lost_its_provider_ends_what_runs_there(local: Stage, own_pool: Pool) -> None:
    session = await local.create()
    provider_id = await local.execute("SELECT id FROM providers")
    other = await connect(local.database_settings, name="another")
    waiting = asyncio.create_task(other.execute("SELECT pg_advisory_lock(1819239265, $1::int)", provider_id))
    try:
        async with local.running(pool=own_pool) as orchestrator:
            await waiting
            # It was first, and lets go: the provider is opened by whoever has the lock.
            assert local.world.opened == []
            await other.execute("SELECT pg_advisory_unlock(1819239265, $1::int)", provider_id)
            await local.until(session, "running")
            waiting = asyncio.create_task(other.execute("SELECT pg_advisory_lock(1819239265, $1::int)", provider_id))
            await until(lambda: _queued(local))
            await _cut(local.pool)
            await waiting
            await until(lambda: _closed(local))
            assert orchestrator._fleet.elsewhere == [provider_id]
            other.terminate()
            # It has it again when nobody else wants it.
            await until(lambda: _opened(local))
    finally:
        waiting.cancel()
        other.terminate()


async def _queued(stage: Stage) -> bool:
    return await stage.execute("SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)")


async def _closed(stage: Stage) -> bool:
    return stage.world.closed == ["staged"]


async def _opened(stage: Stage) -> bool:
    return len(stage.world.opened) == 2
