"""Whatever a watch runs into, each change is told once, and it never gives up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import Event, Pod
from orchestrator.cluster.watch import Informer
from orchestrator.errors import ApiRefused, ProviderUnavailable
from tests.integration.cluster.following import Follower, following
from tests.kubernetes import (
    EMPTY,
    EVENTS,
    PODS,
    Answer,
    KubernetesApi,
    error,
    html,
    line,
    pod,
    refused,
    slow,
)


def put(api: KubernetesApi, *names: str) -> None:
    for name in names:
        api.put(PODS, pod(name, "one"))


def miss(api: KubernetesApi) -> None:
    """What happens while nobody watches: of a, b and c one is gone, one is another, and there is a d."""
    api.delete(PODS, "a", namespace="one")
    api.put(PODS, pod("b", "one", phase="Failed"))
    put(api, "d")


MISSED = [("modified", "b", True), ("added", "d", True), ("deleted", "a", True)]


# Too old. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_stream", [True, False], ids=["in the stream", "as a status"])
async def test_a_version_too_old_is_listed_again_and_what_was_missed_is_told(
    api: KubernetesApi, cluster: Cluster, in_stream: bool
) -> None:
    api.gone_in_stream = in_stream
    put(api, "a", "b", "c")
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        api.cut()
        miss(api)
        api.compact()
        await follower.until(lambda: follower.syncs == 2)
        assert follower.told[3:] == MISSED
        assert follower.changes[3].object.status.phase == "Failed"
        assert follower.names() == ["b", "c", "d"]
        await api.watching(PODS)
        put(api, "e")
        await follower.until(lambda: len(follower.changes) == 7)
        assert follower.told[6:] == [("added", "e", False)]


async def test_an_open_watch_that_is_told_so_keeps_what_it_was_told_before(
    api: KubernetesApi, cluster: Cluster
) -> None:
    put(api, "a")
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        put(api, "b")
        api.expire()
        await follower.until(lambda: follower.syncs == 2)
        await api.watching(PODS)
        assert follower.told == [("added", "a", True), ("added", "b", False)]


async def test_a_list_that_expires_between_two_pages_begins_again(api: KubernetesApi, cluster: Cluster) -> None:
    put(api, "a", "b", "c", "d", "e")
    api.fail("list", slow(0), refused(410, "Expired", "The provided continue parameter is too old"))
    async with following(Informer(cluster, PODS, Pod, page=2)) as follower:
        await follower.until(lambda: follower.syncs == 1)
        assert follower.told == [("added", name, True) for name in "abcde"]
        assert ["continue" in asked.params for asked in api.asked("list")] == [False, True, False, True, True]
        await api.watching(PODS)


async def test_a_server_that_calls_every_version_too_old_is_not_asked_without_a_pause(
    api: KubernetesApi, cluster: Cluster
) -> None:
    put(api, "a")
    api.fail("watch", *[Answer(200, error(410, "Expired"))] * 4)
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        assert follower.syncs == 5
        assert follower.told == [("added", "a", True)]
        assert _spread(api) > 0.02


async def test_a_cluster_set_back_to_an_earlier_state_is_listed_again(api: KubernetesApi, cluster: Cluster) -> None:
    put(api, "a", "b")
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        api.put(PODS, pod("a", "one", phase="Failed"))
        await follower.until(lambda: len(follower.changes) == 3)
        # Restored from a backup: of `a` an earlier version is the latest, and what comes counts from there.
        api.version = 500
        api.compact()
        api.put(PODS, pod("a", "one"))
        api.bookmark()
        await follower.until(lambda: follower.syncs == 2)
        assert follower.told[3:] == [("modified", "a", True)]
        await api.watching(PODS)
        put(api, "c")
        await follower.until(lambda: len(follower.changes) == 5)


# Watches that end. ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [EMPTY, "a bookmark only"], ids=["nothing", "a bookmark"])
async def test_watches_that_end_at_once_are_not_asked_for_without_a_pause(
    api: KubernetesApi, cluster: Cluster, answer: Answer
) -> None:
    put(api, "a")
    if not isinstance(answer, Answer):
        mark = {"metadata": {"resourceVersion": "5000"}, "spec": {"containers": None}, "status": {}}
        answer = Answer(200, line("BOOKMARK", mark), EMPTY.headers)
    api.fail("watch", *[answer] * 4)
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        assert _spread(api) > 0.02
        assert len(api.asked("list")) == 1
        assert api.asked("watch")[-1].params["resourceVersion"] == ("5000" if answer.body else str(api.version))
        api.version = 5000
        put(api, "b")
        await follower.until(lambda: len(follower.changes) == 2)
        assert follower.told == [("added", "a", True), ("added", "b", False)]


@pytest.mark.parametrize("clean", [True, False], ids=["as if it were whole", "by the network"])
async def test_a_line_that_is_cut_is_told_once_by_the_next_watch(
    api: KubernetesApi, cluster: Cluster, clean: bool
) -> None:
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        put(api, "a")
        await follower.until(lambda: len(follower.changes) == 1)
        last = api.version
        api.cut_mid_line(clean=clean)
        put(api, "b", "c")
        await follower.until(lambda: len(follower.changes) == 3)
        assert follower.told == [("added", name, False) for name in "abc"]
        assert api.asked("watch")[1].params["resourceVersion"] == str(last)
        assert len(api.asked("list")) == 1


async def test_an_error_in_the_stream_ends_the_watch_and_nothing_else(api: KubernetesApi, cluster: Cluster) -> None:
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        put(api, "a")
        api.send(error(500, "InternalError", "etcdserver: leader changed"))
        await follower.until(lambda: follower.informer.stats.restarts == 1)
        await api.watching(PODS)
        put(api, "b")
        await follower.until(lambda: len(follower.changes) == 2)
        assert len(api.asked("list")) == 1


async def test_an_error_among_events_is_no_event(api: KubernetesApi, cluster: Cluster) -> None:
    # Kubernetes' Status has the same fields as its Event: a reason, and a message.
    async with following(Informer(cluster, EVENTS, Event)) as follower:
        await api.watching(EVENTS)
        api.expire()
        await follower.until(lambda: follower.syncs == 2)
        assert follower.changes == []


# Silence. ------------------------------------------------------------------------------------------------------------


async def test_a_connection_that_says_nothing_any_more_is_given_up(api: KubernetesApi, cluster: Cluster) -> None:
    api.bookmark_every = 0.1
    async with following(Informer(cluster, PODS, Pod, stall=1.0)) as follower:
        await api.watching(PODS)
        put(api, "a")
        await follower.until(lambda: len(follower.changes) == 1)
        api.freeze()
        put(api, "b")
        await follower.until(lambda: isinstance(follower.informer.trouble, ProviderUnavailable))
        await api.until(lambda: len(api.asked("watch")) >= 2)
        api.thaw()
        await follower.until(lambda: len(follower.changes) == 2)
        assert follower.told == [("added", "a", False), ("added", "b", False)]
        assert len(api.asked("list")) == 1
        await follower.until(lambda: follower.informer.trouble is None)


async def test_bookmarks_are_sign_of_life_enough(api: KubernetesApi, cluster: Cluster) -> None:
    api.bookmark_every = 0.1
    stall = 2.0
    async with following(Informer(cluster, PODS, Pod, stall=stall)) as follower:
        await api.watching(PODS)
        begun = time.monotonic()
        await follower.until(lambda: (follower.informer.stats.last_event or 0) > begun + 1.5 * stall)
        assert len(api.asked("watch")) == 1


async def test_a_clock_that_jumps_changes_nothing(
    api: KubernetesApi, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.bookmark_every = 0.1
    now = time.time
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        for count, jump in enumerate((86_400.0, -86_400.0, 10 * 365 * 86_400.0), start=1):
            monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
            put(api, f"pod-{count}")
            await follower.until(lambda count=count: len(follower.changes) == count)
        assert (len(api.asked("list")), len(api.asked("watch"))) == (1, 1)


# Refusals and outages. -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["list", "watch"])
async def test_the_page_of_a_proxy_is_an_outage(api: KubernetesApi, cluster: Cluster, verb: str) -> None:
    put(api, "a")
    api.fail(verb, *[html()] * 20)
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await follower.until(lambda: follower.informer.trouble is not None)
        assert isinstance(follower.informer.trouble, ProviderUnavailable)
        assert "<html>" not in str(follower.informer.trouble)
        api.recover()
        await api.watching(PODS)
        put(api, "b")
        await follower.until(lambda: len(follower.changes) == 2)
        assert follower.told == [("added", "a", True), ("added", "b", False)]


async def test_the_page_of_a_proxy_that_calls_it_a_success_is_an_outage(api: KubernetesApi, cluster: Cluster) -> None:
    api.fail("watch", html(200))
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        put(api, "a")
        await follower.until(lambda: len(follower.changes) == 1)
        assert (len(api.asked("list")), len(api.asked("watch"))) == (1, 2)


@pytest.mark.parametrize("body", [b"{}", b'{"items": []}', b"[]", b""])
async def test_an_answer_that_is_no_list_says_nothing_of_what_is_there(
    api: KubernetesApi, cluster: Cluster, body: bytes
) -> None:
    put(api, "a")
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        api.fail("list", Answer(200, body, EMPTY.headers))
        api.expire()
        await follower.until(lambda: isinstance(follower.informer.trouble, ProviderUnavailable))
        await follower.until(lambda: follower.syncs == 2)
        assert follower.told == [("added", "a", True)]


async def test_credentials_that_are_taken_away_are_read_again(
    api: KubernetesApi, cluster: Cluster, kubeconfig: Path
) -> None:
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        put(api, "a")
        await follower.until(lambda: len(follower.changes) == 1)
        api.token = "another"
        api.cut()
        put(api, "b")
        await follower.until(lambda: follower.informer.trouble is not None)
        assert "another" not in str(follower.informer.trouble)
        assert follower.told == [("added", "a", False)]
        api.write_kubeconfig(kubeconfig)
        await follower.until(lambda: len(follower.changes) == 2)
        assert follower.told == [("added", "a", False), ("added", "b", False)]
        assert api.asked("watch")[-1].authorization == "Bearer another"


async def test_it_waits_for_as_long_as_the_server_asks(api: KubernetesApi, cluster: Cluster) -> None:
    api.fail("watch", refused(429, "TooManyRequests", "slow down", retry_after=2))
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        first, second = api.asked("watch")
        assert second.at - first.at >= 2
        put(api, "a")
        await follower.until(lambda: len(follower.changes) == 1)
        assert len(api.asked("list")) == 1


async def test_what_the_server_forbids_is_asked_again_until_it_is_allowed(api: KubernetesApi, cluster: Cluster) -> None:
    api.fail("list", *[refused(403, "Forbidden", "pods is forbidden")] * 3)
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await follower.until(lambda: isinstance(follower.informer.trouble, ApiRefused))
        await api.watching(PODS)
        assert follower.syncs == 1
        await follower.until(lambda: follower.informer.trouble is None)


async def test_an_outage_is_waited_for_and_what_happened_meanwhile_is_told(
    api: KubernetesApi, cluster: Cluster
) -> None:
    put(api, "a", "b", "c")
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        await api.refuse()
        api.cut()
        await follower.until(lambda: isinstance(follower.informer.trouble, ProviderUnavailable))
        assert follower.names() == ["a", "b", "c"]
        miss(api)
        api.compact()
        await api.listen()
        await follower.until(lambda: follower.syncs == 2)
        assert follower.told[3:] == MISSED


# Lines. --------------------------------------------------------------------------------------------------------------


async def test_a_line_may_have_any_size(api: KubernetesApi, cluster: Cluster) -> None:
    large = pod("large", "one")
    large["metadata"]["annotations"] = {"notes": "x" * (3 << 20)}
    put(api, "a")
    api.put(PODS, large)
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        api.put(PODS, large | {"status": {"phase": "Failed"}})
        put(api, "b")
        await follower.until(lambda: len(follower.changes) == 4)
        assert follower.told == [
            ("added", "a", True),
            ("added", "large", True),
            ("modified", "large", False),
            ("added", "b", False),
        ]
        assert len(follower.changes[2].object.metadata.annotations["notes"]) == 3 << 20
        assert len(api.asked("watch")) == 1


async def test_what_is_late_or_repeated_is_dropped(api: KubernetesApi, cluster: Cluster) -> None:
    first = api.put(PODS, pod("a", "one", phase="Pending"))
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        # 999 comes before 1001, although "9" comes after "1".
        assert first["metadata"]["resourceVersion"] == "1001"
        older = first | {"metadata": first["metadata"] | {"resourceVersion": "999"}}
        second = api.put(PODS, pod("a", "one"))
        for late in (first, older, second):
            api.send(line("MODIFIED", late))
        put(api, "b")
        await follower.until(lambda: len(follower.changes) == 3)
        assert follower.told == [("added", "a", True), ("modified", "a", False), ("added", "b", False)]
        assert follower.informer.stats.stale == 3
        held = follower.informer.get("one", "a")
        assert held is not None
        assert held.status.phase == "Running"


async def test_a_late_line_brings_nothing_back(api: KubernetesApi, cluster: Cluster) -> None:
    first = api.put(PODS, pod("a", "one"))
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        api.delete(PODS, "a", namespace="one")
        api.send(line("MODIFIED", first))
        second = api.put(PODS, pod("a", "one"))
        api.send(line("MODIFIED", first))
        api.send(line("DELETED", first))
        put(api, "b")
        await follower.until(lambda: len(follower.changes) == 4)
        assert follower.told[1:] == [("deleted", "a", False), ("added", "a", False), ("added", "b", False)]
        held = follower.informer.get("one", "a")
        assert held is not None
        assert held.metadata.uid == second["metadata"]["uid"]


async def test_that_an_object_is_gone_is_believed_whatever_its_version(api: KubernetesApi, cluster: Cluster) -> None:
    first = api.put(PODS, pod("a", "one"))
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        api.send(line("DELETED", first))
        await follower.until(lambda: len(follower.changes) == 2)
        assert follower.told[1:] == [("deleted", "a", False)]


async def test_an_object_that_is_not_understood_keeps_nobody_from_the_others(
    api: KubernetesApi, cluster: Cluster
) -> None:
    strange = pod("strange", "one")
    strange["metadata"]["annotations"] = "text"
    put(api, "a", "c")
    api.put(PODS, strange)
    async with following(Informer(cluster, PODS, Pod)) as follower:
        await api.watching(PODS)
        # One that was understood before, too: it is held as it was.
        api.put(PODS, pod("c", "one") | {"status": "text"})
        put(api, "d")
        await follower.until(lambda: len(follower.changes) == 3)
        api.expire()
        await follower.until(lambda: follower.syncs == 2)
        assert follower.told == [("added", "a", True), ("added", "c", True), ("added", "d", False)]
        assert follower.informer.stats.unreadable == 4
        await api.watching(PODS)
        api.delete(PODS, "c", namespace="one")
        await follower.until(lambda: len(follower.changes) == 4)
        assert follower.told[3:] == [("deleted", "c", False)]


async def test_a_storm_of_faults_ends_with_what_there_is(api: KubernetesApi, cluster: Cluster) -> None:
    put(api, *(f"pod-{number}" for number in range(20)))
    async with following(Informer(cluster, PODS, Pod, page=6, stall=1.0)) as follower:
        await api.watching(PODS)
        api.fail("watch", EMPTY, Answer(200, error(410, "Expired")))
        api.fail("list", slow(0), refused(410, "Expired"), html())
        api.cut_mid_line()
        for number in range(0, 20, 2):
            api.delete(PODS, f"pod-{number}", namespace="one")
        put(api, *(f"new-{number}" for number in range(5)), "pod-1", "pod-4")
        api.compact()
        wanted = sorted(one["metadata"]["name"] for one in api.all(PODS))
        await follower.until(lambda: follower.names() == wanted, within=50)
        assert _replayed(follower) == wanted


def _replayed(follower: Follower) -> list[str]:
    """What is there by the changes alone: each adds what was not there, or takes away what was."""
    there: set[str] = set()
    for change in follower.changes:
        name = change.object.metadata.name
        assert (name in there) == (change.kind != "added")
        if change.kind == "deleted":
            there.remove(name)
        else:
            there.add(name)
    return sorted(there)


def _spread(api: KubernetesApi) -> float:
    """Seconds between the first watch and the fifth: without pauses a few milliseconds, with them some seconds."""
    watches = api.asked("watch")
    assert len(watches) == 5
    return watches[-1].at - watches[0].at


async def test_a_watch_whose_answer_never_comes_is_given_up(api: KubernetesApi, cluster: Cluster) -> None:
    api.fail("watch", Answer(200, after=float("inf")))
    async with following(Informer(cluster, PODS, Pod, stall=1.0)) as follower:
        await api.watching(PODS)
        put(api, "a")
        await follower.until(lambda: len(follower.changes) == 1)
        assert len(api.asked("watch")) == 2
