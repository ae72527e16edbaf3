"""What a session's namespace shows, as an Observation: pure functions over Kubernetes' objects as they were last seen.

A diagnosis may change without any object changing, since some troubles are given time to pass: whoever holds a session
that is `starting` asks again now and then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from orchestrator.cluster.objects import (
    INSTANCE,
    PROJECT,
    ContainerStatus,
    Deployment,
    Namespace,
    Pod,
)
from orchestrator.providers import symptoms
from orchestrator.providers.contract import Observation, State
from orchestrator.providers.evidence import (
    Evidence,
    Rules,
    age,
    condition_of,
    is_active,
    is_ready,
    last_seen,
    latest,
    node_of,
    seconds,
    serves,
    span,
    statuses_of,
)
from orchestrator.providers.symptoms import api_failure, plain, quoted
from orchestrator.providers.troubles import (
    CONFIRMED,
    CRASHES,
    Trouble,
    exit_of,
    image_of,
    troubles_of,
    unsettled,
    waiting_for,
    waits,
)

__all__ = ["Evidence", "Rules", "api_failure", "crashed", "diagnose", "summary"]


def diagnose(evidence: Evidence, rules: Rules, now: datetime) -> Observation:
    """What the session is and why; endpoints are filled in by the caller. Never raises."""
    away = _away(evidence, rules)
    if away is not None:
        return away
    deployment = evidence.deployment
    assert deployment is not None  # noqa: S101 - `_away` has looked
    if _rolling(deployment):
        return Observation(State.STARTING, "Starting", "Kubernetes is taking up what was changed.")
    pods = _current(evidence, deployment)
    active = [one for one in pods if is_active(one)]
    wanted = deployment.spec.replicas
    flapping = next((one for pod in active for one in unsettled(pod, evidence, now)), None)
    settled = deployment.status.updated_replicas >= wanted and flapping is None
    if settled and sum(serves(pod, now) for pod in active) >= wanted:
        return Observation(State.RUNNING, "Ready", "The session is running.")
    troubles = [one for pod in active if not is_ready(pod) for one in troubles_of(pod, evidence, rules, now)]
    if not active:
        troubles += _refused(deployment, rules)
    troubles += _given_up(pods, rules, now)
    if flapping is not None:
        troubles.append(flapping)
    overdue = _overdue(deployment, active, rules, now)
    for trouble in troubles:
        if _failed(trouble, rules, now, overdue=overdue):
            return Observation(State.FAILED, trouble.reason, trouble.message)
    if troubles:
        first = troubles[0]
        return Observation(State.STARTING, *(first.meanwhile or (first.reason, first.message)))
    reason, message = _progress(active, pods, evidence)
    if overdue:
        what = plain(message, 500)
        return Observation(
            State.FAILED,
            "NoProgress",
            f"The session has made no progress for {span(rules.progress_deadline)}, the last was: {what};"
            " start it again, or have an operator look at the cluster.",
        )
    return Observation(State.STARTING, reason, message)


def crashed(evidence: Evidence) -> list[tuple[str, str]]:
    """Pod and container of those whose crashed run's last lines would tell more."""
    if evidence.deployment is None:
        return []
    return [
        (pod.metadata.name, status.name)
        for pod in _current(evidence, evidence.deployment)
        if is_active(pod)
        for status in (*pod.status.init_container_statuses, *pod.status.container_statuses)
        if not status.ready
        and status.last_state.terminated is not None
        and status.last_state.terminated.reason not in ("StartError", "ContainerCannotRun")
        and status.state.terminated is None
    ]


def summary(pod: Pod) -> dict[str, Any]:
    """The part of a pod that people see: of two that differ only in what nobody sees, the summaries are equal."""
    reason, message = pod.status.reason, pod.status.message
    scheduled = condition_of(pod.status.conditions, "PodScheduled")
    if pod.metadata.deletion_timestamp is not None:
        reason = reason or "Terminating"
    elif not reason and scheduled is not None and scheduled.status == "False":
        reason, message = scheduled.reason, scheduled.message
    return {
        "phase": pod.status.phase,
        "ready": is_ready(pod),
        "node": pod.spec.node_name,
        "reason": reason,
        "message": plain(message),
        "containers": [_visible(status, init=init) for status, init in statuses_of(pod)],
    }


