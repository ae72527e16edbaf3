"""What is told of sessions that fail, by how a real Kubernetes shows it: all of them at the same time, as it takes its
own time to give up on each.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import INSTANCE, PROJECT, Claim, Deployment, Event, Namespace, Partial, Pod
from orchestrator.errors import ApiRefused
from orchestrator.providers.contract import Observation, State
from orchestrator.providers.diagnosis import Evidence, Rules, crashed, diagnose
from tests.cluster.conftest import IMAGE, eventually, removed_after, there

NAME = "session-42"
RULES = Rules(frozenset(), transient_grace=120.0, progress_deadline=300.0, instance="cluster-code")
# Seconds. Kubernetes waits 10 after the second crash; two cores run everything, the cluster too.
DEADLINE = 150.0
# What a session's container does when it is well.
IDLE = ["sh", "-c", "trap 'exit 0' TERM; sleep 3600 & wait"]

pytestmark = pytest.mark.timeout(300)


def container(name: str = "preview", **more: Any) -> dict[str, Any]:
    return {"name": name, "image": IMAGE, "imagePullPolicy": "IfNotPresent", "command": IDLE, **more}


def shell(script: str) -> dict[str, Any]:
    return {"command": ["sh", "-c", script]}


def deployment(preview: dict[str, Any], *, deadline: int = 300, **pod: Any) -> dict[str, Any]:
    """A session of two containers, the second of which is well."""
    labels = {"app": NAME}
    containers = [container(**preview), container("chat")]
    spec = {"automountServiceAccountToken": False, "terminationGracePeriodSeconds": 0, "containers": containers, **pod}
    return {
        "metadata": {"name": NAME},
        "spec": {
            "strategy": {"type": "Recreate"},
            "progressDeadlineSeconds": deadline,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


class Session:
    """What a case's namespace shows."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.namespace = namespace
        self.inside = f"/api/v1/namespaces/{namespace}"
        self._cluster = cluster

    async def look(self) -> Observation:
        """As a provider does: with the last lines of what crashed."""
        deployments = f"/apis/apps/v1/namespaces/{self.namespace}/deployments/{NAME}"
        evidence = Evidence(
            namespace=await self._cluster.get(self.inside, Namespace),
            deployment=await self._cluster.get(deployments, Deployment),
            pods=await self.list("pods", Pod),
            events=await self.list("events", Event),
            claims=await self.list("persistentvolumeclaims", Claim),
        )
        logs: dict[tuple[str, str], list[str]] = {}
        for pod, name in crashed(evidence):
            try:
                async with self._cluster.logs(self.namespace, pod, name, tail=5, previous=True) as arriving:
                    logs[pod, name] = [line.decode() async for lines in arriving for line in lines]
            except ApiRefused:
                # Its last run is removed already.
                continue
        return diagnose(replace(evidence, previous_logs=logs), RULES, datetime.now(UTC))

    async def list(self, plural: str, kind: Any) -> list[Any]:
        return [one async for page in self._cluster.list(f"{self.inside}/{plural}", kind) for one in page.items]

    async def until(self, state: State, *, but: State, reason: str | None = None) -> Observation:
        """The first observation of the state, for the reason where one is given; none of `but` comes before."""

        async def seen() -> Observation | None:
            last = await self.look()
            assert last.state is not but, last
            return last if last.state is state and reason in (None, last.reason) else None

        return await eventually(seen, within=DEADLINE)


async def begin(stack: AsyncExitStack, cluster: Cluster, *objects: tuple[str, dict[str, Any]]) -> Session:
    """A namespace of ours with the objects, each with the last of its path."""
    namespace = await stack.enter_async_context(removed_after(cluster, str(uuid.uuid4())))
    labels = {INSTANCE: RULES.instance, PROJECT: namespace}
    await cluster.create("/api/v1/namespaces", {"metadata": {"name": namespace, "labels": labels}}, Namespace)
    await eventually(lambda: there(cluster, f"/api/v1/namespaces/{namespace}/serviceaccounts/default"))
    for plural, body in objects:
        group = "/apis/apps/v1" if plural == "deployments" else "/api/v1"
        await cluster.create(f"{group}/namespaces/{namespace}/{plural}", body, Partial)
    return Session(cluster, namespace)


async def at_once(*jobs: Awaitable[None]) -> None:
    """All of them, and what goes wrong with any; each takes its namespace away itself."""
    results = await asyncio.gather(*jobs, return_exceptions=True)
    wrong = [one for one in results if isinstance(one, BaseException)]
    if wrong:
        raise BaseExceptionGroup("cases", wrong)


def quota(**hard: str) -> tuple[str, dict[str, Any]]:
    return "resourcequotas", {
        "metadata": {"name": NAME},
        "spec": {"hard": {k.replace("_", "."): v for k, v in hard.items()}},
    }


def volume(storage_class: str) -> tuple[str, dict[str, Any]]:
    spec = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": storage_class,
        "resources": {"requests": {"storage": "1Mi"}},
    }
    return "persistentvolumeclaims", {"metadata": {"name": NAME}, "spec": spec}


