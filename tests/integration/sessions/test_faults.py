"""What may go wrong around a session: orchestrators that die, leases that are lost, a database that goes away."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import replace
from itertools import pairwise

import asyncpg
import pytest

from orchestrator.database import Wakeup, open_pool
from orchestrator.errors import ProviderFailure, ProviderUnavailable
from orchestrator.providers.contract import Observation, SessionRef, State
from orchestrator.sessions import leases
from orchestrator.sessions.reconcile import Reconciler
from orchestrator.sessions.record import Session
from orchestrator.sessions.state import TRANSITIONS, Status
from tests.integration.sessions.conftest import Stage, until
from tests.integration.sessions.staged import Gate, Staged


async def _returns(value: bool) -> bool:
    return value


async def _terminate_all_but_the_tests_own(stage: Stage) -> None:
    connection = await asyncpg.connect(stage.database_settings.url)
    try:
        await connection.execute(
            """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name <> 'test'"""
        )
    finally:
        await connection.close()


async def _kill(stage: Stage, pool: asyncpg.Pool, task: asyncio.Task[None]) -> None:
    """As `kill -9` would: nothing that it does from now on reaches the database, and its leases run out."""
    pool.terminate()
    task.cancel()
    await asyncio.wait({task}, timeout=20)
    assert task.done()
    await stage.execute("UPDATE sessions SET lease_expires_at = now() WHERE lease_owner IS NOT NULL")


async def test_several_orchestrators_never_work_on_one_session_at_once(stage: Stage) -> None:
    sessions = [await stage.create(await stage.project(f"p{n}")) for n in range(12)]

    async def slowly(ref: SessionRef) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    stage.world.hooks |= {"start": slowly, "stop": slowly, "delete": slowly}
    pools = [await open_pool(stage.database_settings, name="test") for _ in range(3)]
    try:
        async with stage.running(pool=pools[0]), stage.running(pool=pools[1]), stage.running(pool=pools[2]):
            for session in sessions:
                await stage.until(session, "running")
            await asyncio.gather(*(stage.request(session, "running", restart=True) for session in sessions))
            await asyncio.gather(*(stage.request(session, "stopped") for session in sessions[::2]))
            for number, session in enumerate(sessions):
                await stage.until(session, "running" if number % 2 else "stopped")
            await asyncio.gather(*(stage.request(session, "deleted") for session in sessions))
            for session in sessions:
                await stage.until(session, "deleted")
    finally:
        for pool in pools:
            await pool.close()
    assert stage.world.overlaps == []
    assert stage.world.states == {}


async def test_a_long_step_keeps_its_lease(stage: Stage) -> None:
    gate = stage.world.hooks["start"] = Gate()
    session = await stage.create()
    other = await open_pool(stage.database_settings, name="test")
    async with (
        stage.running(pool=stage.pool, lease=0.6, poll_interval=0.1),
        stage.running(pool=other, lease=0.6, poll_interval=0.1),
    ):
        await gate.reached.wait()
        owner = await stage.execute("SELECT lease_owner FROM sessions")
        first = await stage.execute("SELECT lease_expires_at FROM sessions")
        await until(lambda: _renewed_by(stage, first))
        assert await stage.execute("SELECT lease_owner FROM sessions") == owner
        gate.open()
        await stage.until(session, "running")
    await other.close()
    assert stage.world.called("start") == 1


async def _renewed_by(stage: Stage, first: object) -> bool:
    """By more than a whole lease: without renewal somebody else would have had it."""
    return await stage.execute("SELECT lease_expires_at > $1::timestamptz + interval '0.9 s' FROM sessions", first)


async def test_a_lost_lease_ends_the_step(stage: Stage) -> None:
    gate = stage.world.hooks["start"] = Gate()
    session = await stage.create()
    async with stage.running(lease=0.6, poll_interval=0.1):
        await gate.reached.wait()
        # Somebody else has it, for as long as the loser may take to notice.
        await stage.execute(
            "UPDATE sessions SET lease_owner = gen_random_uuid(), lease_expires_at = now() + interval '1 second'"
        )
        await gate.cancelled.wait()
        gate.open()
        await stage.until(session, "running")
    assert stage.world.overlaps == []


async def test_a_step_ends_before_its_lease_does_when_the_database_is_away(
    stage: Stage, own_pool: asyncpg.Pool
) -> None:
    gate = stage.world.hooks["start"] = Gate()
    await stage.create()
    task = asyncio.create_task(stage.orchestrator(pool=own_pool, lease=0.8).run())
    await gate.reached.wait()
    own_pool.terminate()
    async with asyncio.timeout(3):
        await gate.cancelled.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=10)


async def test_a_claim_is_taken_over_when_its_lease_has_expired(stage: Stage, own_pool: asyncpg.Pool) -> None:
    gate = stage.world.hooks["start"] = Gate()
    session = await stage.create()
    task = asyncio.create_task(stage.orchestrator(pool=own_pool).run())
    await gate.reached.wait()
    await _kill(stage, own_pool, task)
    assert (await stage.get(session)).status == "starting"
    gate.open()
    async with stage.running():
        await stage.until(session, "running")
    assert [status for status, _ in await stage.history(session)].count("running") == 1


async def test_who_is_alone_takes_over_at_once(stage: Stage, own_pool: asyncpg.Pool) -> None:
    gate = stage.world.hooks["start"] = Gate()
    session = await stage.create()
    task = asyncio.create_task(stage.orchestrator(pool=own_pool, lease=3600.0).run())
    await gate.reached.wait()
    own_pool.terminate()
    task.cancel()
    await asyncio.wait({task}, timeout=10)
    assert await stage.execute("SELECT lease_expires_at > now() FROM sessions")
    gate.open()
    async with stage.running(alone=True):
        await stage.until(session, "running")


async def test_an_orderly_end_gives_back_what_it_works_on(stage: Stage) -> None:
    gate = stage.world.hooks["start"] = Gate()
    session = await stage.create()
    async with stage.running(grace=0.05, lease=3600.0):
        await gate.reached.wait()
    assert gate.cancelled.is_set()
    now = await stage.get(session)
    assert (now.status, now.desired, now.lease_owner) == ("starting", "running", None)
    assert stage.world.closed == ["staged"]
    gate.open()
    async with stage.running():
        await stage.until(session, "running")


async def test_an_orderly_end_waits_for_what_ends_in_time(stage: Stage) -> None:
    gate = stage.world.hooks["start"] = Gate()
    session = await stage.create()
    task = asyncio.create_task(stage.orchestrator(grace=10.0).run())
    await gate.reached.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=0.05)
    gate.open()
    await asyncio.wait({task}, timeout=5)
    assert (await stage.get(session)).status == "running"


async def test_a_second_cancellation_waits_no_longer_and_closes_all_the_same(stage: Stage) -> None:
    gate = stage.world.hooks["start"] = Gate()
    await stage.create()
    task = asyncio.create_task(stage.orchestrator(grace=60.0).run())
    await gate.reached.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=0.05)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert stage.world.closed == ["staged"]
    assert await stage.execute("SELECT count(*) FROM sessions WHERE lease_owner IS NOT NULL") == 0


async def test_a_start_whose_time_went_by_unattended_gets_more_but_not_for_ever(stage: Stage) -> None:
    first, second = await stage.create(), await stage.create(await stage.project("other"))
    await stage.execute("UPDATE sessions SET status = 'starting', start_deadline_at = now() - interval '1 day'")
    await stage.execute("UPDATE sessions SET attempts = 4 WHERE id = $1", second.id)
    async with stage.running():
        await stage.until(first, "running")
        assert (await stage.until(second, "error")).reason == "StartTimeout"


async def test_a_start_that_is_taken_over_goes_on_with_the_time_that_it_had_left(stage: Stage) -> None:
    stage.world.hooks["start"] = Gate()
    session = await stage.create()
    await stage.execute("UPDATE sessions SET status = 'starting', start_deadline_at = now() + interval '0.3 s'")
    async with stage.running(start_deadline=3600.0):
        assert (await stage.until(session, "error")).reason == "StartTimeout"


async def test_all_goes_on_by_itself_when_the_database_has_ended_every_connection(stage: Stage) -> None:
    victim = await open_pool(stage.database_settings, name="victim")
    sessions = [await stage.create(await stage.project(f"p{n}")) for n in range(6)]
    gate = stage.world.hooks["start"] = Gate()
    async with stage.running(pool=victim):
        await gate.reached.wait()
        await _terminate_all_but_the_tests_own(stage)
        gate.open()
        await _terminate_all_but_the_tests_own(stage)
        for session in sessions:
            await stage.until(session, "running")
        await _terminate_all_but_the_tests_own(stage)
        await stage.request(sessions[0], "deleted")
        await stage.until(sessions[0], "deleted")
        await until(lambda: _published(stage))
    await victim.close()
    for session in sessions[1:]:
        assert [status for status, _ in await stage.history(session)].count("running") == 1
    assert stage.world.overlaps == []


async def _published(stage: Stage) -> bool:
    return await stage.execute("SELECT count(*) FROM outbox") == 0


async def test_an_orchestrator_waits_for_a_database_that_is_away_at_the_start(
    stage: Stage, own_pool: asyncpg.Pool
) -> None:
    session = await stage.create()
    await own_pool.fetch("SELECT 1")
    blocked = asyncio.create_task(stage.orchestrator(pool=_Once(own_pool), alone=True).run())  # type: ignore[arg-type]
    await stage.until(session, "running")
    blocked.cancel()
    await asyncio.wait({blocked}, timeout=10)


class _Once:
    """A pool whose server is away the first time that it is asked."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._asked = 0

    def acquire(self) -> object:
        self._asked += 1
        if self._asked == 1:
            raise ConnectionRefusedError
        return self._pool.acquire()


