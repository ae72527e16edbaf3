"""The API server away while sessions come and go: what runs runs on, and in the end all is as it was wanted."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest

from tests.cluster.faults.account import prove
from tests.cluster.faults.conftest import Control
from tests.cluster.faults.ground import Ground

pytestmark = [pytest.mark.late, pytest.mark.xdist_group("cluster"), pytest.mark.timeout(600)]


async def outage(ground: Ground, control: Control, *, begin: str, end: str, seconds: float) -> None:
    """Sessions in every state when it begins, others asked for while it lasts."""
    await ground.configure()
    # Whoever leads when it begins need not be the one that has anything under way.
    await ground.worker()
    await ground.worker()
    made = [await ground.create() for _ in range(5)]
    running, stopping, stopped, changing, leaving = [await ground.runs(session_id, "first") for session_id in made]
    await ground.want(stopped.id, "stopped")
    await ground.reached(stopped.id, "stopped")
    pods = {session.id: (await ground.pod(session))["metadata"]["uid"] for session in (running, changing)}

    # All of it under way, as far as it comes.
    starting = await ground.create()
    await ground.want(stopping.id, "stopped")
    await ground.want(leaving.id, "deleted")
    began = monotonic()
    await control(begin)
    try:
        await ground.change(changing.id, "second")
        await ground.want(stopped.id, "running")
        late = await ground.create()

        async def stale() -> bool:
            return (await ground.get(running.id)).stale

        await ground.until(stale, "the session that runs is marked stale")
        await asyncio.sleep(max(0.0, began + seconds - monotonic()))
        kept = await ground.get(running.id)
        assert (kept.status, kept.stale, kept.reason) == ("running", True, "ProviderUnavailable")
        assert (kept.preview_url, kept.ip_address) == (running.preview_url, running.ip_address)
        for session_id in ground.sessions:
            assert (await ground.get(session_id)).status != "error"
    finally:
        await control(end)
    back = monotonic()
    for session_id in (running.id, stopped.id, starting, late):
        await ground.runs(session_id, "first")
    await ground.runs(changing.id, "second")
    await ground.reached(stopping.id, "stopped")
    await ground.reached(leaving.id, "deleted")
    print(f"all as it was wanted {monotonic() - back:.0f} s after the outage")
    # What ran was not touched, and was never said to do anything else.
    assert (await ground.pod(running))["metadata"]["uid"] == pods[running.id]
    assert (await ground.pod(changing))["metadata"]["uid"] != pods[changing.id]
    for session_id in ground.sessions:
        statuses = [status for status, *_ in await ground.history(session_id)]
        assert "error" not in statuses, await ground.history(session_id)
        assert session_id == leaving.id or "deleted" not in statuses
    print(*await ground.history(running.id), sep="\n")
    begun = [line[0] for line in await ground.history(running.id)].index("running")
    assert {status for status, *_ in (await ground.history(running.id))[begun:]} == {"running"}
    await ground.nothing_is_left()
    await prove(ground)
    await ground.stop()


async def test_an_api_server_that_is_killed_takes_no_session_along(ground: Ground, control: Control) -> None:
    await outage(ground, control, begin="stop-api", end="start-api", seconds=30.0)


async def test_an_api_server_that_hangs_takes_no_session_along(ground: Ground, control: Control) -> None:
    await outage(ground, control, begin="freeze-api", end="thaw-api", seconds=120.0)
