"""What a cluster's objects mean for the sessions' rows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from tests.integration.bridge.conftest import Ground, until
from tests.kubernetes import DEPLOYMENTS, INGRESSES, NAMESPACES, PODS, SERVICES, refused

PODS_OF = "/api/v1/namespaces/{}/pods"


def _ended(minutes: float = 0) -> dict[str, Any]:
    at = (datetime.now(UTC) - timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": at}}


async def test_a_status_is_changed_in_the_transaction_that_tells_of_the_pod(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    async with ground.bridge():
        ground.pod(session, ready=False, restartCount=1, lastState=_ended())
        now = await ground.until(session, status="starting")
        assert now.reason == "Restarting"
        # Where it is reached stays.
        assert now.preview_url == "http://there/preview"
        status, pod = await ground.fetch(
            "SELECT event_type, data, xmin::text FROM outbox WHERE channel = $1 ORDER BY id DESC LIMIT 2",
            f"session:{session.id}",
        )
        assert (pod["event_type"], status["event_type"]) == ("session.pod", "session.status")
        assert pod["xmin"] == status["xmin"]
        assert orjson.loads(status["data"])["status"] == "starting"


async def test_how_long_a_row_is_unchanged_is_told_by_its_own_clock(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Behind(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) - timedelta(hours=1)

    monkeypatch.setattr("orchestrator.bridge.statuses.datetime", Behind)
    session = await ground.session()
    ground.run(session)
    async with ground.bridge():
        before = len(ground.api.asked("list", PODS_OF.format(session.namespace)))
        ground.pod(session, ready=False, restartCount=1, lastState=_ended())
        await ground.until(session, status="starting")
        # What is held was enough.
        assert len(ground.api.asked("list", PODS_OF.format(session.namespace))) == before == 0


async def test_a_session_that_comes_back_runs_again(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session, ready=False, restartCount=1, lastState=_ended())
    async with ground.bridge():
        await ground.until(session, status="starting")
        ground.pod(session, restartCount=1, lastState=_ended())
        now = await ground.until(session, status="running")
        assert now.start_deadline_at is None
    history = await ground.fetch("SELECT status FROM session_events WHERE session_id = $1 ORDER BY id", session.id)
    assert [row["status"] for row in history] == ["starting", "running"]


async def test_a_crash_that_will_not_heal_is_told_with_the_last_words(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    ground.api.log(session.namespace, f"{session.container_name}-abc", "preview", "starting", "no such table: users")
    ground.api.end_log(session.namespace, f"{session.container_name}-abc", "preview")
    async with ground.bridge():
        ground.crash(session)
        now = await until(lambda: _says(ground, session, "no such table: users"))
        assert (now.status, now.reason) == ("error", "CrashLoop")
        assert (now.preview_url, now.ip_address) == (None, None)


async def _says(ground: Ground, session: Any, text: str) -> Any:
    now = await ground.get(session)
    return now if text in now.message else None


async def test_a_session_in_error_that_recovers_gets_its_endpoints_from_the_cluster(ground: Ground) -> None:
    session = await ground.session("error", reason="CrashLoop", preview_url=None)
    ground.run(session)
    ground.api.put(
        SERVICES,
        {
            "metadata": ground.meta(session, f"{session.container_name}-preview"),
            "spec": {"clusterIP": "10.0.0.7", "ports": [{"port": 3000}]},
        },
    )
    async with ground.bridge():
        now = await ground.until(session, status="running")
        assert now.preview_url == f"http://{session.container_name}-preview.{session.namespace}.svc:3000/"


async def test_a_session_whose_namespace_is_gone_is_started_again(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    async with ground.bridge():
        ground.api.delete(NAMESPACES, session.namespace)
        now = await ground.until(session, status="pending")
        assert (now.reason, now.outstanding) == ("Lost", True)


async def test_what_went_while_nobody_watched_is_found_by_the_next(ground: Ground) -> None:
    gone, crashed, fine = [await ground.session() for _ in range(3)]
    for session in (crashed, fine):
        ground.run(session)
    ground.crash(crashed)
    async with ground.bridge():
        await ground.until(gone, status="pending", reason="Lost")
        await ground.until(crashed, status="error")
    assert (await ground.get(fine)).updated_at == fine.updated_at


async def test_whoever_carries_out_a_request_is_not_disturbed_and_is_looked_after_when_he_is_done(
    ground: Ground,
) -> None:
    session = await ground.session(generation=2)
    ground.run(session)
    async with ground.bridge():
        before = len(await ground.told("session.pod"))
        ground.crash(session)
        await ground.until_told(before + 1, "session.pod")
        assert (await ground.get(session)).status == "running"
        await ground.value("UPDATE sessions SET observed_generation = 2 WHERE id = $1", session.id)
        await ground.until(session, status="error")


async def test_one_that_comes_up_by_itself_for_too_long_fails(ground: Ground) -> None:
    session = await ground.session("starting", start_deadline_at=datetime.now(UTC) - timedelta(seconds=1))
    ground.run(session, ready=False, started=False, restartCount=1, lastState=_ended())
    async with ground.bridge():
        await ground.until(session, status="error", reason="StartTimeout")


async def test_an_outage_marks_sessions_stale_and_its_end_brings_them_back(ground: Ground) -> None:
    well, unwell, stopped = (
        await ground.session(),
        await ground.session(),
        await ground.session("stopped", desired="stopped"),
    )
    for session in (well, unwell):
        ground.run(session)
    async with ground.bridge() as one:
        await ground.api.refuse()
        ground.api.cut()
        for session in (well, unwell):
            now = await ground.until(session, stale=True)
            assert (now.status, now.reason) == ("running", "ProviderUnavailable")
            assert now.preview_url == "http://there/preview"
        assert not (await ground.get(stopped)).stale
        ground.pod(unwell, ready=False, restartCount=1, lastState=_ended())
        ground.api.compact()
        await ground.api.listen()
        await one.following()
        assert (await ground.until(well, stale=False)).status == "running"
        await ground.until(unwell, stale=False, status="starting")
    told = await ground.told("session.status", f"session:{well.id}")
    assert [(one["status"], one["stale"]) for one in told] == [("running", True), ("running", False)]
    assert {one["change"] for one in await ground.told("session.pod")} == {"added", "modified"}


async def test_sessions_are_looked_after_where_only_ingresses_may_not_be_seen(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    ground.api.fail("list", *[refused(403, "Forbidden")] * 1000, path=INGRESSES)
    async with ground.orchestrator() as one:
        await ground.until_told(1, "session.pod")
        ground.pod(session, ready=False, restartCount=1, lastState=_ended())
        now = await ground.until(session, status="starting")
        assert not now.stale
        (reading,) = one.bridges.read()
        assert "Forbidden" in reading.resources["ingress"].trouble
    assert {told["stale"] for told in await ground.told("session.status", f"session:{session.id}")} == {False}


async def test_a_short_outage_is_no_news(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.bridge.leading.OUTAGE", 60.0)
    session = await ground.session()
    ground.run(session)
    async with ground.bridge():
        await ground.api.refuse()
        ground.api.cut()
        await ground.api.until(lambda: ground.api.watches() == 0)
        ground.api.put(PODS, ground.api.get(PODS, f"{session.container_name}-abc", namespace=session.namespace))
        await ground.api.listen()
        await ground.api.watching(PODS)
        ground.pod(session, restartCount=1)
        await ground.until_told(2, "session.pod")
    assert await ground.told("session.status", f"session:{session.id}") == []


async def test_a_namespace_of_no_session_is_told_and_left_alone(ground: Ground) -> None:
    session = await ground.session("deleted")
    ground.place(session)
    ground.deployment(session)
    async with ground.bridge():
        await ground.until_told(1, "cluster.namespace")
    assert len(ground.api.all(NAMESPACES)) == len(ground.api.all(DEPLOYMENTS)) == 1
