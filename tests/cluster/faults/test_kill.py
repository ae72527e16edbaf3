"""Orchestrators killed at any moment of what they do, and others that go on with it.

A run prints its seed. The same again: `KILL_SEED=1234 pytest …/test_kill.py`; more than usual: `KILL_MOMENTS=500`.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter

import aiohttp
import pytest

from tests.cluster.faults.account import prove
from tests.cluster.faults.ground import Ground
from tests.integration.processes.process import Process

# Sessions that come, change and go at the same time.
LANES = 6
WORKERS = 3
# Seconds between two moments, at most; longer while but one is left, until another has come back.
LATEST = 2.0


class Lives:
    """Sessions that come, change and go, for as long as there is somebody to kill."""

    def __init__(self, ground: Ground, draw: random.Random) -> None:
        self._ground = ground
        self._draw = draw
        self.last = False
        # What is under way with each session: start, upgrade or delete.
        self.doing: dict[int, str] = {}
        self.lived = 0

    async def run(self) -> None:
        """One after the other."""
        while not self.last:
            await self._live()
            self.lived += 1

    async def _live(self) -> None:
        ground = self._ground
        session_id = await ground.create()
        self.doing[session_id] = "start"
        await ground.runs(session_id, "first")
        self.doing[session_id] = "upgrade"
        await ground.change(session_id, "second")
        # Some are gone before they have come up again.
        if self._draw.random() < 0.75:
            await ground.runs(session_id, "second")
        self.doing[session_id] = "delete"
        await ground.want(session_id, "deleted")
        await ground.reached(session_id, "deleted")
        del self.doing[session_id]


async def _working(worker: Process) -> int:
    """How many sessions it works on now."""
    url = f"http://127.0.0.1:{worker.environment['ORCHESTRATOR_PORT']}/metrics"
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        text = await answer.text()
    line = next(line for line in text.splitlines() if line.startswith("cluster_code_sessions_working "))
    return int(float(line.split()[1]))


async def _claimed(ground: Ground) -> list[tuple[int, str]]:
    async with ground.pool.acquire() as connection:
        rows = await connection.fetch("SELECT id, reason FROM sessions WHERE lease_owner IS NOT NULL")
    return [tuple(row) for row in rows]


@pytest.mark.late
@pytest.mark.xdist_group("cluster")
@pytest.mark.timeout(900)
async def test_an_orchestrator_may_be_killed_at_any_moment(ground: Ground) -> None:
    seed = int(os.environ.get("KILL_SEED") or random.randrange(1 << 32))
    print(f"KILL_SEED={seed}")
    draw = random.Random(seed)
    await ground.configure()
    lives = Lives(ground, random.Random(seed + 1))
    moments: Counter[str] = Counter()
    workers: list[Process] = []

    async def begin() -> None:
        worker = await ground.worker()
        # Reaching a cluster for the first time takes longer than some live: were they all killed while they are at it,
        # nothing would ever come about.
        await worker.until_logged("provider checked")
        workers.append(worker)

    async def others() -> bool:
        return len(workers) > 1

    async with asyncio.TaskGroup() as lanes:
        for _ in range(WORKERS):
            lanes.create_task(begin())
        for _ in range(LANES):
            lanes.create_task(lives.run())
        for _ in range(int(os.environ.get("KILL_MOMENTS", "50"))):
            await asyncio.sleep(draw.uniform(0, LATEST))
            await ground.until(others, "more than one that runs")
            # Who does nothing need not be killed.
            busy = [place for place, worker in enumerate(workers) if await _working(worker)]
            place = draw.choice(busy or range(len(workers)))
            claimed = await _claimed(ground)
            await ground.kill(workers.pop(place))
            moments.update(f"{lives.doing.get(session_id, '')}: {reason}" for session_id, reason in claimed)
            lanes.create_task(begin())
        lives.last = True
    print(f"{lives.lived} sessions lived;", *(f"{count} x {what};" for what, count in sorted(moments.items())))
    assert {what.split(":")[0] for what in moments} >= {"start", "upgrade", "delete"}
    await ground.nothing_is_left()
    print(f"{await prove(ground)} events")
    await ground.stop()