ABSENT = "registry.invalid/team/preview:1"
# What crashes would else count as ready before it does.
UNREADY = {"readinessProbe": {"exec": {"command": ["false"]}}}
REQUESTS = {"requests": {"cpu": "3", "memory": "1Gi"}}
# By name: the deployment, what else there is, the reason, and what is told.
CASES: dict[str, tuple[dict[str, Any], list[tuple[str, dict[str, Any]]], str, str]] = {
    "an image that is not there": (
        deployment({"image": ABSENT}), [], "ImagePull",
        rf"The image {re.escape(ABSENT)} of preview .*; correct the image",
    ),
    "what is no name of an image": (
        deployment({"image": "No Name!"}), [], "InvalidImageName", "No Name! is not the name of an image",
    ),
    "a crash loop": (
        deployment(shell("exec >&2; echo reading the settings; echo 'Error: no module x'; exit 3") | UNREADY), [],
        "CrashLoop",
        "preview ended with exit code 3, 3 times by now, after it wrote “reading the settings\nError: no module x”; ",
    ),
    "a memory hog": (
        deployment({"command": ["tail", "/dev/zero"], "resources": {"limits": {"memory": "16Mi"}}} | UNREADY), [],
        "OOMKilled",
        "preview used more memory than its 16Mi and was killed, 3 times by now; ask for more memory",
    ),
    "a secret without the key": (
        deployment({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "env", "key": "a"}}}]}),
        [("secrets", {"metadata": {"name": "env"}})], "CreateContainerConfigError", "the Secret env has no key a; add",
    ),
    "more cores than there are": (
        deployment({"resources": {"requests": {"cpu": "1000"}}}), [], "Unschedulable", "too little cpu left.*; ask for",
    ),
    "a quota that is too small": (
        deployment({}, containers=[container(resources=REQUESTS)]), [quota(requests_cpu="1", requests_memory="2Gi")],
        "QuotaExceeded", "The quota session-42 .*: requests.cpu 3 requested, 0 of 1 used; ask for less",
    ),
    "a storage class that is not there": (
        deployment({}, volumes=[{"name": "w", "persistentVolumeClaim": {"claimName": NAME}}]), [volume("nowhere")],
        "VolumeNotBound", "The session's volume session-42 .* no storage class nowhere; correct",
    ),
    "a probe that fails": (
        deployment({"readinessProbe": {"httpGet": {"path": "/", "port": 3000}, "periodSeconds": 1}}, deadline=10), [],
        "ProbeFailing", "preview does not pass its readiness probe .*refused.*; look at its output",
    ),
    "an init container that fails": (
        deployment({}, initContainers=[container("clone", **shell("echo fatal: no repository >&2; exit 128"))]), [],
        "CrashLoop", "The init container clone ended with exit code 128, .*“fatal: no repository”; ",
    ),
    "a command that is not there": (
        deployment({"command": ["no-such-command", "--now"]}), [], "CommandNotFound",
        "The command no-such-command of preview is not in its image; correct",
    ),
}  # fmt: skip


async def test_what_keeps_a_session_from_running_is_told(cluster: Cluster) -> None:
    async def case(name: str) -> None:
        body, objects, reason, message = CASES[name]
        async with AsyncExitStack() as stack:
            session = await begin(stack, cluster, *objects, ("deployments", body))
            failed = await session.until(State.FAILED, but=State.RUNNING, reason=reason)
            assert re.search(message, failed.message, re.DOTALL), (name, failed)
            assert failed.message.endswith("."), (name, failed)

    await at_once(*map(case, CASES))


async def test_a_pod_that_is_taken_away_is_replaced_and_no_failure(cluster: Cluster) -> None:
    # Ready only after a moment, so that the one who looks sees that it is not.
    slow = {"readinessProbe": {"exec": {"command": ["true"]}, "initialDelaySeconds": 2, "periodSeconds": 1}}

    async def case(take: Callable[[Session, str], Awaitable[None]]) -> None:
        async with AsyncExitStack() as stack:
            session = await begin(stack, cluster, ("deployments", deployment(slow)))
            await session.until(State.RUNNING, but=State.FAILED)
            [before] = await session.list("pods", Pod)
            await take(session, before.metadata.name)
            await session.until(State.STARTING, but=State.FAILED)
            await session.until(State.RUNNING, but=State.FAILED)
            running = [one for one in await session.list("pods", Pod) if one.metadata.deletion_timestamp is None]
            assert [one.metadata.uid != before.metadata.uid for one in running] == [True]

    async def by_hand(session: Session, pod: str) -> None:
        await cluster.delete(f"{session.inside}/pods/{pod}")

    async def evicted(session: Session, pod: str) -> None:
        for version in ("policy/v1", "policy/v1beta1"):
            body = {
                "apiVersion": version,
                "kind": "Eviction",
                "metadata": {"name": pod, "namespace": session.namespace},
            }
            try:
                await cluster.create(f"{session.inside}/pods/{pod}/eviction", body, Partial)
            except ApiRefused as error:
                # 1.20 does not know the first, today's clusters not the second.
                if version == "policy/v1" and error.status in (400, 404, 415):
                    continue
                raise
            return

    await at_once(case(by_hand), case(evicted))