def _visible(status: ContainerStatus, *, init: bool) -> dict[str, Any]:
    state = status.state
    word, reason, message, told, ended = "unknown", "", "", "", None
    if state.waiting is not None:
        word, reason, message = "waiting", state.waiting.reason, state.waiting.message
        ended = status.last_state.terminated
    elif state.running is not None:
        word = "running"
    elif state.terminated is not None:
        word, reason, message, ended = "terminated", state.terminated.reason, state.terminated.message, state.terminated
    if reason == "CrashLoopBackOff" and ended is not None:
        # Which back-off it is, and of which pod, tells people nothing.
        message = ended.message
        told = f"The last time it ended with {exit_of(ended)}."
    return {
        "name": status.name,
        "init": init,
        "ready": status.ready,
        "state": word,
        "reason": reason,
        "message": plain(message) or told,
        "restarts": status.restart_count,
        "exit_code": None if ended is None else ended.exit_code,
    }


# -- the namespace and its deployment


def _away(evidence: Evidence, rules: Rules) -> Observation | None:
    """When nothing is to run here: why."""
    namespace, deployment = evidence.namespace, evidence.deployment
    if namespace is not None:
        name, labels = namespace.metadata.name, namespace.metadata.labels
        if labels.get(INSTANCE) != rules.instance or labels.get(PROJECT) != name:
            return Observation(
                State.ABSENT,
                "NamespaceTaken",
                f"The namespace {name} does not belong to this Cluster Code (instance {plain(rules.instance)}); remove"
                " it, or have an operator label it.",
            )
        if namespace.status.phase == "Terminating" or namespace.metadata.deletion_timestamp is not None:
            return Observation(State.ABSENT, "NamespaceTerminating", _terminating(namespace))
    if deployment is None:
        there = (
            "There is nothing of it here." if namespace is None else "Its namespace is there, and nothing runs in it."
        )
        return Observation(State.ABSENT, "Absent", there)
    if deployment.metadata.deletion_timestamp is not None:
        return Observation(State.ABSENT, "Absent", "Its deployment is being deleted.")
    if deployment.spec.replicas == 0:
        left = sum(one.status.phase not in ("Failed", "Succeeded") for one in _owned(evidence, deployment))
        if left:
            return Observation(State.STOPPED, "Stopping", "Its containers are being ended.")
        return Observation(State.STOPPED, "Stopped", "Its files are there; nothing runs.")
    return None


def _terminating(namespace: Namespace) -> str:
    held = {one.type: one.message for one in namespace.status.conditions if one.status == "True"}
    # The discovery of a broken API keeps every namespace; a finalizer is more than what it keeps.
    for one in (
        "NamespaceDeletionDiscoveryFailure",
        "NamespaceDeletionGroupVersionParsingFailure",
        "NamespaceFinalizersRemaining",
        "NamespaceContentRemaining",
        "NamespaceDeletionContentFailure",
    ):
        if one in held:
            return (
                f"The namespace {namespace.metadata.name} is being deleted and waits{quoted(held[one])}; if it stays"
                " so, have an operator look at what is left in it."
            )
    return f"The namespace {namespace.metadata.name} is being deleted; the session can be started again afterwards."


def _rolling(deployment: Deployment) -> bool:
    """Whether what is seen is still of what was wanted before.

    With the strategy Recreate the old replica set is scaled to zero first: until there is a new one no replica is
    missing, and the pods and conditions that are left speak of the old one.
    """
    status = deployment.status
    if status.observed_generation < deployment.metadata.generation:
        return True
    return status.updated_replicas == 0 and status.unavailable_replicas == 0


_REPLICA_SET = re.compile(r'replica ?set "([^"]+)"', re.IGNORECASE)


