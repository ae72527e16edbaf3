"""What a cluster's changes become: events, rows, and the table of what was told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.integration.bridge.conftest import Ground, Orchestrator, until
from tests.kubernetes import EVENTS, NAMESPACES, PODS, line, slow


async def test_a_change_of_a_pod_is_told_on_its_sessions_channel_and_on_cluster(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    async with ground.bridge():
        (added,) = await ground.until_told(1, "session.pod", f"session:{session.id}")
        assert added["session_id"] == session.id
        assert (added["provider"], added["namespace"], added["change"]) == ("staged", session.namespace, "added")
        assert (added["phase"], added["ready"], added["node"]) == ("Running", True, "bench")
        assert [one["name"] for one in added["containers"]] == ["preview"]
        ground.pod(session, ready=False)
        _, modified = await ground.until_told(2, "session.pod", f"session:{session.id}")
        assert (modified["change"], modified["ready"]) == ("modified", False)
        assert int(modified["resource_version"]) > int(added["resource_version"])
        assert await ground.told("session.pod") == [added, modified]
    (kept,) = await ground.fetch("SELECT * FROM cluster_objects WHERE kind = 'pod'")
    assert (kept["uid"], kept["version"]) == (modified["uid"], int(modified["resource_version"]))


async def test_what_cannot_be_seen_is_not_told(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    async with ground.bridge():
        await ground.until_told(1, "session.pod")
        name = f"{session.container_name}-abc"
        ground.api.patch(PODS, name, {"metadata": {"annotations": {"seen": "1"}}}, namespace=session.namespace)
        ground.pod(session, ready=False)
        first, second = await ground.until_told(2, "session.pod")
        # Two versions lie between the two: the one that nobody could see the difference of, and the one that was told.
        assert int(second["resource_version"]) == int(first["resource_version"]) + 2


async def test_a_deleted_pod_is_told_once_and_forgotten(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    async with ground.bridge():
        await ground.until_told(1, "session.pod")
        ground.api.delete(PODS, f"{session.container_name}-abc", namespace=session.namespace)
        _, gone = await ground.until_told(2, "session.pod")
        assert gone["change"] == "deleted"
    assert await ground.value("SELECT count(*) FROM cluster_objects WHERE kind = 'pod'") == 0


async def test_deployments_namespaces_and_ingresses_are_told_on_cluster_only(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    ground.api.put(
        "/apis/networking.k8s.io/v1/ingresses",
        {"metadata": ground.meta(session, session.container_name), "spec": {"rules": [{"host": "shop.example.org"}]}},
    )
    async with ground.bridge():
        (deployment,) = await ground.until_told(1, "cluster.deployment")
        (namespace,) = await ground.until_told(1, "cluster.namespace")
        (ingress,) = await ground.until_told(1, "cluster.ingress")
    assert (deployment["deployment"], deployment["ready_replicas"]) == (session.container_name, 1)
    assert (namespace["namespace"], namespace["phase"]) == (session.namespace, "Active")
    assert (ingress["hosts"], ingress["session_id"]) == (["shop.example.org"], session.id)
    assert {one["change"] for one in (deployment, namespace, ingress)} == {"added"}
    kinds = await ground.fetch("SELECT DISTINCT event_type FROM outbox WHERE channel = $1", f"session:{session.id}")
    assert [row["event_type"] for row in kinds] == ["session.pod"]


async def test_a_kubernetes_event_is_told_again_when_it_counts_on(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    async with ground.bridge():
        ground.event(session, reason="BackOff", type="Warning", message="Back-off pulling image")
        ground.event(session, count=2, reason="BackOff", type="Warning", message="Back-off pulling image")
        events = await ground.until_told(2, "session.event", f"session:{session.id}")
        assert [one["count"] for one in events] == [1, 2]
        assert events[0]["object"] == f"Pod/{session.container_name}-abc"
        assert (events[0]["container"], events[0]["type"], events[0]["reason"]) == ("preview", "Warning", "BackOff")
        assert events[0]["first_seen"].endswith("Z")
        # That it expires is no news.
        ground.api.delete(EVENTS, "one", namespace=session.namespace)
        await until(lambda: ground.value("SELECT NOT EXISTS (SELECT FROM cluster_objects WHERE kind = 'event')"))
        assert len(await ground.told("session.event")) == 2


async def test_events_of_others_are_nobodys_and_those_before_their_namespace_are_told(ground: Ground) -> None:
    session = await ground.session()
    async with ground.bridge():
        ground.api.put(EVENTS, {"metadata": {"name": "other", "namespace": "kube-system"}, "reason": "Other"})
        ground.event(session, reason="Early")
        await ground.api.until(lambda: ground.api.watches(EVENTS) == 1)
        ground.place(session)
        (event,) = await ground.until_told(1, "session.event")
        assert (event["reason"], event["session_id"]) == ("Early", session.id)


async def test_the_first_look_at_a_cluster_is_no_flood_of_old_events(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    ground.event(session, "old", seen=datetime.now(UTC) - timedelta(minutes=30), reason="Old")
    ground.event(session, "new", reason="New")
    async with ground.bridge():
        (event,) = await ground.until_told(1, "session.event")
        assert event["reason"] == "New"
        assert await ground.value("SELECT count(*) FROM cluster_objects WHERE kind = 'event'") == 2
        ground.event(session, "old", count=2, reason="Old")
        assert [one["reason"] for one in await ground.until_told(2, "session.event")] == ["New", "Old"]


async def test_a_version_older_than_what_was_told_is_dropped(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    async with ground.bridge():
        await ground.until_told(1, "session.pod")
        late = ground.api.get(PODS, f"{session.container_name}-abc", namespace=session.namespace)
        ground.pod(session, ready=False)
        await ground.until_told(2, "session.pod")
        ground.api.send(line("MODIFIED", late), path=PODS)
        ground.pod(session, ready=True, restartCount=1)
        told = await ground.until_told(3, "session.pod")
        assert [one["ready"] for one in told] == [True, False, True]


async def test_a_label_does_not_make_another_sessions_channel_ones_own(ground: Ground) -> None:
    victim, session = await ground.session(), await ground.session()
    ground.run(session)
    pod = ground.api.get(PODS, f"{session.container_name}-abc", namespace=session.namespace)
    labels = ground.labels(victim)
    pod["metadata"] = pod["metadata"] | {"labels": labels, "name": "forged"}
    del pod["metadata"]["uid"]
    ground.api.put(PODS, pod)
    async with ground.bridge():
        told = await ground.until_told(2, "session.pod")
        assert {one["pod"]: one["session_id"] for one in told}["forged"] is None
        assert await ground.told("session.pod", f"session:{victim.id}") == []


async def test_a_new_leader_tells_exactly_what_happened_meanwhile(ground: Ground) -> None:
    kept, changed, gone, new = [await ground.session() for _ in range(4)]
    for session in (kept, changed, gone):
        ground.run(session)
    ground.event(kept, "before", reason="Before")
    async with ground.bridge():
        await ground.until_told(3, "session.pod")
        await ground.until_told(1, "session.event")
    ground.pod(changed, restartCount=1)
    ground.api.delete(NAMESPACES, gone.namespace)
    ground.run(new)
    ground.event(new, "after", reason="After")
    async with ground.bridge():
        told = await ground.until_told(6, "session.pod")
        news = {(one["session_id"], one["change"]) for one in told[3:]}
        assert news == {(changed.id, "modified"), (gone.id, "deleted"), (new.id, "added")}
        assert [one["reason"] for one in await ground.until_told(2, "session.event")] == ["Before", "After"]
        spaces = [(one["session_id"], one["change"]) for one in await ground.until_told(5, "cluster.namespace")]
        assert set(spaces[3:]) == {(gone.id, "deleted"), (new.id, "added")}
    async with ground.bridge():
        pass
    assert len(await ground.told("session.pod")) == 6
    assert len(await ground.told("session.event")) == 2
    assert len(await ground.told("cluster.namespace")) == 5


async def test_after_a_410_what_was_missed_is_told_once(ground: Ground) -> None:
    sessions = [await ground.session() for _ in range(3)]
    for session in sessions:
        ground.run(session)
    async with ground.bridge():
        await ground.until_told(3, "session.pod")
        # While nobody listens something happens, and then nobody remembers it.
        await ground.api.refuse()
        ground.api.cut()
        await ground.api.until(lambda: ground.api.watches() == 0)
        ground.pod(sessions[0], restartCount=1)
        ground.api.delete(PODS, f"{sessions[1].container_name}-abc", namespace=sessions[1].namespace)
        ground.api.compact()
        await ground.api.listen()
        told = await ground.until_told(5, "session.pod")
        assert {(one["session_id"], one["change"]) for one in told[3:]} == {
            (sessions[0].id, "modified"),
            (sessions[1].id, "deleted"),
        }


async def test_of_two_orchestrators_one_leads_and_the_other_takes_over(ground: Ground) -> None:
    session = await ground.session()
    ground.run(session)
    async with ground.orchestrator() as first, ground.orchestrator() as second:
        await until(lambda: _one_leads(first, second))
        await ground.until_told(1, "session.pod")
        leader, other = (first, second) if first.bridges.read()[0].leads else (second, first)
        await leader.end()
        ground.pod(session, restartCount=1)
        await other.following()
        await ground.until_told(2, "session.pod")


async def _one_leads(*ones: object) -> bool:
    return [reading.leads for one in ones for reading in one.bridges.read()].count(True) == 1  # type: ignore[attr-defined]


@pytest.mark.random
async def test_whenever_leaders_die_each_change_is_told_once(ground: Ground) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    sessions = [await ground.session() for _ in range(8)]
    restarts = dict.fromkeys((session.id for session in sessions), 0)
    for session in sessions:
        ground.place(session)
    async with AsyncExitStack() as stack:
        ones = [await stack.enter_async_context(ground.orchestrator()) for _ in range(2)]
        for number in range(120):
            session = chance.choice(sessions)
            key = session.namespace, f"{session.container_name}-abc"
            if chance.random() < 0.2 and any(
                one["metadata"]["namespace"] == session.namespace for one in ground.api.all(PODS)
            ):
                ground.api.delete(PODS, key[1], namespace=key[0])
            else:
                restarts[session.id] += 1
                ground.pod(session, restartCount=restarts[session.id])
            if chance.random() < 0.08:
                await ground.end_leaders()
            if chance.random() < 0.05:
                ground.api.expire() if chance.random() < 0.5 else ground.api.cut()
            if number % 3 == 0:
                await asyncio.sleep(chance.uniform(0, 0.15))

        async def agreed() -> bool:
            there = {one["metadata"]["uid"]: int(one["metadata"]["resourceVersion"]) for one in ground.api.all(PODS)}
            rows = await ground.fetch("SELECT uid, version FROM cluster_objects WHERE kind = 'pod'")
            return {row["uid"]: row["version"] for row in rows} == there

        await until(agreed)
        assert any(one.bridges.read()[0].leads for one in ones)
    told: dict[str, list[tuple[int, str]]] = {}
    for one in await ground.told("session.pod"):
        told.setdefault(one["uid"], []).append((int(one["resource_version"]), one["change"]))
    there = {one["metadata"]["uid"]: int(one["metadata"]["resourceVersion"]) for one in ground.api.all(PODS)}
    for uid, changes in told.items():
        versions = [version for version, _ in changes]
        kinds = [change for _, change in changes]
        gone = uid not in there
        # A deletion that was found by listing has the version that was told last.
        states = versions[:-1] if gone else versions
        assert states == sorted(set(states)), (seed, changes)
        assert (kinds[0], kinds.count("added")) == ("added", 1), (seed, changes)
        assert (kinds[-1] == "deleted", kinds.count("deleted")) == (gone, gone), (seed, changes)
        if not gone:
            assert versions[-1] == there[uid], (seed, changes)
    assert there.keys() <= told.keys(), seed
    for session in sessions:
        own = await ground.told("session.pod", f"session:{session.id}")
        assert own == [one for one in await ground.told("session.pod") if one["session_id"] == session.id]


async def test_one_odd_object_keeps_nobody_from_the_others(ground: Ground) -> None:
    session = await ground.session()
    ground.place(session)
    # A moment in no time zone, which is neither before nor after any other.
    ground.event(session, "odd", firstTimestamp=None, lastTimestamp="2026-01-01T00:00:00")
    async with ground.bridge() as one:
        ground.api.version = 2**63
        ground.pod(session, name="odd")
        ground.api.version = 1000
        ground.pod(session)
        (told,) = await ground.until_told(1, "session.pod")
        assert told["pod"] == f"{session.container_name}-abc"
        (reading,) = one.bridges.read()
        assert [reading.resources[name].unreadable for name in ("event", "pod")] == [1, 1]


async def test_what_is_missing_is_told_once_though_it_was_listed_again_meanwhile(ground: Ground) -> None:
    gone, changed = await ground.session(), await ground.session()
    for session in (gone, changed):
        ground.run(session)
    async with ground.bridge():
        await ground.until_told(2, "session.pod")
    ground.api.delete(PODS, f"{gone.container_name}-abc", namespace=gone.namespace)
    ground.api.patch(NAMESPACES, changed.namespace, {"status": {"phase": "Terminating"}})
    # Nothing can be told before all pods were listed twice, however long that takes here.
    ground.database_settings = replace(ground.database_settings, timeout=60.0)
    ground.api.fail("list", slow(0.5), path=PODS)
    async with ground.orchestrator() as one, ground.pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute("LOCK TABLE outbox IN SHARE MODE")
            await until(lambda: _listed(one, 1))

            async def again() -> bool:
                # Only an open watch can be told so.
                if ground.api.watches(PODS):
                    ground.api.expire(PODS)
                return await _listed(one, 2)

            await until(again)
        assert (await ground.until_told(3, "session.pod"))[-1]["change"] == "deleted"
        await one.following()


async def _listed(one: Orchestrator, times: int) -> bool:
    return any(reading.resources and reading.resources["pod"].lists >= times for reading in one.bridges.read())


async def test_who_has_lost_the_lead_knows_it_at_once(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    # Also while there is nothing to do for him.
    monkeypatch.setattr("orchestrator.bridge.leading._SWEEP", 3600.0)
    session = await ground.session()
    ground.run(session)
    async with ground.bridge():
        ground.pod(session, restartCount=1)
        await ground.until_told(2, "session.pod")
        with capture_logs() as logs:
            await ground.end_leaders()
            await until(lambda: _said(logs, "the lead is lost"))


async def _said(logs: Sequence[Mapping[str, Any]], event: str) -> bool:
    return any(entry["event"] == event for entry in logs)
