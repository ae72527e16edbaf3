"""What a session's namespace shows, as an Observation: pure functions over Kubernetes' objects as they were last seen.

A diagnosis may change without any object changing, since some troubles are given time to pass: whoever holds a session
that is `starting` asks again now and then.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from orchestrator.cluster.objects import (
    INSTANCE,
    PROJECT,
    Claim,
    Condition,
    Container,
    ContainerStatus,
    Deployment,
    Event,
    Namespace,
    Pod,
    Terminated,
)
from orchestrator.providers import symptoms
from orchestrator.providers.contract import Observation, State
from orchestrator.providers.symptoms import Pull, api_failure, plain, quoted

__all__ = ["Evidence", "Rules", "api_failure", "crashed", "diagnose", "summary"]

# A container that was started anew so often, and crashed again, will not come up by itself.
CRASHES = 3
# Seconds that such a container must have been up for, to be believed again.
_SETTLED = 10.0
# Seconds after which what usually heals in a moment (a quota that counts a pod which is just gone, for instance) stays.
_CONFIRMED = 5.0
# Seconds after which a crash says nothing of what keeps a container from being ready now.
_RECENT = 300.0
# Of the last lines of a crashed container, so many are told, and so many bytes.
_LINES, _LINES_LIMIT = 5, 500
# Waiting for nothing but its turn.
_ON_ITS_WAY = frozenset({"", "ContainerCreating", "PodInitializing"})
_PULLING = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable"})
_SCALING = frozenset({"TriggeredScaleUp", "Nominated"})


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of one namespace, as last seen."""

    namespace: Namespace | None
    deployment: Deployment | None
    pods: Sequence[Pod] = ()
    events: Sequence[Event] = ()
    claims: Sequence[Claim] = ()
    # By pod and container: the last lines of its crashed run.
    previous_logs: Mapping[tuple[str, str], Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator says, see `options.KubernetesOptions`. All times are in seconds."""

    # Reasons of events and of waiting containers that do not fail a session before the grace is over.
    transient_reasons: frozenset[str]
    transient_grace: float
    progress_deadline: float
    instance: str


@dataclass(frozen=True, slots=True)
class _Trouble:
    """What keeps a session from running. It has failed once `since` is `wait` seconds ago; None: by its deadline."""

    reason: str
    message: str
    # Kubernetes' own words for it, which `transient_reasons` may list.
    words: tuple[str, ...] = ()
    wait: float | None = 0.0
    since: datetime | None = None
    # Reason and message as long as it has not failed.
    meanwhile: tuple[str, str] | None = None


def diagnose(evidence: Evidence, rules: Rules, now: datetime) -> Observation:
    """What the session is and why; endpoints are filled in by the caller. Never raises."""
    away = _away(evidence, rules)
    if away is not None:
        return away
    deployment = evidence.deployment
    assert deployment is not None  # noqa: S101 - `_away` has looked
    pods = _current(evidence, deployment)
    active = [one for one in pods if _active(one)]
    wanted = deployment.spec.replicas
    unsettled = next((one for pod in active for one in _unsettled(pod, evidence, now)), None)
    settled = deployment.status.updated_replicas >= wanted and unsettled is None
    if settled and not _rolling(deployment) and sum(map(_ready, active)) >= wanted:
        return Observation(State.RUNNING, "Ready", "The session is running.")
    if _rolling(deployment):
        return Observation(State.STARTING, "Starting", "Kubernetes is taking up what was changed.")
    troubles = [one for pod in active if not _ready(pod) for one in _troubles(pod, evidence, rules, now)]
    if not active:
        troubles += _refused(deployment, rules)
    troubles += _given_up(pods, rules, now)
    if unsettled is not None:
        troubles.append(unsettled)
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
            f"The session has made no progress for {_span(rules.progress_deadline)}, the last was: {what};"
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
        if _active(pod)
        for status in (*pod.status.init_container_statuses, *pod.status.container_statuses)
        if not status.ready
        and status.last_state.terminated is not None
        and status.last_state.terminated.reason not in ("StartError", "ContainerCannotRun")
        and status.state.terminated is None
    ]


def summary(pod: Pod) -> dict[str, Any]:
    """The part of a pod that people see: of two that differ only in what nobody sees, the summaries are equal."""
    reason, message = pod.status.reason, pod.status.message
    scheduled = _condition(pod.status.conditions, "PodScheduled")
    if pod.metadata.deletion_timestamp is not None:
        reason = reason or "Terminating"
    elif not reason and scheduled is not None and scheduled.status == "False":
        reason, message = scheduled.reason, scheduled.message
    return {
        "phase": pod.status.phase,
        "ready": _ready(pod),
        "node": pod.spec.node_name,
        "reason": reason,
        "message": plain(message),
        "containers": [_visible(status, init=init) for status, init in _statuses(pod)],
    }


def _visible(status: ContainerStatus, *, init: bool) -> dict[str, Any]:
    state = status.state
    word, reason, message, ended = "unknown", "", "", None
    if state.waiting is not None:
        word, reason, message = "waiting", state.waiting.reason, state.waiting.message
        ended = status.last_state.terminated
    elif state.running is not None:
        word = "running"
    elif state.terminated is not None:
        word, reason, message, ended = "terminated", state.terminated.reason, state.terminated.message, state.terminated
    if reason == "CrashLoopBackOff" and ended is not None:
        # Which back-off it is, and of which pod, tells people nothing.
        message = ended.message or f"The last time it ended with {_exit(ended)}."
    return {
        "name": status.name,
        "init": init,
        "ready": status.ready,
        "state": word,
        "reason": reason,
        "message": plain(message),
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
    progressing = _condition(deployment.status.conditions, "Progressing")
    named = _REPLICA_SET.search(progressing.message) if progressing is not None else None
    return named[1] if named is not None else ""


def _replica_set(pod: Pod) -> str:
    """The name of its replica set; "": it has none, such as a pod that somebody made by hand."""
    return next((one.name for one in pod.metadata.owner_references if one.kind == "ReplicaSet"), "")


def _created(pod: Pod) -> tuple[float, str]:
    return _seconds(pod.metadata.creation_timestamp), pod.metadata.name


def _refused(deployment: Deployment, rules: Rules) -> Iterator[_Trouble]:
    """Why no pod can be made: the condition is Kubernetes' own summary of its replica set's FailedCreate events."""
    failure = _condition(deployment.status.conditions, "ReplicaFailure")
    # For a moment it is still that of an older one, whose name is the beginning of its pods'.
    if failure is None or failure.status != "True" or _newest(deployment) not in failure.message:
        return
    found = symptoms.refusal(failure.message)
    wait = rules.transient_grace if found.passing else _CONFIRMED
    words = (failure.reason, found.reason)
    yield _Trouble(found.reason, found.message, words, wait, failure.last_transition_time)


def _overdue(deployment: Deployment, active: Sequence[Pod], rules: Rules, now: datetime) -> bool:
    """Whether it has made no progress for too long: Kubernetes says so of a rollout, and of what ran before we do."""
    progressing = _condition(deployment.status.conditions, "Progressing")
    if progressing is not None and progressing.status == "False" and progressing.reason == "ProgressDeadlineExceeded":
        return True
    if active:
        ready = _condition(active[0].status.conditions, "Ready")
        unready = ready.last_transition_time if ready is not None and ready.status != "True" else None
        since = unready or active[0].metadata.creation_timestamp
    else:
        available = _condition(deployment.status.conditions, "Available")
        since = available.last_transition_time if available is not None and available.status == "False" else None
    return since is not None and _age(since, now) >= rules.progress_deadline


def _failed(trouble: _Trouble, rules: Rules, now: datetime, *, overdue: bool) -> bool:
    wait = trouble.wait
    if wait is None:
        return overdue
    if not rules.transient_reasons.isdisjoint(trouble.words):
        wait = max(wait, rules.transient_grace)
    if wait <= 0:
        return True
    return overdue if trouble.since is None else _age(trouble.since, now) >= wait


# -- pods


def _active(pod: Pod) -> bool:
    return pod.metadata.deletion_timestamp is None and pod.status.phase not in ("Failed", "Succeeded")


def _ready(pod: Pod) -> bool:
    """As Kubernetes counts it: also not when its node is lost, though each container was ready when last heard of."""
    condition = _condition(pod.status.conditions, "Ready")
    return condition is not None and condition.status == "True" and pod.status.phase == "Running"


def _troubles(pod: Pod, evidence: Evidence, rules: Rules, now: datetime) -> Iterator[_Trouble]:
    """What keeps a pod from being ready: what is most particular first, containers in their order."""
    scheduled = _condition(pod.status.conditions, "PodScheduled")
    if scheduled is not None and scheduled.status == "False":
        yield from _unscheduled(pod, scheduled, evidence, rules)
        return
    for status, init in _statuses(pod):
        yield from _container(pod, status, evidence, rules, init=init)
    if any(_waits(status) for status, _ in _statuses(pod)):
        yield from _setup(pod, evidence, rules)
    yield from _probes(pod, evidence)
    yield from _revived(pod, evidence, now)
    if pod.status.container_statuses and all(one.ready for one in pod.status.container_statuses):
        yield from _lost(pod, evidence)


def _unscheduled(pod: Pod, scheduled: Condition, evidence: Evidence, rules: Rules) -> Iterator[_Trouble]:
    message = scheduled.message
    if symptoms.unbound(message):
        yield from _volumes(evidence, rules)
    if scheduled.reason == "SchedulingGated":
        told = "The session's pod is held back by a scheduling gate; have an operator find out who lifts it."
        yield _Trouble("SchedulingGated", told, ("SchedulingGated",), None)
        return
    what, do = symptoms.unschedulable(message)
    words = ("FailedScheduling", "Unschedulable")
    since = scheduled.last_transition_time or pod.metadata.creation_timestamp
    scaling = _latest(evidence, pod, *_SCALING, "NotTriggerScaleUp")
    if scaling is not None and scaling.reason in _SCALING:
        wait, since = max(rules.transient_grace, rules.progress_deadline), _last_seen(scaling)
        meanwhile = ("ScalingUp", f"{what}; the cluster's autoscaler is adding a node.")
        yield _Trouble(
            "Unschedulable", f"{what}; the autoscaler brought none in time; {do}", words, wait, since, meanwhile
        )
        return
    unhelped = ", and the cluster's autoscaler adds none" if scaling is not None else ""
    yield _Trouble("Unschedulable", f"{what}{unhelped}; {do}", words, _CONFIRMED, since)


def _volumes(evidence: Evidence, rules: Rules) -> Iterator[_Trouble]:
    for claim in sorted(evidence.claims, key=lambda one: one.metadata.name):
        if claim.status.phase == "Bound":
            continue
        name = plain(claim.metadata.name)
        if claim.status.phase == "Lost":
            told = (
                f"The volume of the session's claim {name} is lost; have an operator restore it or delete the session."
            )
            yield _Trouble("VolumeNotBound", told)
            continue
        event = _latest(evidence, claim, "ProvisioningFailed", "FailedBinding")
        meanwhile = ("VolumeNotBound", f"Waiting until the session's volume {name} is made.")
        if event is None:
            told = (
                f"The session's volume {name} is not there after {_span(rules.progress_deadline)}; have an operator"
                " look at its claim and storage class."
            )
            yield _Trouble("VolumeNotBound", told, (), None, None, meanwhile)
            continue
        message, lasting = symptoms.volume_failure(name, event.message)
        wait = _CONFIRMED if lasting else rules.transient_grace
        yield _Trouble("VolumeNotBound", message, (event.reason,), wait, _first_seen(event))


def _setup(pod: Pod, evidence: Evidence, rules: Rules) -> Iterator[_Trouble]:
    """What the node cannot do before any container can be made."""
    event = _latest(evidence, pod, "FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "FailedMapVolume")
    if event is None or (_count(event) < 2 and symptoms.passing(event.message)):
        return
    since = _first_seen(event)
    if event.reason == "FailedCreatePodSandBox":
        told = (
            f"The node {_node(pod)} cannot set up the session's pod{quoted(event.message)}; have an operator look at"
            " its network plugin."
        )
        yield _Trouble("PodSandbox", told, (event.reason,), rules.transient_grace, since)
        return
    missing = symptoms.mount_missing(event.message)
    wait = _CONFIRMED if missing else rules.transient_grace
    yield _Trouble("VolumeMount", symptoms.mount_failure(event.message), (event.reason,), wait, since)


def _probes(pod: Pod, evidence: Evidence) -> Iterator[_Trouble]:
    """Containers that run and do not answer. Most are only about to: they fail by the deadline."""
    for status in _in_order(pod, pod.status.container_statuses):
        running = status.state.running
        if running is None or status.ready:
            continue
        event = _latest(evidence, pod, "Unhealthy", container=status.name)
        if event is None or _seconds(_last_seen(event)) < _seconds(running.started_at):
            continue
        probe, answer = symptoms.probe(event.message)
        meanwhile = ("Starting", f"{_waiting_for(pod)} ({probe} probe of {status.name}: {answer}).")
        told = (
            f"{status.name} does not pass its {probe} probe ({answer}); look at its output, or correct its `port` and"
            " `ready` in the machine config."
        )
        yield _Trouble("ProbeFailing", told, ("Unhealthy",), None, None, meanwhile)


def _revived(pod: Pod, evidence: Evidence, now: datetime) -> Iterator[_Trouble]:
    """Containers that run again after a crash and are not ready yet."""
    for status in _in_order(pod, pod.status.container_statuses):
        last = status.last_state.terminated
        if status.state.running is None or status.ready or last is None or last.finished_at is None:
            continue
        if _age(last.finished_at, now) < _RECENT:
            yield _crash(pod, status, last, evidence, status.name)


def _lost(pod: Pod, evidence: Evidence) -> Iterator[_Trouble]:
    ready = _condition(pod.status.conditions, "Ready")
    if ready is not None and ready.reason == "ReadinessGatesNotReady":
        told = (
            f"The containers are ready, but not all readiness gates are open{quoted(ready.message)}; ask an operator."
        )
        yield _Trouble("ReadinessGate", told, (), None)
    elif (ready is not None and ready.status == "Unknown") or _latest(evidence, pod, "NodeNotReady") is not None:
        told = (
            f"The node {_node(pod)} of the session does not answer; wait until Kubernetes moves the session, or have an"
            " operator look at the node."
        )
        yield _Trouble("NodeLost", told, ("NodeNotReady",), None)


def _given_up(pods: Sequence[Pod], rules: Rules, now: datetime) -> Iterator[_Trouble]:
    """Pods that failed one after the other."""
    failed = [
        one
        for one in pods
        if one.status.phase == "Failed"
        and one.metadata.creation_timestamp is not None
        and _age(one.metadata.creation_timestamp, now) < rules.progress_deadline
    ]
    if len(failed) >= CRASHES and not any(map(_ready, pods)):
        reason, what = _ended(failed[0])
        told = (
            f"{what}, {len(failed)} times in a row; ask for more memory and disk in the machine config, or have an"
            " operator look at the nodes."
        )
        yield _Trouble(reason, told, (reason,))


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
    disrupted = _condition(pod.status.conditions, "DisruptionTarget")
    known = _REASONS.get(pod.status.reason)
    if known is None and disrupted is not None and disrupted.status == "True":
        known = _DISRUPTIONS.get(disrupted.reason)
    if known is None and evidence is not None:
        event = _latest(evidence, pod, "Preempted", "TaintManagerEviction", "NodeNotReady", "Evicted")
        by_event = {"Preempted": "Preempting", "Evicted": "Evicted"}
        known = _REASONS[by_event.get(event.reason, "NodeLost")] if event is not None else None
    where = f" (node {_node(pod)})" if pod.spec.node_name else ""
    if known is not None:
        why = f": {plain(pod.status.message)}" if pod.status.message else ""
        return known[0], f"The session's pod {known[1]}{where}{why}"
    if pod.status.phase == "Failed":
        return plain(pod.status.reason) or "PodFailed", f"The session's pod failed{where}{quoted(pod.status.message)}"
    return "Replacing", "The session's pod was deleted"


# -- containers


def _statuses(pod: Pod) -> list[tuple[ContainerStatus, bool]]:
    """Each with whether it is an init container, in the order of the pod's specification."""
    inits = [(one, True) for one in _in_order(pod, pod.status.init_container_statuses)]
    return inits + [(one, False) for one in _in_order(pod, pod.status.container_statuses)]


def _in_order(pod: Pod, statuses: Sequence[ContainerStatus]) -> list[ContainerStatus]:
    order = {one.name: number for number, one in enumerate((*pod.spec.init_containers, *pod.spec.containers))}
    return sorted(statuses, key=lambda one: order.get(one.name, len(order)))


def _image(pod: Pod, status: ContainerStatus) -> str:
    """As it was asked for: the status has it as the node knows it."""
    return _asked(pod, status).image or status.image or "(none)"


def _asked(pod: Pod, status: ContainerStatus) -> Container:
    """The container as it was asked for."""
    asked = (one for one in (*pod.spec.init_containers, *pod.spec.containers) if one.name == status.name)
    return next(asked, Container())


def _waits(status: ContainerStatus) -> bool:
    waiting = status.state.waiting
    return waiting is not None and waiting.reason in _ON_ITS_WAY


def _container(
    pod: Pod, status: ContainerStatus, evidence: Evidence, rules: Rules, *, init: bool
) -> Iterator[_Trouble]:
    who = f"The init container {status.name}" if init else status.name
    waiting, ended = status.state.waiting, status.state.terminated
    if ended is not None:
        if not (init and ended.exit_code == 0):
            yield _crash(pod, status, ended, evidence, who)
    elif waiting is None or waiting.reason in _ON_ITS_WAY:
        return
    elif waiting.reason in _PULLING:
        yield _pull(pod, status, evidence, rules)
    elif waiting.reason == "CrashLoopBackOff":
        yield _crash(pod, status, status.last_state.terminated or Terminated(), evidence, who)
    else:
        yield _unmade(pod, status, rules, who)


def _pull(pod: Pod, status: ContainerStatus, evidence: Evidence, rules: Rules) -> _Trouble:
    waiting = status.state.waiting
    assert waiting is not None  # noqa: S101 - by its caller
    failures = [
        one
        for one in _events(evidence, pod, "Failed", container=status.name)
        if one.message.startswith("Failed to pull image")
    ]
    event = max(failures, key=lambda one: _seconds(_last_seen(one)), default=None)
    said = waiting.message
    if event is not None and (not said or (said.startswith("Back-off") and ": " not in said)):
        said = event.message
    kind = symptoms.pull(said)
    image = _image(pod, status)
    since = min((_first_seen(one) or _NEVER for one in failures), default=pod.metadata.creation_timestamp)
    if kind is Pull.BUSY:
        wait = rules.transient_grace
    else:
        # A registry that cannot be reached is tried a second time before it is believed.
        tried = waiting.reason != "ErrImagePull" or any(_count(one) > 1 for one in failures)
        wait = 0.0 if kind.final or tried else 2 * _CONFIRMED
    return _Trouble(
        "ImagePull",
        symptoms.pull_failure(status.name, image, kind, said),
        ("ErrImagePull", "ImagePullBackOff"),
        wait,
        since,
        None if wait == 0.0 else ("ImagePull", f"Trying again to pull the image {plain(image)} of {status.name}."),
    )


def _unmade(pod: Pod, status: ContainerStatus, rules: Rules, who: str) -> _Trouble:
    """A container that cannot be made."""
    waiting = status.state.waiting
    assert waiting is not None  # noqa: S101 - by its caller
    reason, image = waiting.reason, plain(_image(pod, status))
    wait = 0.0
    match reason:
        case "InvalidImageName":
            what = f"{image} is not the name of an image (of {status.name}); correct the image in the machine config."
        case "ErrImageNeverPull":
            what = (
                f"The image {image} of {status.name} is not on the node, and `imagePullPolicy` forbids to pull it;"
                " correct the one or the other in the machine config."
            )
        case "SignatureValidationFailed":
            what = (
                f"The signature of the image {image} of {status.name} is not accepted by the cluster;"
                " choose an image that is signed, or ask an operator."
            )
        case "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError":
            command = symptoms.command_failure(who, waiting.message)
            if command is not None:
                return _Trouble("CommandNotFound", command, (reason,))
            what = symptoms.configuration_failure(who, waiting.message)
            wait = rules.transient_grace if symptoms.passing(waiting.message) else 0.0
        case _:
            # Unknown words are given time: Kubernetes adds some with most versions.
            what = f"{who} is held up: {plain(reason)}{quoted(waiting.message)}; ask an operator."
            wait = rules.transient_grace
    return _Trouble(plain(reason), what, (reason,), wait, pod.metadata.creation_timestamp)


def _crash(pod: Pod, status: ContainerStatus, last: Terminated, evidence: Evidence, who: str) -> _Trouble:
    """A container that ended: Kubernetes starts it again, at growing intervals."""
    words = ("CrashLoopBackOff", "BackOff")
    command = symptoms.command_failure(who, last.message)
    if command is not None:
        return _Trouble("CommandNotFound", command, (*words, "RunContainerError"))
    reason, what, do = _why_ended(pod, status, last, evidence, who)
    backing_off = status.state.waiting is not None and status.state.waiting.reason == "CrashLoopBackOff"
    given_up = backing_off and status.restart_count + 1 >= CRASHES
    again = "is running again" if status.state.running is not None else "is being started again"
    times = status.restart_count + (status.state.running is None)
    lines = evidence.previous_logs.get((pod.metadata.name, status.name), ())
    return _Trouble(
        reason,
        f"{what}{f', {times} times by now' if times > 1 else ''}{_last_words(lines)}; {do}",
        words,
        0.0 if given_up else None,
        last.finished_at,
        ("Restarting", f"{what}, and {again}."),
    )


def _why_ended(
    pod: Pod, status: ContainerStatus, last: Terminated, evidence: Evidence, who: str
) -> tuple[str, str, str]:
    """Reason, what happened, and what to do."""
    if last.reason == "OOMKilled":
        do = "ask for more memory in the machine config, or have it use less."
        limit = plain(_asked(pod, status).resources.limits.memory)
        what = f"{who} used more memory than {f'its {limit}' if limit else 'it may'} and was killed"
        return "OOMKilled", what, do
    if last.reason in ("StartError", "ContainerCannotRun"):
        do = "correct its command and settings in the machine config."
        return "CrashLoop", f"{who} cannot be started{quoted(last.message)}", do
    if last.exit_code in (0, 137, 143):
        # Ended from outside: the event says by whom.
        hook = _latest(evidence, pod, "FailedPostStartHook", container=status.name)
        if hook is not None:
            do = "correct its `postStart` hook in the chart values."
            return "CrashLoop", f"{who} was ended, since its postStart hook failed{quoted(hook.message)}", do
        killing = _latest(evidence, pod, "Killing", container=status.name)
        if killing is not None and (probe := symptoms.killed_by(killing.message)):
            unhealthy = _latest(evidence, pod, "Unhealthy", container=status.name)
            answer = f" ({symptoms.probe(unhealthy.message)[1]})" if unhealthy is not None else ""
            do = "look at its output, or correct its `port` and probes in the machine config."
            return "ProbeFailing", f"{who} did not pass its {probe} probe{answer} and was ended", do
    do = "correct its command or what it runs, then start the session again."
    return "CrashLoop", f"{who} ended with {_exit(last)}", do


def _exit(last: Terminated) -> str:
    number = last.signal or (last.exit_code - 128 if 128 < last.exit_code < 193 else 0)
    try:
        return f"{signal.Signals(number).name} (exit code {last.exit_code})"
    except ValueError:
        return f"exit code {last.exit_code}"


def _unsettled(pod: Pod, evidence: Evidence, now: datetime) -> Iterator[_Trouble]:
    """Containers that crashed again and again, and are up for a moment: without a probe they count as ready at once."""
    for status in _in_order(pod, pod.status.container_statuses):
        running, last = status.state.running, status.last_state.terminated
        if (
            status.ready
            and running is not None
            and last is not None
            and status.restart_count + 1 >= CRASHES
            and running.started_at is not None
            and 0 <= _age(running.started_at, now) < _SETTLED
        ):
            yield _crash(pod, status, last, evidence, status.name)


def _last_words(lines: Sequence[str]) -> str:
    told = "\n".join(plain(line, _LINES_LIMIT // 2) for line in [one for one in lines if one.strip()][-_LINES:])
    return f", after it wrote “{told[-_LINES_LIMIT:]}”" if told else ""


# -- progress


def _progress(active: Sequence[Pod], pods: Sequence[Pod], evidence: Evidence) -> tuple[str, str]:
    """Reason and sentence of a start that goes well."""
    step = _step(active[0], evidence) if active else ("Starting", "Kubernetes is making the session's pod.")
    # A pod that has just ended is why there is a new one; one that failed may stay for days, and says nothing.
    before = next((one for one in pods if not _active(one)), None)
    if before is None or (active and _seconds(active[0].metadata.creation_timestamp) > _until(before, evidence) + 60):
        return step
    reason, what = _ended(before, evidence)
    return reason, f"{what}, and is being replaced: {step[1]}"


def _until(pod: Pod, evidence: Evidence) -> float:
    """When a pod ended, as far as that is known."""
    disrupted = _condition(pod.status.conditions, "DisruptionTarget")
    event = _latest(evidence, pod, "Evicted", "Preempted", "Killing")
    return max(
        _seconds(pod.metadata.deletion_timestamp),
        _seconds(disrupted.last_transition_time if disrupted is not None else None),
        _seconds(_last_seen(event) if event is not None else None),
        *(_seconds(one.state.terminated.finished_at) for one in pod.status.container_statuses if one.state.terminated),
    )


def _step(pod: Pod, evidence: Evidence) -> tuple[str, str]:
    if not pod.spec.node_name:
        return "Scheduling", "Looking for a node that has room for the session."
    for status, init in _statuses(pod):
        if init and status.state.running is not None:
            return "Initializing", f"The init container {status.name} is running."
        event = _latest(evidence, pod, "Pulling", "Pulled", "Failed", container=status.name)
        if _waits(status) and event is not None and event.reason == "Pulling":
            return "Pulling", f"Pulling the image {plain(_image(pod, status))} of {status.name}."
    if any(status.state.running is not None for status in pod.status.container_statuses):
        return "Starting", f"{_waiting_for(pod)}."
    return "Creating", f"The containers are being made on the node {_node(pod)}."


def _waiting_for(pod: Pod) -> str:
    statuses = _in_order(pod, pod.status.container_statuses)
    missing = ", ".join(one.name for one in statuses if not one.ready)
    ready = sum(one.ready for one in statuses)
    if not missing:
        return f"{ready} of {len(statuses)} containers are ready: waiting for the node"
    return f"{ready} of {len(statuses)} containers are ready: waiting for {missing}"


# -- events, conditions, times

_NEVER = datetime.max.replace(tzinfo=UTC)


def _events(evidence: Evidence, about: Pod | Claim, *reasons: str, container: str | None = None) -> Iterator[Event]:
    """Those about this very object: another of its name may have had its own."""
    kind = "Pod" if isinstance(about, Pod) else "PersistentVolumeClaim"
    for event in evidence.events:
        whom = event.involved_object
        if (
            event.reason in reasons
            and whom.kind == kind
            and whom.name == about.metadata.name
            and whom.uid in ("", about.metadata.uid)
            and (container is None or whom.field_path.endswith(f"{{{container}}}"))
        ):
            yield event


def _latest(evidence: Evidence, about: Pod | Claim, *reasons: str, container: str | None = None) -> Event | None:
    found = _events(evidence, about, *reasons, container=container)
    # Of the same second, by the version: it grows, though Kubernetes promises only that it differs.
    return max(found, key=lambda one: (_seconds(_last_seen(one)), _version(one)), default=None)


def _version(event: Event) -> tuple[int, str]:
    return len(event.metadata.resource_version), event.metadata.resource_version


def _last_seen(event: Event) -> datetime | None:
    series = event.series.last_observed_time if event.series is not None else None
    return series or event.last_timestamp or event.event_time or _first_seen(event)


def _first_seen(event: Event) -> datetime | None:
    return event.first_timestamp or event.event_time or event.metadata.creation_timestamp


def _count(event: Event) -> int:
    return max(event.count or 1, event.series.count if event.series is not None else 1)


def _condition(conditions: Sequence[Condition], name: str) -> Condition | None:
    return next((one for one in conditions if one.type == name), None)


def _node(pod: Pod) -> str:
    return plain(pod.spec.node_name) or "(none)"


def _seconds(at: datetime | None) -> float:
    if at is None:
        return 0.0
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()


def _age(since: datetime, now: datetime) -> float:
    return _seconds(now) - _seconds(since)


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