def _owned(evidence: Evidence, deployment: Deployment) -> list[Pod]:
    prefix = f"{deployment.metadata.name}-"
    return [one for one in evidence.pods if _replica_set(one).startswith(prefix)]


def _current(evidence: Evidence, deployment: Deployment) -> list[Pod]:
    """The pods of the newest replica set, the newest first: those of older ones decide nothing."""
    pods = sorted(_owned(evidence, deployment), key=_created, reverse=True)
    newest = _newest(deployment) or (_replica_set(pods[0]) if pods else "")
    return [one for one in pods if _replica_set(one) == newest]


def _newest(deployment: Deployment) -> str:
    """The name of its newest replica set, "" where Kubernetes does not tell."""
    progressing = condition_of(deployment.status.conditions, "Progressing")
    named = _REPLICA_SET.search(progressing.message) if progressing is not None else None
    return named[1] if named is not None else ""


def _replica_set(pod: Pod) -> str:
    """The name of its replica set; "": it has none, such as a pod that somebody made by hand."""
    return next((one.name for one in pod.metadata.owner_references if one.kind == "ReplicaSet"), "")


def _created(pod: Pod) -> tuple[float, str]:
    return seconds(pod.metadata.creation_timestamp), pod.metadata.name


def _refused(deployment: Deployment, rules: Rules) -> Iterator[Trouble]:
    """Why no pod can be made: the condition is Kubernetes' own summary of its replica set's FailedCreate events."""
    failure = condition_of(deployment.status.conditions, "ReplicaFailure")
    # For a moment it is still that of an older one, whose name is the beginning of its pods'.
    if failure is None or failure.status != "True" or _newest(deployment) not in failure.message:
        return
    found = symptoms.refusal(failure.message)
    wait = rules.transient_grace if found.passing else CONFIRMED
    words = (failure.reason, found.reason)
    yield Trouble(found.reason, found.message, words, wait, failure.last_transition_time)


def _overdue(deployment: Deployment, active: Sequence[Pod], rules: Rules, now: datetime) -> bool:
    """Whether it has made no progress for too long: Kubernetes says so of a rollout, and of what ran before we do."""
    progressing = condition_of(deployment.status.conditions, "Progressing")
    if progressing is not None and progressing.status == "False" and progressing.reason == "ProgressDeadlineExceeded":
        return True
    if active:
        ready = condition_of(active[0].status.conditions, "Ready")
        if ready is not None and ready.status == "True":
            return False
        since = (ready.last_transition_time if ready is not None else None) or active[0].metadata.creation_timestamp
    else:
        available = condition_of(deployment.status.conditions, "Available")
        since = available.last_transition_time if available is not None and available.status == "False" else None
    return since is not None and age(since, now) >= rules.progress_deadline


def _failed(trouble: Trouble, rules: Rules, now: datetime, *, overdue: bool) -> bool:
    wait = trouble.wait
    if wait is None:
        return overdue
    if not rules.transient_reasons.isdisjoint(trouble.words):
        wait = max(wait, rules.transient_grace)
    if wait <= 0:
        return True
    return overdue if trouble.since is None else age(trouble.since, now) >= wait


# -- pods


def _given_up(pods: Sequence[Pod], rules: Rules, now: datetime) -> Iterator[Trouble]:
    """Pods that failed one after the other."""
    failed = [
        one
        for one in pods
        if one.status.phase == "Failed"
        and one.metadata.creation_timestamp is not None
        and age(one.metadata.creation_timestamp, now) < rules.progress_deadline
    ]
    if len(failed) >= CRASHES and not any(map(is_ready, pods)):
        reason, what = _ended(failed[0])
        told = (
            f"{what}, {len(failed)} times in a row; ask for more memory and disk in the machine config, or have an"
            " operator look at the nodes."
        )
        yield Trouble(reason, told, (reason,))


