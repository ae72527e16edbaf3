"""What is seen of one session's namespace, and how it is read: the newest event, a condition, an age. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from orchestrator.cluster.objects import (
    Claim,
    Condition,
    ContainerStatus,
    Deployment,
    Event,
    Namespace,
    Pod,
)
from orchestrator.providers.symptoms import plain


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


# Seconds that nothing may be heard of a node before its pods count as lost. After an outage of the API server every
# node's last word is too old for Kubernetes, which marks all pods as not ready; a kubelet that is well says otherwise
# when it next looks at each, within a minute and a half. Kubernetes itself moves pods after five minutes.
_SILENCE = 120.0


def is_active(pod: Pod) -> bool:
    return pod.metadata.deletion_timestamp is None and pod.status.phase not in ("Failed", "Succeeded")


def is_ready(pod: Pod) -> bool:
    """As Kubernetes counts it: also not when its node is lost, though each container was ready when last heard of."""
    condition = condition_of(pod.status.conditions, "Ready")
    return condition is not None and condition.status == "True" and pod.status.phase == "Running"


def serves(pod: Pod, now: datetime) -> bool:
    """Whether it is ready; or is not only since nothing was heard of its node, for no more than a moment."""
    if is_ready(pod):
        return True
    ready, containers = (condition_of(pod.status.conditions, one) for one in ("Ready", "ContainersReady"))
    return (
        pod.status.phase == "Running"
        and containers is not None
        and containers.status == "True"
        and ready is not None
        # A kubelet would name a reason: a readiness gate.
        and (ready.status, ready.reason) == ("False", "")
        and ready.last_transition_time is not None
        and age(ready.last_transition_time, now) < _SILENCE
    )


def statuses_of(pod: Pod) -> list[tuple[ContainerStatus, bool]]:
    """Each with whether it is an init container, in the order of the pod's specification."""
    inits = [(one, True) for one in in_order(pod, pod.status.init_container_statuses)]
    return inits + [(one, False) for one in in_order(pod, pod.status.container_statuses)]


def in_order(pod: Pod, statuses: Sequence[ContainerStatus]) -> list[ContainerStatus]:
    if len(statuses) < 2:
        return list(statuses)
    by_name = {one.name: one for one in statuses}
    ordered = [by_name[one.name] for one in (*pod.spec.init_containers, *pod.spec.containers) if one.name in by_name]
    return ordered if len(ordered) == len(statuses) else list(statuses)


def events_of(evidence: Evidence, pod: Pod, *reasons: str, container: str | None = None) -> Iterator[Event]:
    """Those about this very object: another of its name may have had its own."""
    for event in evidence.events:
        whom = event.involved_object
        if (
            event.reason in reasons
            and whom.kind == "Pod"
            and whom.name == pod.metadata.name
            and whom.uid in ("", pod.metadata.uid)
            and (container is None or whom.field_path.endswith(f"{{{container}}}"))
        ):
            yield event


def latest(evidence: Evidence, pod: Pod, *reasons: str, container: str | None = None) -> Event | None:
    found = events_of(evidence, pod, *reasons, container=container)
    # Of the same second, by the version: it grows, though Kubernetes promises only that it differs.
    return max(found, key=lambda one: (seconds(last_seen(one)), _version(one)), default=None)


def _version(event: Event) -> tuple[int, str]:
    return len(event.metadata.resource_version), event.metadata.resource_version


def last_seen(event: Event) -> datetime | None:
    series = event.series.last_observed_time if event.series is not None else None
    return series or event.last_timestamp or event.event_time or first_seen(event)


def first_seen(event: Event) -> datetime | None:
    return event.first_timestamp or event.event_time or event.metadata.creation_timestamp


def count_of(event: Event) -> int:
    return max(event.count or 1, event.series.count if event.series is not None else 1)


def condition_of(conditions: Sequence[Condition], name: str) -> Condition | None:
    for one in conditions:
        if one.type == name:
            return one
    return None


def node_of(pod: Pod) -> str:
    return plain(pod.spec.node_name) or "(none)"


def seconds(at: datetime | None) -> float:
    if at is None:
        return 0.0
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()


def age(since: datetime, now: datetime) -> float:
    return seconds(now) - seconds(since)


def span(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