async def test_a_provider_that_never_ends_a_stop_is_given_up_and_tried_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.sessions.steps.STOP_DEADLINE", 0.1)
    session = await stage.create()
    async with stage.running(), stage.impatient():
        await stage.until(session, "running")
        gate = stage.world.hooks["stop"] = Gate()
        await stage.request(session, "stopped")
        await stage.until(session, "stopping", stale=True)
        gate.open()
        assert not (await stage.until(session, "stopped")).stale


async def test_a_step_that_breaks_off_in_our_own_code_is_taken_up_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.sessions.reconcile.backoff", lambda failures, cap=1.0: 0.0)
    session = await stage.create()
    wakeup = Wakeup()
    tries = 0

    async def find(provider_id: int | None) -> Staged:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ConnectionResetError
        return Staged(stage.world, "staged", lambda line: None)

    settle, broken = leases.settle, 0

    async def breaking(*args: object, **kwargs: object) -> Session | None:
        nonlocal broken
        broken += kwargs["release"] is True
        if broken == 1 and kwargs["release"]:
            raise AssertionError("a bug")
        return await settle(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("orchestrator.sessions.leases.settle", breaking)
    reconciler = Reconciler(stage.settings, stage.pool, wakeup, find)

    async def loop() -> None:
        while True:
            await reconciler.iterate()

    task = asyncio.create_task(loop())
    await stage.until(session, "running")
    # What is recorded is seen before who has recorded it is done.
    async with asyncio.timeout(10):
        while reconciler.working:
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait({task})
    assert (tries, broken) == (3, 2)


async def test_only_so_many_sessions_are_worked_on_at_once(stage: Stage) -> None:
    sessions = [await stage.create(await stage.project(f"p{n}")) for n in range(5)]
    gate = stage.world.hooks["start"] = Gate()
    async with stage.running(concurrency=2):
        await until(lambda: _returns(stage.world.called("start") == 2))
        assert await stage.execute("SELECT count(*) FROM sessions WHERE lease_owner IS NOT NULL") == 2
        gate.open()
        for session in sessions:
            await stage.until(session, "running")


@pytest.mark.random
@pytest.mark.parametrize("round_", range(3))
async def test_whatever_dies_whenever_all_sessions_end_as_wanted_and_each_change_is_told_once(
    stage: Stage, round_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.run.FLUSH_DEADLINE", 0.01)
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print(f"SEED={seed}")
    rng = random.Random(seed)
    sessions = [await stage.create(await stage.project(f"p{n}")) for n in range(6)]

    async def moody(ref: SessionRef) -> None:
        for _ in range(rng.randrange(10)):
            await asyncio.sleep(0)
        if rng.random() < 0.1:
            raise rng.choice([ProviderUnavailable("Away."), KeyError("odd"), ProviderFailure("Quota", "No.")])

    stage.world.hooks |= dict.fromkeys(("start", "stop", "delete", "inspect"), moody)
    async with stage.impatient():
        for _ in range(6):
            pool = await open_pool(replace(stage.database_settings, pool_size=5), name="test")
            task = asyncio.create_task(stage.orchestrator(pool=pool, resync_interval=0.05).run())
            for _ in range(rng.randrange(8)):
                session = rng.choice(sessions)
                if (await stage.get(session)).desired != "deleted":
                    wish = rng.choice(["running", "running", "stopped", "deleted"])
                    await stage.request(session, wish, restart=wish == "running" and rng.random() < 0.5)
                await asyncio.sleep(rng.random() * 0.03)
            await _kill(stage, pool, task)
        stage.world.hooks.clear()
        async with stage.running(resync_interval=0.05):
            for session in sessions:
                # What has failed for good is started anew by its user.
                now = await stage.until(session, "running", "stopped", "deleted", "error")
                if now.status == "error" and now.desired == "running":
                    await stage.request(session, "running")
            for session in sessions:
                await stage.until(session, (await stage.get(session)).desired, stale=False)
    assert stage.world.overlaps == []
    for session in sessions:
        await _is_consistent(stage, session)


async def _is_consistent(stage: Stage, session: Session) -> None:
    now = await stage.get(session)
    assert now.lease_owner is None
    assert now.observed_generation == now.generation
    seen = stage.world.states.get(session.id, Observation(State.ABSENT)).state
    # One that never ran has nothing to be stopped.
    there = {"running": {State.RUNNING}, "stopped": {State.STOPPED, State.ABSENT}, "deleted": {State.ABSENT}}
    assert seen in there[now.status]
    assert (now.status == "running") is (now.preview_url is not None)
    rows = await stage.fetch(
        "SELECT status, reason, message FROM session_events WHERE session_id = $1 ORDER BY id", now.id
    )
    for before, after in pairwise(tuple(row) for row in rows):
        assert before != after
        old, new = Status(before[0]), Status(after[0])
        assert old is new or new in TRANSITIONS[old], (old, new)
    assert rows[-1]["status"] == now.status
