"""What keeps a session's pod from running: pure functions over Kubernetes' objects, container by container."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from orchestrator.cluster.objects import Condition, Container, ContainerStatus, Pod, Terminated
from orchestrator.providers import symptoms
from orchestrator.providers.evidence import (
    Evidence,
    Rules,
    age,
    condition_of,
    count_of,
    events_of,
    first_seen,
    in_order,
    last_seen,
    latest,
    node_of,
    seconds,
    span,
    statuses_of,
)
from orchestrator.providers.symptoms import Pull, plain, quoted

# A container that was started anew so often, and crashed again, will not come up by itself.
CRASHES = 3
# Seconds that such a container must have been up for, to be believed again.
_SETTLED = 10.0
# Seconds after which what usually heals in a moment (a quota that counts a pod which is just gone, for instance) stays.
CONFIRMED = 5.0
# Seconds after which a crash says nothing of what keeps a container from being ready now.
_RECENT = 300.0
# Of the last lines of a crashed container, so many are told, and so many bytes.
_LINES, _LINES_LIMIT = 5, 500
# Waiting for nothing but its turn.
_ON_ITS_WAY = frozenset({"", "ContainerCreating", "PodInitializing"})
_PULLING = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable"})
_UNPROVISIONED = frozenset({"ProvisioningFailed", "FailedBinding", "ClaimLost"})
_SCALING = frozenset({"TriggeredScaleUp", "Nominated"})


@dataclass(frozen=True, slots=True)
class Trouble:
    """What keeps a session from running. It has failed once `since` is `wait` seconds ago; None: by its deadline."""

    reason: str
    message: str
    # Kubernetes' own words for it, which `transient_reasons` may list.
    words: tuple[str, ...] = ()
    wait: float | None = 0.0
    since: datetime | None = None
    # Reason and message as long as it has not failed.
    meanwhile: tuple[str, str] | None = None


def troubles_of(pod: Pod, evidence: Evidence, rules: Rules, now: datetime) -> Iterator[Trouble]:
    """What keeps a pod from being ready: what is most particular first, containers in their order."""
    scheduled = condition_of(pod.status.conditions, "PodScheduled")
    if scheduled is not None and scheduled.status == "False":
        yield from _unscheduled(pod, scheduled, evidence, rules)
        return
    for status, init in statuses_of(pod):
        yield from _container(pod, status, evidence, rules, init=init)
    if any(waits(status) for status, _ in statuses_of(pod)):
        yield from _setup(pod, evidence, rules)
    yield from _probes(pod, evidence)
    yield from _revived(pod, evidence, now)
    if pod.status.container_statuses and all(one.ready for one in pod.status.container_statuses):
        yield from _lost(pod, evidence)


def _unscheduled(pod: Pod, scheduled: Condition, evidence: Evidence, rules: Rules) -> Iterator[Trouble]:
    if scheduled.reason == "SchedulingGated":
        told = "The session's pod is held back by a scheduling gate; have an operator find out who lifts it."
        yield Trouble("SchedulingGated", told, ("SchedulingGated",), None)
        return
    what, do = symptoms.unschedulable(scheduled.message)
    if symptoms.unbound(scheduled.message):
        yield from _volumes(evidence, rules)
        meanwhile = ("VolumeNotBound", f"{what}.")
        yield Trouble("VolumeNotBound", f"{what}; {do}", ("FailedScheduling",), None, None, meanwhile)
        return
    words = ("FailedScheduling", "Unschedulable")
    since = scheduled.last_transition_time or pod.metadata.creation_timestamp
    scaling = latest(evidence, pod, *_SCALING, "NotTriggerScaleUp")
    if scaling is not None and scaling.reason in _SCALING:
        wait, since = max(rules.transient_grace, rules.progress_deadline), last_seen(scaling)
        meanwhile = ("ScalingUp", f"{what}; the cluster's autoscaler is adding a node.")
        yield Trouble(
            "Unschedulable",
            f"{what}, and the cluster's autoscaler has added none in time; {do}",
            words,
            wait,
            since,
            meanwhile,
        )
        return
    unhelped = ", and the cluster's autoscaler adds none" if scaling is not None else ""
    yield Trouble("Unschedulable", f"{what}{unhelped}; {do}", words, CONFIRMED, since)


def _volumes(evidence: Evidence, rules: Rules) -> Iterator[Trouble]:
    """Which volume is waited for, and why it is not made. Without the claims, their events tell what they can."""
    bound = {one.metadata.name for one in evidence.claims if one.status.phase == "Bound"}
    failures = {
        one.involved_object.name: one
        for one in sorted(evidence.events, key=lambda one: seconds(last_seen(one)))
        if one.involved_object.kind == "PersistentVolumeClaim" and one.reason in _UNPROVISIONED
    }
    for name in sorted({one.metadata.name for one in evidence.claims} | failures.keys()):
        if name in bound:
            continue
        meanwhile = ("VolumeNotBound", f"Waiting until the session's volume {plain(name)} is made.")
        event = failures.get(name)
        if event is not None:
            message, lasting = symptoms.volume_failure(plain(name), event.message)
            wait = CONFIRMED if lasting else rules.transient_grace
            yield Trouble("VolumeNotBound", message, (event.reason,), wait, first_seen(event), meanwhile)
        else:
            told = (
                f"The session's volume {plain(name)} is not there after {span(rules.progress_deadline)}; have an"
                " operator look at its claim and storage class."
            )
            yield Trouble("VolumeNotBound", told, (), None, None, meanwhile)


def _setup(pod: Pod, evidence: Evidence, rules: Rules) -> Iterator[Trouble]:
    """What the node cannot do before any container can be made."""
    event = latest(evidence, pod, "FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "FailedMapVolume")
    if event is None or (count_of(event) < 2 and symptoms.passing(event.message)):
        return
    since = first_seen(event)
    if event.reason == "FailedCreatePodSandBox":
        told = (
            f"The node {node_of(pod)} cannot set up the session's pod{quoted(event.message)}; have an operator look at"
            " its network plugin."
        )
        yield Trouble("PodSandbox", told, (event.reason,), rules.transient_grace, since)
        return
    missing = symptoms.mount_missing(event.message)
    wait = CONFIRMED if missing else rules.transient_grace
    yield Trouble("VolumeMount", symptoms.mount_failure(event.message), (event.reason,), wait, since)


def _probes(pod: Pod, evidence: Evidence) -> Iterator[Trouble]:
    """Containers that run and do not answer. Most are only about to: they fail by the deadline."""
    for status in in_order(pod, pod.status.container_statuses):
        running = status.state.running
        if running is None or status.ready:
            continue
        event = latest(evidence, pod, "Unhealthy", container=status.name)
        if event is None or seconds(last_seen(event)) < seconds(running.started_at):
            continue
        probe, answer = symptoms.probe(event.message)
        meanwhile = ("Starting", f"{waiting_for(pod)} ({probe} probe of {status.name}: {answer}).")
        told = (
            f"{status.name} does not pass its {probe} probe ({answer}); look at its output, or correct its `port` and"
            " `ready` in the machine config."
        )
        yield Trouble("ProbeFailing", told, ("Unhealthy",), None, None, meanwhile)


def _revived(pod: Pod, evidence: Evidence, now: datetime) -> Iterator[Trouble]:
    """Containers that run again after a crash and are not ready yet."""
    for status in in_order(pod, pod.status.container_statuses):
        last = status.last_state.terminated
        if status.state.running is None or status.ready or last is None or last.finished_at is None:
            continue
        if age(last.finished_at, now) < _RECENT:
            yield _crash(pod, status, last, evidence, status.name)


def _lost(pod: Pod, evidence: Evidence) -> Iterator[Trouble]:
    ready = condition_of(pod.status.conditions, "Ready")
    if ready is not None and ready.reason == "ReadinessGatesNotReady":
        told = (
            f"The containers are ready, but not all readiness gates are open{quoted(ready.message)}; ask an operator."
        )
        yield Trouble("ReadinessGate", told, (), None)
    elif (ready is not None and ready.status == "Unknown") or latest(evidence, pod, "NodeNotReady") is not None:
        told = (
            f"The node {node_of(pod)} of the session does not answer; wait until Kubernetes moves it, or have an"
            " operator look at the node."
        )
        yield Trouble("NodeLost", told, ("NodeNotReady",), None)


def image_of(pod: Pod, status: ContainerStatus) -> str:
    """As it was asked for: the status has it as the node knows it."""
    return _asked(pod, status).image or status.image or "(none)"


def _asked(pod: Pod, status: ContainerStatus) -> Container:
    """The container as it was asked for."""
    asked = (one for one in (*pod.spec.init_containers, *pod.spec.containers) if one.name == status.name)
    return next(asked, Container())


def waits(status: ContainerStatus) -> bool:
    waiting = status.state.waiting
    return waiting is not None and waiting.reason in _ON_ITS_WAY


def _container(pod: Pod, status: ContainerStatus, evidence: Evidence, rules: Rules, *, init: bool) -> Iterator[Trouble]:
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


def _pull(pod: Pod, status: ContainerStatus, evidence: Evidence, rules: Rules) -> Trouble:
    waiting = status.state.waiting
    assert waiting is not None  # noqa: S101 - by its caller
    failures = [
        one
        for one in events_of(evidence, pod, "Failed", container=status.name)
        if one.message.startswith("Failed to pull image")
    ]
    event = max(failures, key=lambda one: seconds(last_seen(one)), default=None)
    said = waiting.message
    if event is not None and (not said or (said.startswith("Back-off") and ": " not in said)):
        said = event.message
    kind = symptoms.pull(said)
    image = image_of(pod, status)
    first = min(failures, key=lambda one: seconds(first_seen(one)), default=None)
    since = first_seen(first) if first is not None else pod.metadata.creation_timestamp
    if kind is Pull.BUSY:
        wait = rules.transient_grace
    else:
        # A registry that cannot be reached is tried a second time before it is believed.
        tried = waiting.reason != "ErrImagePull" or any(count_of(one) > 1 for one in failures)
        wait = 0.0 if kind.final or tried else 2 * CONFIRMED
    return Trouble(
        "ImagePull",
        symptoms.pull_failure(status.name, image, kind, said),
        ("ErrImagePull", "ImagePullBackOff"),
        wait,
        since,
        None if wait == 0.0 else ("ImagePull", f"Trying again to pull the image {plain(image)} of {status.name}."),
    )


def _unmade(pod: Pod, status: ContainerStatus, rules: Rules, who: str) -> Trouble:
    """A container that cannot be made."""
    waiting = status.state.waiting
    assert waiting is not None  # noqa: S101 - by its caller
    reason, image = waiting.reason, plain(image_of(pod, status))
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
                return Trouble("CommandNotFound", command, (reason,))
            what = symptoms.configuration_failure(who, waiting.message)
            wait = rules.transient_grace if symptoms.passing(waiting.message) else 0.0
        case _:
            # Unknown words are given time: Kubernetes adds some with most versions.
            what = f"{who} is held up: {plain(reason)}{quoted(waiting.message)}; ask an operator."
            wait = rules.transient_grace
    return Trouble(plain(reason), what, (reason,), wait, pod.metadata.creation_timestamp)


def _crash(pod: Pod, status: ContainerStatus, last: Terminated, evidence: Evidence, who: str) -> Trouble:
    """A container that ended: Kubernetes starts it again, at growing intervals."""
    words = ("CrashLoopBackOff", "BackOff")
    command = symptoms.command_failure(who, last.message)
    if command is not None:
        return Trouble("CommandNotFound", command, (*words, "RunContainerError"))
    reason, what, do = _why_ended(pod, status, last, evidence, who)
    backing_off = status.state.waiting is not None and status.state.waiting.reason == "CrashLoopBackOff"
    given_up = backing_off and status.restart_count + 1 >= CRASHES
    again = "is running again" if status.state.running is not None else "is being started again"
    times = status.restart_count + (status.state.running is None)
    lines = evidence.previous_logs.get((pod.metadata.name, status.name), ())
    return Trouble(
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
        hook = latest(evidence, pod, "FailedPostStartHook", container=status.name)
        if hook is not None:
            do = "correct its `postStart` hook in the chart values."
            return "CrashLoop", f"{who} was ended, since its postStart hook failed{quoted(hook.message)}", do
        killing = latest(evidence, pod, "Killing", container=status.name)
        if killing is not None and (probe := symptoms.killed_by(killing.message)):
            unhealthy = latest(evidence, pod, "Unhealthy", container=status.name)
            answer = f" ({symptoms.probe(unhealthy.message)[1]})" if unhealthy is not None else ""
            do = "look at its output, or correct its `port` and probes in the machine config."
            return "ProbeFailing", f"{who} did not pass its {probe} probe{answer} and was ended", do
    do = "correct its command or what it runs, then start the session again."
    return "CrashLoop", f"{who} ended with {exit_of(last)}", do


def exit_of(last: Terminated) -> str:
    number = last.signal or (last.exit_code - 128 if 128 < last.exit_code < 193 else 0)
    try:
        return f"{signal.Signals(number).name} (exit code {last.exit_code})"
    except ValueError:
        return f"exit code {last.exit_code}"


def unsettled(pod: Pod, evidence: Evidence, now: datetime) -> Iterator[Trouble]:
    """Containers that crashed again and again, and are up for a moment: without a probe they count as ready at once."""
    for status in in_order(pod, pod.status.container_statuses):
        running, last = status.state.running, status.last_state.terminated
        if (
            status.ready
            and running is not None
            and last is not None
            and status.restart_count + 1 >= CRASHES
            and running.started_at is not None
            and 0 <= age(running.started_at, now) < _SETTLED
        ):
            yield _crash(pod, status, last, evidence, status.name)


def _last_words(lines: Sequence[str]) -> str:
    told = "\n".join(plain(line, _LINES_LIMIT // 2) for line in [one for one in lines if one.strip()][-_LINES:])
    return f", after it wrote “{told[-_LINES_LIMIT:]}”" if told else ""


def waiting_for(pod: Pod) -> str:
    statuses = in_order(pod, pod.status.container_statuses)
    missing = ", ".join(one.name for one in statuses if not one.ready)
    ready = sum(one.ready for one in statuses)
    if not missing:
        return f"{ready} of {len(statuses)} containers are ready: waiting for the node"
    return f"{ready} of {len(statuses)} containers are ready: waiting for {missing}"
