"""An informer tells what is there, then each change, and holds what there is."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from itertools import pairwise

import msgspec
import pytest

from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import Meta, Namespace, Pod
from orchestrator.cluster.watch import Informer
from tests.integration.cluster.following import following
from tests.kubernetes import NAMESPACES, PODS, KubernetesApi, pod


async def test_the_first_list_is_told_page_by_page_and_then_each_change(api: KubernetesApi, cluster: Cluster) -> None:
    for number in range(7):
        api.put(PODS, pod(f"pod-{number}", "one"))
    async with following(Informer(cluster, PODS, Pod, page=3)) as follower:
        await api.watching(PODS)
        assert follower.told == [("added", f"pod-{number}", True) for number in range(7)]
        assert [batch.synced for batch in follower.batches] == [False, False, False, True]
        assert [asked.params["limit"] for asked in api.asked("list")] == ["3", "3", "3"]
        (watch,) = api.asked("watch")
        assert watch.params["resourceVersion"] == str(api.version)
        assert watch.params["allowWatchBookmarks"] == "true"
        assert 240 <= int(watch.params["timeoutSeconds"]) <= 300
        api.put(PODS, pod("pod-7", "one", phase="Pending"))
        api.put(PODS, pod("pod-7", "one"))
        api.delete(PODS, "pod-0", namespace="one")
        await follower.until(lambda: len(follower.changes) == 10)
        assert follower.told[7:] == [
            ("added", "pod-7", False),
            ("modified", "pod-7", False),
            ("deleted", "pod-0", False),
        ]
        assert [change.object.status.phase for change in follower.changes[7:9]] == ["Pending", "Running"]
        assert follower.names() == [f"pod-{number}" for number in range(1, 8)]


async def test_that_there_is_nothing_is_told_as_well(api: KubernetesApi, cluster: Cluster) -> None:
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await follower.until(lambda: follower.syncs == 1)
        assert [(batch.changes, batch.synced) for batch in follower.batches] == [([], True)]
        await api.watching(PODS)


async def test_what_is_held_is_found_by_namespace_and_name(api: KubernetesApi, cluster: Cluster) -> None:
    for namespace, name in (("one", "a"), ("one", "b"), ("two", "a")):
        api.put(PODS, pod(name, namespace))
    async with following(Informer(cluster, PODS, Pod)) as follower:
        informer = follower.informer
        await api.watching(PODS)
        assert len(informer) == 3
        assert informer.namespaces() == ["one", "two"]
        assert [held.metadata.name for held in informer.held("one")] == ["a", "b"]
        assert [held.metadata.namespace for held in informer.held()] == ["one", "one", "two"]
        found = informer.get("two", "a")
        assert found is not None
        assert (found.status.phase, found.status.container_statuses[0].name) == ("Running", "main")
        assert informer.get("two", "b") is None
        assert list(informer.held("three")) == []
        api.delete(PODS, "a", namespace="two")
        await follower.until(lambda: len(informer) == 2)
        assert informer.namespaces() == ["one"]


async def test_of_what_is_in_no_namespace_the_namespace_is_empty(api: KubernetesApi, cluster: Cluster) -> None:
    api.put(NAMESPACES, {"metadata": {"name": "one"}, "status": {"phase": "Active"}})
    informer = Informer(cluster, NAMESPACES, Namespace)
    async with aclosing(informer.once()) as batches:
        batch = await anext(batches)
    assert [(change.kind, change.object.status.phase) for change in batch.changes] == [("added", "Active")]
    assert informer.get("", "one") is not None


async def test_a_change_has_everything_and_what_is_held_no_annotations(api: KubernetesApi, cluster: Cluster) -> None:
    given = pod("a", "one", labels={"some": "label"})
    given["metadata"]["annotations"] = {"large": "x" * 1000}
    api.put(PODS, given)
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await follower.until(lambda: follower.syncs == 1)
        (change,) = follower.changes
        held = follower.informer.get("one", "a")
    assert change.object.metadata.annotations == {"large": "x" * 1000}
    assert held == msgspec.structs.replace(
        change.object, metadata=msgspec.structs.replace(change.object.metadata, annotations={})
    )


async def test_of_an_object_is_held_what_the_caller_keeps(api: KubernetesApi, cluster: Cluster) -> None:
    api.put(PODS, pod("a", "one"))
    informer = Informer(cluster, PODS, Pod, keep=lambda pod: Pod(metadata=Meta(name=pod.metadata.name)))
    async with following(informer) as follower:
        await follower.until(lambda: follower.syncs == 1)
        assert list(informer.held()) == [Pod(metadata=Meta(name="a", resource_version=str(api.version)))]
        assert follower.changes[0].object.status.phase == "Running"


async def test_that_something_has_changed_which_is_not_kept_is_not_told(api: KubernetesApi, cluster: Cluster) -> None:
    api.put(PODS, pod("a", "one"))
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        api.patch(PODS, "a", {"metadata": {"annotations": {"seen": "now"}}}, namespace="one")
        api.put(PODS, pod("b", "one"))
        await follower.until(lambda: len(follower.changes) == 2)
        api.cut()
        api.patch(PODS, "a", {"metadata": {"annotations": {"seen": "later"}}}, namespace="one")
        last = api.version
        api.compact()
        await follower.until(lambda: follower.syncs == 2)
        assert follower.told == [("added", "a", True), ("added", "b", False)]
        held = follower.informer.get("one", "a")
        assert held is not None
        assert held.metadata.resource_version == str(last)


async def test_only_what_has_the_label_is_seen_and_what_loses_it_is_deleted(
    api: KubernetesApi, cluster: Cluster
) -> None:
    api.put(PODS, pod("ours", "one", labels={"instance": "mine"}))
    api.put(PODS, pod("theirs", "one", labels={"instance": "other"}))
    async with following(Informer(cluster, PODS, Pod, label_selector="instance=mine")) as follower:
        await api.watching(PODS)
        api.patch(PODS, "theirs", {"metadata": {"labels": {"instance": "mine"}}}, namespace="one")
        api.patch(PODS, "ours", {"metadata": {"labels": {"instance": "nobody"}}}, namespace="one")
        await follower.until(lambda: len(follower.changes) == 3)
        assert follower.told == [("added", "ours", True), ("added", "theirs", False), ("deleted", "ours", False)]


async def test_a_watch_that_ends_goes_on_where_it_was(api: KubernetesApi, cluster: Cluster) -> None:
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        api.put(PODS, pod("a", "one"))
        await follower.until(lambda: len(follower.changes) == 1)
        last = api.version
        api.cut(clean=True)
        # Between two watches.
        api.put(PODS, pod("b", "one"))
        await follower.until(lambda: len(follower.changes) == 2)
        assert follower.told == [("added", "a", False), ("added", "b", False)]
        assert api.asked("watch")[1].params["resourceVersion"] == str(last)
        assert len(api.asked("list")) == 1
        assert follower.informer.stats.restarts == 1


async def test_the_server_is_asked_to_end_a_watch_in_time(api: KubernetesApi, cluster: Cluster) -> None:
    async with following(Informer(cluster, PODS, Pod, watch_for=1.0)) as follower:
        await follower.until(lambda: follower.informer.stats.restarts >= 2)
        await api.watching(PODS)
        api.put(PODS, pod("a", "one"))
        await follower.until(lambda: len(follower.changes) == 1)
        assert len(api.asked("list")) == 1


async def test_bookmarks_move_on_where_the_next_watch_begins(api: KubernetesApi, cluster: Cluster) -> None:
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        # Of what the watch does not see.
        api.put(NAMESPACES, {"metadata": {"name": "one"}})
        api.bookmark(PODS)
        await follower.until(lambda: follower.informer.stats.last_event is not None)
        api.compact()
        api.cut(clean=True)
        await api.until(lambda: len(api.asked("watch")) == 2)
        assert api.asked("watch")[1].params["resourceVersion"] == str(api.version)
        await api.watching(PODS)
        assert (follower.told, follower.syncs, follower.informer.stats.unreadable) == ([], 1, 0)


async def test_an_object_made_anew_under_the_same_name_is_another(api: KubernetesApi, cluster: Cluster) -> None:
    first = api.put(PODS, pod("a", "one"))["metadata"]["uid"]
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        api.delete(PODS, "a", namespace="one")
        second = api.put(PODS, pod("a", "one"))["metadata"]["uid"]
        await follower.until(lambda: len(follower.changes) == 3)
        # Nobody is told of the next: what is found is what a list says.
        api.cut()
        api.delete(PODS, "a", namespace="one")
        third = api.put(PODS, pod("a", "one"))["metadata"]["uid"]
        api.compact()
        await follower.until(lambda: follower.syncs == 2)
        assert [(change.kind, change.object.metadata.uid, change.synthetic) for change in follower.changes] == [
            ("added", first, True),
            ("deleted", first, False),
            ("added", second, False),
            ("deleted", second, True),
            ("added", third, True),
        ]


async def test_one_iteration_lists_where_it_must_and_watches_until_the_watch_ends(
    api: KubernetesApi, cluster: Cluster
) -> None:
    api.put(PODS, pod("a", "one"))
    informer = Informer(cluster, PODS, Pod)

    async def iteration() -> list[tuple[str, bool]]:
        return [
            (change.object.metadata.name, batch.synced)
            async for batch in informer.once()
            for change in batch.changes or [None]
            if change
        ]

    async with asyncio.TaskGroup() as group:
        first = group.create_task(iteration())
        await api.watching(PODS)
        api.cut(clean=True)
    assert first.result() == [("a", False)]
    api.put(PODS, pod("b", "one"))
    async with asyncio.TaskGroup() as group:
        second = group.create_task(iteration())
        await api.watching(PODS)
        api.cut(clean=True)
    assert second.result() == [("b", False)]
    assert (len(api.asked("list")), len(api.asked("watch"))) == (1, 2)


@pytest.mark.parametrize("where", ["list", "watch"])
async def test_cancelled_anywhere_it_leaves_nothing_open_and_goes_on_from_there(
    api: KubernetesApi, cluster: Cluster, where: str
) -> None:
    for number in range(5):
        api.put(PODS, pod(f"pod-{number}", "one"))
    informer = Informer(cluster, PODS, Pod, page=2)
    api.freeze() if where == "list" else None
    async with following(informer) as follower:
        await api.until(lambda: bool(api.asked(where)))
    assert not follower.changes if where == "list" else len(follower.changes) == 5
    api.thaw()
    await api.until(lambda: api.watches() == 0)
    async with following(informer) as second:
        await api.watching(PODS)
        api.put(PODS, pod("pod-5", "one"))
        await second.until(lambda: len(second.informer) == 6)
    told = follower.told + second.told
    assert [(kind, name) for kind, name, _ in told] == [("added", f"pod-{number}") for number in range(6)]


async def test_the_loop_goes_on_while_a_large_list_is_looked_at(api: KubernetesApi, cluster: Cluster) -> None:
    for number in range(2000):
        api.put(PODS, pod(f"pod-{number:04}", f"namespace-{number}"))
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    informer = Informer(cluster, PODS, Pod, page=2000)
    task = asyncio.create_task(turn())
    between: list[int] = []
    async with aclosing(informer.once()) as batches:
        async for batch in batches:
            between.append(turns)
            if batch.synced:
                break
    task.cancel()
    # A hundred objects at a time, and at least one turn for others after each.
    assert len(between) == 21
    assert all(later > earlier for earlier, later in pairwise(between))
    assert len(informer) == 2000


async def test_what_it_has_done_is_counted(api: KubernetesApi, cluster: Cluster) -> None:
    api.put(PODS, pod("a", "one"))
    begun = time.monotonic()
    async with following(Informer(cluster, PODS, Pod)) as follower:
        stats = follower.informer.stats
        await api.watching(PODS)
        assert (stats.last_event, stats.lines, stats.changes) == (None, 0, 1)
        api.put(PODS, pod("a", "one", phase="Failed"))
        api.delete(PODS, "a", namespace="one")
        await follower.until(lambda: len(follower.changes) == 3)
        assert (stats.changes, stats.lines, stats.lists, stats.watches, stats.restarts) == (3, 2, 1, 1, 0)
        assert stats.last_list is not None
        assert stats.last_event is not None
        assert begun <= stats.last_list <= stats.last_event <= time.monotonic()
        assert begun <= follower.batches[-1].at <= time.monotonic()