_DISRUPTIONS = {
    "PreemptionByScheduler": ("Preempted", "had to make room for one of higher priority"),
    "EvictionByEvictionAPI": ("Evicted", "was evicted"),
    "DeletionByTaintManager": ("NodeLost", "was taken off its node, which is not well"),
    "DeletionByPodGC": ("NodeLost", "was removed, since its node is gone"),
    "TerminationByKubelet": ("Evicted", "was ended by its node"),
}
_REASONS = {
    "Evicted": ("Evicted", "was evicted"),
    "NodeLost": ("NodeLost", "was lost with its node"),
    "Preempting": ("Preempted", "had to make room for one of higher priority"),
    "Terminated": ("NodeShutdown", "was ended, since its node shuts down"),
    "NodeShutdown": ("NodeShutdown", "was ended, since its node shuts down"),
    "Shutdown": ("NodeShutdown", "was ended, since its node shuts down"),
}


def _ended(pod: Pod, evidence: Evidence | None = None) -> tuple[str, str]:
    """Reason and half a sentence: why a pod is there no more."""
    disrupted = condition_of(pod.status.conditions, "DisruptionTarget")
    known = _REASONS.get(pod.status.reason)
    if known is None and disrupted is not None and disrupted.status == "True":
        known = _DISRUPTIONS.get(disrupted.reason)
    if known is None and evidence is not None:
        event = latest(evidence, pod, "Preempted", "TaintManagerEviction", "NodeNotReady", "Evicted")
        by_event = {"Preempted": "Preempting", "Evicted": "Evicted"}
        known = _REASONS[by_event.get(event.reason, "NodeLost")] if event is not None else None
    where = f" (node {node_of(pod)})" if pod.spec.node_name else ""
    if known is not None:
        why = f": {plain(pod.status.message)}" if pod.status.message else ""
        return known[0], f"The session's pod {known[1]}{where}{why}"
    if pod.status.phase == "Failed":
        return plain(pod.status.reason) or "PodFailed", f"The session's pod failed{where}{quoted(pod.status.message)}"
    return "Replacing", "The session's pod was deleted"


# -- progress


def _progress(active: Sequence[Pod], pods: Sequence[Pod], evidence: Evidence) -> tuple[str, str]:
    """Reason and sentence of a start that goes well."""
    step = _step(active[0], evidence) if active else ("Starting", "Kubernetes is making the session's pod.")
    # A pod that has just ended is why there is a new one; one that failed may stay for days, and says nothing.
    before = next((one for one in pods if not is_active(one)), None)
    if before is None or (active and seconds(active[0].metadata.creation_timestamp) > _until(before, evidence) + 60):
        return step
    reason, what = _ended(before, evidence)
    return reason, f"{what}, and is being replaced: {step[1]}"


def _until(pod: Pod, evidence: Evidence) -> float:
    """When a pod ended, as far as that is known."""
    disrupted = condition_of(pod.status.conditions, "DisruptionTarget")
    event = latest(evidence, pod, "Evicted", "Preempted", "Killing")
    return max(
        seconds(pod.metadata.deletion_timestamp),
        seconds(disrupted.last_transition_time if disrupted is not None else None),
        seconds(last_seen(event) if event is not None else None),
        *(seconds(one.state.terminated.finished_at) for one in pod.status.container_statuses if one.state.terminated),
    )


def _step(pod: Pod, evidence: Evidence) -> tuple[str, str]:
    if not pod.spec.node_name:
        return "Scheduling", "Looking for a node that has room for the session."
    for status, init in statuses_of(pod):
        if init and status.state.running is not None:
            return "Initializing", f"The init container {status.name} is running."
        event = latest(evidence, pod, "Pulling", "Pulled", "Failed", container=status.name)
        if waits(status) and event is not None and event.reason == "Pulling":
            return "Pulling", f"Pulling the image {plain(image_of(pod, status))} of {status.name}."
    if any(status.state.running is not None for status in pod.status.container_statuses):
        return "Starting", f"{waiting_for(pod)}."
    return "Creating", f"The containers are being made on the node {node_of(pod)}."
