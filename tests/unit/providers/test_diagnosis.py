"""What is told of a session in Kubernetes, by what its namespace shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.cluster.objects import Claim, Deployment, Event, Namespace, Pod
from orchestrator.errors import ApiRefused, ProviderFailure, ProviderUnavailable
from orchestrator.providers import symptoms
from orchestrator.providers.contract import Observation, State
from orchestrator.providers.diagnosis import Evidence, Rules, api_failure, crashed, diagnose, summary

# Of failures that were staged on Kubernetes 1.20.2 with containerd, cut to what is read. That of `oom` is whole.
RECORDED = json.loads((Path(__file__).parent / "recorded_1_20.json").read_text())
NAMESPACE = "0b8f2c9e-6a57-4c1d-9f0e-2d1c7a5b3e42"
NOW = datetime(2026, 11, 21, 12, 50, tzinfo=UTC)
RULES = Rules(frozenset(), transient_grace=120.0, progress_deadline=900.0, instance="cluster-code")
PATIENT = Rules(
    frozenset({"FailedScheduling", "ErrImagePull"}),
    transient_grace=120.0,
    progress_deadline=900.0,
    instance="cluster-code",
)
LABELS = {"cluster-code.io/instance": "cluster-code", "cluster-code.io/project": NAMESPACE}


def at(seconds: float) -> str:
    """So many seconds before NOW, as Kubernetes writes it."""
    return (NOW - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def evidence_of(objects: dict[str, Any], **more: Any) -> Evidence:
    deployments = msgspec.convert(objects.get("deployments", []), list[Deployment])
    namespace = objects.get("namespace", {"metadata": {"name": NAMESPACE, "labels": LABELS}})
    return Evidence(
        namespace=None if namespace is None else msgspec.convert(namespace, Namespace),
        deployment=deployments[0] if deployments else None,
        pods=msgspec.convert(objects.get("pods", []), list[Pod]),
        events=msgspec.convert(objects.get("events", []), list[Event]),
        claims=msgspec.convert(objects.get("claims", []), list[Claim]),
        **more,
    )


def last_heard(evidence: Evidence) -> datetime:
    """When a recording was made: a moment after the last that was written in it."""
    heard = [time for event in evidence.events for time in (event.last_timestamp, event.event_time) if time]
    heard += [
        status.last_state.terminated.finished_at
        for pod in evidence.pods
        for status in (*pod.status.container_statuses, *pod.status.init_container_statuses)
        if status.last_state.terminated is not None and status.last_state.terminated.finished_at is not None
    ]
    heard += [pod.metadata.creation_timestamp for pod in evidence.pods if pod.metadata.creation_timestamp]
    return max(heard) + timedelta(seconds=1)


FIT = "have an operator add a node that fits"
IMAGE = "correct the image in the machine config or in the project's chart values"


@pytest.mark.parametrize(
    ("case", "state", "reason", "message"),
    [
        ("ok", State.RUNNING, "Ready", "The session is running."),
        (
            "noimage",
            State.FAILED,
            "ImagePull",
            (
                "The image registry.example.com/team/nope:1 of preview was not found: its registry registry.example.com"
                " cannot be reached (Kubernetes says: dial tcp: lookup registry.example.com on 10.96.0.10:53: no such"
                f" host); {IMAGE}, or have an operator let the nodes reach the registry."
            ),
        ),
        (
            "badname",
            State.FAILED,
            "InvalidImageName",
            "Not A Name!! is not the name of an image (of preview); correct the image in the machine config.",
        ),
        (
            "never",
            State.FAILED,
            "ErrImageNeverPull",
            (
                "The image team/nope:1 of preview is not on the node, and `imagePullPolicy` forbids to pull it;"
                " correct the"
                " one or the other in the machine config."
            ),
        ),
        ("crash", State.STARTING, "Creating", "The containers are being made on the node node-1."),
        (
            "crash later",
            State.FAILED,
            "CrashLoop",
            (
                "preview ended with exit code 3, 4 times by now; correct its command or what it runs, then start the"
                " session"
                " again."
            ),
        ),
        (
            "segv",
            State.STARTING,
            "Restarting",
            "preview ended with SIGSEGV (exit code 139), and is being started again.",
        ),
        (
            "oom",
            State.FAILED,
            "OOMKilled",
            (
                "preview used more memory than its 16Mi and was killed, 4 times by now; ask for more memory in the"
                " machine"
                " config, or have it use less."
            ),
        ),
        (
            "init",
            State.STARTING,
            "Restarting",
            "The init container clone ended with exit code 128, and is being started again.",
        ),
        (
            "init later",
            State.FAILED,
            "CrashLoop",
            (
                "The init container clone ended with exit code 128, 4 times by now; correct its command or what it"
                " runs,"
                " then start the session again."
            ),
        ),
        (
            "nocommand",
            State.FAILED,
            "CommandNotFound",
            (
                "The command /no/such of preview is not in its image; correct `command` in the machine config, or"
                " choose an"
                " image that has it."
            ),
        ),
        (
            "secret",
            State.FAILED,
            "CreateContainerConfigError",
            (
                "preview cannot be started: there is no secret nope in the session's namespace; start the session"
                " again, or"
                " correct the name in the chart values."
            ),
        ),
        (
            "secretkey",
            State.FAILED,
            "CreateContainerConfigError",
            (
                "preview cannot be started: the Secret has has no key k; add the key, or correct the name in the"
                " machine"
                " config's chart values."
            ),
        ),
        (
            "nonroot",
            State.FAILED,
            "CreateContainerConfigError",
            (
                "preview cannot be started: its image runs as root, which the session's pod security forbids; choose an"
                " image with another user, or set `securityContext` in the chart values."
            ),
        ),
        (
            "cpu",
            State.STARTING,
            "Unschedulable",
            (
                "The cluster's only node cannot take the session (too little cpu left); ask for less cpu in the machine"
                f" config, stop other sessions, or {FIT}."
            ),
        ),
        (
            "nodesel",
            State.STARTING,
            "Unschedulable",
            (
                "The cluster's only node cannot take the session (other labels than its node selector asks for);"
                " correct"
                " the node selector (chart values), or have an operator label a node."
            ),
        ),
        (
            "exceeded2",
            State.FAILED,
            "QuotaExceeded",
            (
                "The quota session-42 does not allow the session: requests.cpu 3 requested, 0 of 1 used;"
                " requests.memory 1Gi"
                " requested, 0 of 1Mi used; ask for less in the machine config, or have an operator raise the quota."
            ),
        ),
        (
            "quota",
            State.FAILED,
            "QuotaExceeded",
            (
                "The quota session-42 demands that every container says its requests.memory; set `resources` in the"
                " machine"
                " config, or have an operator add a LimitRange with defaults."
            ),
        ),
        (
            "limitrange",
            State.FAILED,
            "LimitRange",
            (
                "The namespace's LimitRange does not allow the session: maximum memory usage per Container is 64Mi, but"
                " limit is 1Gi; correct cpu and memory in the machine config, or have an operator change the"
                " LimitRange."
            ),
        ),
        (
            "noserviceaccount",
            State.FAILED,
            "ServiceAccountMissing",
            "The service account nope is not there; correct `serviceAccountName` in the chart's values, or make it.",
        ),
        (
            "noclass",
            State.FAILED,
            "VolumeNotBound",
            (
                "The session's volume session-42 cannot be made: there is no storage class nope; correct"
                " `storage.className` in the machine config's chart values, or have an operator make the class."
            ),
        ),
        (
            "noclaim",
            State.STARTING,
            "Unschedulable",
            "The session's volume claim session-42 is missing or being deleted; start the session again.",
        ),
        (
            "noconfigmap",
            State.STARTING,
            "VolumeMount",
            (
                "A volume of the session needs the configmap nope, which is not there; make it, or correct its name"
                " in the"
                " chart values."
            ),
        ),
        (
            "noconfigmap later",
            State.FAILED,
            "VolumeMount",
            (
                "A volume of the session needs the configmap nope, which is not there; make it, or correct its name"
                " in the"
                " chart values."
            ),
        ),
        ("readiness", State.STARTING, "Starting", "1 of 2 containers are ready: waiting for preview."),
        (
            "readiness later",
            State.STARTING,
            "Starting",
            "1 of 2 containers are ready: waiting for preview (readiness probe of preview: connection refused).",
        ),
        (
            "noprogress",
            State.FAILED,
            "ProbeFailing",
            (
                "preview does not pass its readiness probe (no answer); look at its output, or correct its `port` and"
                " `ready` in the machine config."
            ),
        ),
        (
            "liveness",
            State.FAILED,
            "ProbeFailing",
            (
                "preview did not pass its liveness probe (connection refused) and was ended, 5 times by now; look at"
                " its"
                " output, or correct its `port` and probes in the machine config."
            ),
        ),
    ],
)
def test_what_kubernetes_1_20_shows_is_told(case: str, state: State, reason: str, message: str) -> None:
    evidence = evidence_of(RECORDED[case])
    assert diagnose(evidence, RULES, last_heard(evidence)) == Observation(state, reason, message)


def test_a_hook_that_fails_is_told_with_what_it_said() -> None:
    evidence = evidence_of(RECORDED["poststart"])
    seen = diagnose(evidence, RULES, last_heard(evidence))
    assert (seen.state, seen.reason) == (State.FAILED, "CrashLoop")
    assert "its postStart hook failed" in seen.message
    assert "exited with 4" in seen.message
    # The UIDs of pods tell people nothing.
    assert RECORDED["poststart"]["pods"][0]["metadata"]["uid"] not in seen.message


def test_the_last_lines_of_a_crash_are_told() -> None:
    pod = RECORDED["crash later"]["pods"][0]["metadata"]["name"]
    before = evidence_of(RECORDED["crash later"])
    assert crashed(before) == [(pod, "preview")]
    lines = ["one", "", "two", "three", "four", "Error: no module \x1b[31mx", "from https://me:secret@git.example.com/"]
    after = evidence_of(RECORDED["crash later"], previous_logs={(pod, "preview"): lines})
    assert diagnose(after, RULES, last_heard(after)).message == (
        "preview ended with exit code 3, 4 times by now, after it wrote “two\nthree\nfour\nError: no module �[31mx\n"
        "from https://***@git.example.com/”; correct its command or what it runs, then start the session again."
    )


def test_only_what_has_run_has_last_lines() -> None:
    assert crashed(evidence_of(RECORDED["nocommand"])) == []
    assert crashed(evidence_of(RECORDED["noimage"])) == []
    assert crashed(evidence_of(RECORDED["ok"])) == []
    assert [container for _, container in crashed(evidence_of(RECORDED["init later"]))] == ["clone"]


# -- staged: what newer clusters show, and what is hard to bring about


def deployment(*conditions: dict[str, Any], replicas: int = 1, updated: int = 1, **status: Any) -> dict[str, Any]:
    found = conditions or (condition("Progressing", "True", "ReplicaSetUpdated", 'ReplicaSet "session-42-new" is p.'),)
    return {
        "metadata": {"name": "session-42", "generation": 3},
        "spec": {"replicas": replicas},
        "status": {
            "observedGeneration": 3, "replicas": 1, "updatedReplicas": updated, "unavailableReplicas": 1,
            "conditions": list(found), **status,
        },
    }  # fmt: skip


def condition(kind: str, status: str, reason: str = "", message: str = "", ago: float = 30) -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": at(ago)}


def container(name: str, *, ready: bool = False, restarts: int = 0, last: Any = None, **state: Any) -> dict[str, Any]:
    return {
        "name": name, "ready": ready, "restartCount": restarts, "state": state,
        "lastState": {} if last is None else {"terminated": last},
    }  # fmt: skip


def pod(
    *statuses: dict[str, Any], name: str = "session-42-new-abcde", ready: bool = False, ago: float = 30, **more: Any
) -> dict[str, Any]:
    replica_set = name.rpartition("-")[0]
    conditions = more.pop("conditions", [condition("Ready", str(ready), ago=ago)])
    names = [one["name"] for one in statuses] or ["preview"]
    deleting = {"deletionTimestamp": at(more.pop("deleted"))} if "deleted" in more else {}
    inits = more.pop("inits", [])
    return {
        "metadata": {
            "name": name, "uid": f"uid-{name}", "creationTimestamp": at(ago),
            "ownerReferences": [{"kind": "ReplicaSet", "name": replica_set}], **deleting,
        },
        "spec": {
            "nodeName": more.pop("node", "node-1"),
            "containers": [{"name": one, "image": f"registry.example.com/team/{one}:1"} for one in names],
        },
        "status": {
            "phase": "Running" if ready else "Pending", "conditions": conditions,
            "containerStatuses": list(statuses), "initContainerStatuses": inits, **more,
        },
    }  # fmt: skip


def event(
    reason: str, message: str, *, kind: str = "Pod", name: str = "session-42-new-abcde", ago: float = 5, **more: Any
) -> dict[str, Any]:
    path = f"spec.containers{{{more.pop('container')}}}" if "container" in more else ""
    uid = f"uid-{name}" if kind == "Pod" else ""
    return {
        "involvedObject": {"kind": kind, "name": name, "uid": uid, "fieldPath": path},
        "reason": reason, "message": message, "firstTimestamp": at(ago), "lastTimestamp": at(ago), **more,
    }  # fmt: skip


def seen(
    *pods: dict[str, Any], events: Sequence[dict[str, Any]] = (), rules: Rules = RULES, **objects: Any
) -> Observation:
    objects.setdefault("deployments", [deployment()])
    return diagnose(evidence_of({"pods": pods, "events": events, **objects}), rules, NOW)


WAITING = {"reason": "ContainerCreating"}
UP = {"startedAt": at(20)}


def pulling(message: str, reason: str = "ErrImagePull") -> dict[str, Any]:
    return pod(container("preview", waiting={"reason": reason, "message": message}), ago=5)


PULL = 'rpc error: code = Unknown desc = failed to pull and unpack image "registry.example.com/team/preview:1": '


@pytest.mark.parametrize(
    ("message", "kind", "told"),
    [
        (
            PULL + 'failed to resolve reference "registry.example.com/team/preview:1":'
            " registry.example.com/team/preview:1: not found",
            State.FAILED,
            "was not found in its registry (registry.example.com)",
        ),
        (
            "manifest for registry.example.com/team/preview:1 not found: manifest unknown: manifest unknown",
            State.FAILED,
            "was not found in its registry",
        ),
        (
            PULL + "no match for platform in manifest: not found",
            State.FAILED,
            "was not found in its registry",
        ),
        (
            PULL + "failed to authorize: failed to fetch anonymous token: unexpected status: 401 Unauthorized",
            State.FAILED,
            "is refused by its registry",
        ),
        (
            (
                "Error response from daemon: pull access denied for team/preview, repository does not exist or may"
                " require"
                " 'docker login': denied: requested access to the resource is denied"
            ),
            State.FAILED,
            "it does not exist there, or needs credentials",
        ),
        (
            PULL + "failed to do request: Head: dial tcp 192.0.2.1:443: i/o timeout",
            State.STARTING,
            "Trying again",
        ),
        (
            PULL + "unexpected status from HEAD request: 503 Service Unavailable",
            State.STARTING,
            "Trying again",
        ),
        (
            PULL + "429 Too Many Requests - Server message: toomanyrequests: You have reached your pull rate limit.",
            State.STARTING,
            "Trying again",
        ),
        (PULL + "dial tcp: lookup registry.example.com: no such host", State.STARTING, "Trying again"),
        ("", State.STARTING, "Trying again"),
    ],
)
def test_the_first_word_of_a_runtime_decides_only_where_it_is_final(message: str, kind: State, told: str) -> None:
    observation = seen(pulling(message))
    assert (observation.state, observation.reason) == (kind, "ImagePull")
    assert told in observation.message
    assert "registry.example.com/team/preview:1 of preview" in observation.message


def test_a_registry_that_cannot_be_reached_is_believed_at_the_second_try() -> None:
    # From 1.31 on the back-off says why.
    message = (
        'Back-off pulling image "registry.example.com/team/preview:1": ErrImagePull: failed to do request: Head'
        ' "https://registry.example.com/v2/team/preview/manifests/1": dial tcp: lookup registry.example.com: no such'
        " host"
    )
    observation = seen(pulling(message, "ImagePullBackOff"))
    assert observation.state is State.FAILED
    assert (
        "its registry registry.example.com cannot be reached (Kubernetes says: dial tcp: lookup" in observation.message
    )


def test_a_registry_that_is_busy_has_its_grace() -> None:
    busy = event(
        "Failed", 'Failed to pull image "x": 503 Service Unavailable', container="preview", ago=130, count=9,
    )  # fmt: skip
    waiting = pulling('Back-off pulling image "x"', "ImagePullBackOff")
    assert seen(waiting, events=[busy]).state is State.FAILED
    assert seen(waiting, events=[{**busy, "firstTimestamp": at(110)}]).state is State.STARTING


def test_what_the_operator_calls_transient_has_its_grace() -> None:
    observation = seen(pulling("x: not found"), rules=PATIENT)
    assert observation.state is State.STARTING
    assert "was not found in its registry" in observation.message
    old = pulling("x: not found")
    old["metadata"]["creationTimestamp"] = at(121)
    assert seen(old, rules=PATIENT).state is State.FAILED


def unscheduled(message: str, ago: float = 30) -> dict[str, Any]:
    return pod(node="", ago=ago, conditions=[condition("PodScheduled", "False", "Unschedulable", message, ago)])


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            (
                "0/3 nodes are available: 1 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, 2"
                " Insufficient memory. preemption: 0/3 nodes are available: 1 Preemption is not helpful for"
                " scheduling, 2 No"
                " preemption victims found for incoming pod."
            ),
            (
                "None of the 3 nodes can take the session (2 with too little memory left, 1 with the taint"
                " node-role.kubernetes.io/control-plane); ask for less memory in the machine config, stop other"
                " sessions,"
                f" or {FIT}."
            ),
        ),
        (
            "0/2 nodes are available: 2 node(s) had taint {dedicated: gpu}, that the pod didn't tolerate.",
            (
                "None of the 2 nodes can take the session (2 with the taint dedicated: gpu); have an operator set"
                " `tolerations` (chart values) or add nodes."
            ),
        ),
        (
            "0/1 nodes are available: 1 node(s) had untolerated taint {node.kubernetes.io/not-ready: }.",
            (
                "The cluster's only node cannot take the session (the taint node.kubernetes.io/not-ready); have an"
                " operator"
                " look at the nodes."
            ),
        ),
        (
            "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.",
            (
                "None of the 3 nodes can take the session (3 with other labels than its node selector asks for);"
                " correct"
                " the node selector (chart values), or have an operator label a node."
            ),
        ),
        (
            "0/3 nodes are available: 1 Insufficient nvidia.com/gpu, 2 node(s) had volume node affinity conflict.",
            (
                "None of the 3 nodes can take the session (1 with too little nvidia.com/gpu left, 2 with no way to the"
                " session's volume, which is tied to another node or zone); ask for less nvidia.com/gpu in the machine"
                f" config, stop other sessions, or {FIT}."
            ),
        ),
        (
            (
                "0/4 nodes are available: 1 Too many pods, 1 node(s) were unschedulable, 2 node(s) exceed max volume"
                " count."
            ),
            (
                "None of the 4 nodes can take the session (2 with no room for more volumes, 1 with too many pods, 1"
                " with a"
                f" cordon); stop other sessions, or {FIT}."
            ),
        ),
        (
            "0/2 nodes are available: 2 node(s) didn't match pod anti-affinity rules.",
            (
                "None of the 2 nodes can take the session (2 with other pods than its rules of affinity and spread"
                " allow);"
                " correct the rules (chart values), or have an operator add nodes."
            ),
        ),
        (
            "no nodes available to schedule pods",
            "The cluster has no node that takes sessions; have an operator add one.",
        ),
        (
            "0/2 nodes are available: 2 nodes dislike it.",
            (
                "No node of the cluster can take the session (Kubernetes says: 0/2 nodes are available: 2 nodes dislike"
                f" it); change the machine config, or {FIT}."
            ),
        ),
    ],
)
def test_the_scheduler_is_understood(message: str, told: str) -> None:
    assert seen(unscheduled(message)) == Observation(State.FAILED, "Unschedulable", told)


FULL = "0/1 nodes are available: 1 Insufficient cpu."


def test_a_full_cluster_has_its_grace_where_the_operator_says_so() -> None:
    assert seen(unscheduled(FULL, ago=119), rules=PATIENT).state is State.STARTING
    assert seen(unscheduled(FULL, ago=121), rules=PATIENT).state is State.FAILED
    # A quota or a pod that is just gone still counts for a moment.
    assert seen(unscheduled(FULL, ago=4)).state is State.STARTING
    assert seen(unscheduled(FULL, ago=6)).state is State.FAILED


def test_an_autoscaler_at_work_is_waited_for() -> None:
    up = event("TriggeredScaleUp", "pod triggered scale-up: [{pool 1->2 (max: 5)}]", ago=200)
    waited = seen(unscheduled(FULL, ago=400), events=[up])
    assert (waited.state, waited.reason) == (State.STARTING, "ScalingUp")
    assert waited.message.endswith("; the cluster's autoscaler is adding a node.")
    late = seen(unscheduled(FULL, ago=1000), events=[{**up, "lastTimestamp": at(901)}])
    assert (late.state, late.reason) == (State.FAILED, "Unschedulable")
    assert "autoscaler has added none in time" in late.message
    no = event("NotTriggerScaleUp", "pod didn't trigger scale-up: 1 max node group size reached", ago=100)
    refused = seen(unscheduled(FULL, ago=400), events=[up, no])
    assert refused.state is State.FAILED
    assert "and the cluster's autoscaler adds none; ask for less cpu" in refused.message


@pytest.mark.parametrize(
    ("message", "reason", "told"),
    [
        (
            (
                'pods "session-42-new-x" is forbidden: violates PodSecurity "restricted:latest":'
                " allowPrivilegeEscalation !="
                ' false (container "preview" must set securityContext.allowPrivilegeEscalation=false)'
            ),
            "PodSecurity",
            "The cluster's pod security (restricted:latest) does not allow the session: allowPrivilegeEscalation",
        ),
        (
            'pods "session-42-new-x" is forbidden: unable to validate against any pod security policy: []',
            "PodSecurity",
            "The cluster's pod security does not allow the session",
        ),
        (
            (
                'admission webhook "validate.policy.example.com" denied the request: images must be signed'
                " (session-42-new)"
            ),
            "AdmissionDenied",
            "The cluster's policy validate.policy.example.com does not allow the session",
        ),
        (
            (
                'pods "session-42-new-x" is forbidden: exceeded quota: q, requested: limits.memory=5Gi, used:'
                " limits.memory=2Gi, limited: limits.memory=6Gi"
            ),
            "QuotaExceeded",
            "The quota q does not allow the session: limits.memory 5Gi requested, 2Gi of 6Gi used",
        ),
        ('pods "session-42-new-x" is forbidden: it is Tuesday', "FailedCreate", "it is Tuesday"),
    ],
)
def test_why_no_pod_may_be_made(message: str, reason: str, told: str) -> None:
    def refused(ago: float) -> Observation:
        conditions = [
            condition("Progressing", "True", "NewReplicaSetCreated", 'Created new replica set "session-42-new"'),
            condition("ReplicaFailure", "True", "FailedCreate", message, ago),
        ]
        return seen(deployments=[deployment(*conditions, updated=0)])

    failed = refused(6)
    assert (failed.state, failed.reason) == (State.FAILED, reason)
    assert told in failed.message
    # What has just been deleted still counts for a moment.
    assert refused(3) == Observation(State.STARTING, reason, failed.message)


def test_a_webhook_that_is_away_has_its_grace() -> None:
    message = 'Internal error occurred: failed calling webhook "x": context deadline exceeded (session-42-new)'
    for ago, state in ((100, State.STARTING), (121, State.FAILED)):
        failure = condition("ReplicaFailure", "True", "FailedCreate", message, ago)
        observation = seen(deployments=[deployment(failure, updated=0)])
        assert (observation.state, observation.reason) == (state, "AdmissionUnavailable")


def test_the_failure_of_an_older_replica_set_does_not_count() -> None:
    conditions = [
        condition("Progressing", "True", "NewReplicaSetCreated", 'Created new replica set "session-42-new"'),
        condition("ReplicaFailure", "True", "FailedCreate", 'pods "session-42-old-x" is forbidden: exceeded quota'),
    ]
    assert seen(deployments=[deployment(*conditions, updated=0)]).state is State.STARTING


@pytest.mark.parametrize(
    "changed",
    [
        deployment(observedGeneration=2),
        # Scaled to zero by the strategy Recreate, and no new one yet.
        deployment(
            condition("Progressing", "False", "ProgressDeadlineExceeded", 'ReplicaSet "session-42-old" has timed out'),
            updated=0,
            unavailableReplicas=0,
        ),
    ],
)
def test_what_was_there_before_a_change_does_not_count(changed: dict[str, Any]) -> None:
    broken = pulling("x: not found")
    for one in (broken, pod(container("preview", ready=True, running=UP), ready=True)):
        one["metadata"]["ownerReferences"][0]["name"] = "session-42-old"
        observation = seen(one, deployments=[changed])
        assert observation == Observation(State.STARTING, "Starting", "Kubernetes is taking up what was changed.")


def test_pods_of_older_replica_sets_and_of_strangers_decide_nothing() -> None:
    new = pod(container("preview", waiting=WAITING))
    old = pod(container("preview", ready=True, running=UP), name="session-42-old-fghij", ready=True, ago=500)
    stranger = pod(container("x", ready=True, running=UP), name="debug", ready=True)
    stranger["metadata"]["ownerReferences"] = []
    assert seen(new, old, stranger).state is State.STARTING
    assert seen(old, stranger).state is State.STARTING
    broken = pod(container("preview", waiting={"reason": "InvalidImageName"}), name="session-42-old-fghij", ago=500)
    good = pod(container("preview", ready=True, running=UP), ready=True)
    assert seen(broken, good).state is State.RUNNING


def test_the_steps_of_a_start_are_told() -> None:
    three = ("preview", "chat", "vscode")
    assert seen().message == "Kubernetes is making the session's pod."
    assert seen(pod(node="")).message == "Looking for a node that has room for the session."
    made = pod(*(container(name, waiting=WAITING) for name in three))
    assert seen(made) == Observation(State.STARTING, "Creating", "The containers are being made on the node node-1.")
    pull = event("Pulling", 'Pulling image "x"', container="chat")
    assert seen(made, events=[pull]) == Observation(
        State.STARTING, "Pulling", "Pulling the image registry.example.com/team/chat:1 of chat."
    )
    clone = pod(container("preview", waiting={"reason": "PodInitializing"}), inits=[container("clone", running=UP)])
    assert seen(clone) == Observation(State.STARTING, "Initializing", "The init container clone is running.")
    up = pod(*(container(name, ready=name != "vscode", running=UP) for name in three))
    assert seen(up) == Observation(State.STARTING, "Starting", "2 of 3 containers are ready: waiting for vscode.")


def test_volumes_that_wait_for_their_first_consumer_are_as_usual() -> None:
    claims = [{"metadata": {"name": "session-42"}, "status": {"phase": "Pending"}}]
    waits = event(
        "WaitForFirstConsumer", "waiting for first consumer to be created", kind="PersistentVolumeClaim",
        name="session-42",
    )  # fmt: skip
    assert seen(pod(node=""), claims=claims, events=[waits]).reason == "Scheduling"
    full = seen(unscheduled(FULL), claims=claims, events=[waits])
    assert full.reason == "Unschedulable"


def test_a_volume_is_waited_for() -> None:
    message = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."
    claims = [{"metadata": {"name": "session-42"}, "status": {"phase": "Pending"}}]
    waiting = seen(unscheduled(message, ago=200), claims=claims)
    assert waiting == Observation(
        State.STARTING, "VolumeNotBound", "Waiting until the session's volume session-42 is made."
    )
    late = seen(unscheduled(message, ago=901), claims=claims)
    assert (late.state, late.reason) == (State.FAILED, "VolumeNotBound")
    assert "is not there after 15 minutes" in late.message


@pytest.mark.parametrize("claims", [[], [{"metadata": {"name": "session-42"}, "status": {"phase": "Pending"}}]])
@pytest.mark.parametrize(
    ("reason", "message", "ago", "state", "told"),
    [
        ("ProvisioningFailed", "cloud says no", 100, State.STARTING, "Waiting until the session's volume session-42"),
        ("ProvisioningFailed", "cloud says no", 121, State.FAILED, "(Kubernetes says: cloud says no)"),
        (
            "ProvisioningFailed",
            'storageclass.storage.k8s.io "fast" not found',
            6,
            State.FAILED,
            "no storage class fast",
        ),
        (
            "FailedBinding",
            "no persistent volumes available for this claim and no storage class is set",
            6,
            State.FAILED,
            "no default storage class",
        ),
    ],
)
def test_a_volume_that_is_not_made(
    claims: list[dict[str, Any]], reason: str, message: str, ago: float, state: State, told: str
) -> None:
    unbound = unscheduled("0/1 nodes are available: 1 pod has unbound immediate PersistentVolumeClaims.")
    failed = event(reason, message, kind="PersistentVolumeClaim", name="session-42", ago=ago)
    observation = seen(unbound, claims=claims, events=[failed])
    assert (observation.state, observation.reason) == (state, "VolumeNotBound")
    assert told in observation.message


@pytest.mark.parametrize(
    ("reason", "message", "ago", "state", "word"),
    [
        # So each pod begins where its secrets have not been seen by the kubelet yet.
        (
            "FailedMount",
            "MountVolume.SetUp failed: failed to sync secret cache: timed out",
            3,
            State.STARTING,
            "Creating",
        ),
        (
            "FailedMount",
            'MountVolume.SetUp failed for volume "w" : secret "s" not found',
            3,
            State.STARTING,
            "VolumeMount",
        ),
        (
            "FailedMount",
            'MountVolume.SetUp failed for volume "w" : secret "s" not found',
            6,
            State.FAILED,
            "VolumeMount",
        ),
        ("FailedMount", "Unable to attach or mount volumes: wrong fs type", 100, State.STARTING, "VolumeMount"),
        ("FailedMount", "Unable to attach or mount volumes: wrong fs type", 121, State.FAILED, "VolumeMount"),
        ("FailedAttachVolume", 'Multi-Attach error for volume "pvc-1"', 100, State.STARTING, "VolumeMount"),
        ("FailedAttachVolume", 'Multi-Attach error for volume "pvc-1"', 121, State.FAILED, "VolumeMount"),
        ("FailedCreatePodSandBox", "plugin type calico failed", 100, State.STARTING, "PodSandbox"),
        ("FailedCreatePodSandBox", "plugin type calico failed", 121, State.FAILED, "PodSandbox"),
    ],
)
def test_what_a_node_cannot_set_up(reason: str, message: str, ago: float, state: State, word: str) -> None:
    observation = seen(pod(container("preview", waiting=WAITING)), events=[event(reason, message, ago=ago)])
    assert (observation.state, observation.reason) == (state, word)


def test_a_mount_that_failed_before_the_containers_were_made_does_not_count() -> None:
    failed = event("FailedMount", 'secret "s" not found', ago=20)
    running = pod(container("preview", running=UP))
    assert seen(running, events=[failed]).reason == "Starting"


END = {"exitCode": 1, "reason": "Error", "finishedAt": at(10), "startedAt": at(11)}


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (container("preview", terminated=END), State.STARTING),
        (container("preview", restarts=1, last=END, running=UP), State.STARTING),
        (container("preview", restarts=1, last=END, waiting={"reason": "CrashLoopBackOff"}), State.STARTING),
        (container("preview", restarts=2, terminated=END), State.STARTING),
        (container("preview", restarts=2, last=END, waiting={"reason": "CrashLoopBackOff"}), State.FAILED),
    ],
)
def test_the_third_crash_fails_a_session(status: dict[str, Any], state: State) -> None:
    observation = seen(pod(status))
    assert observation.state is state
    assert observation.reason == ("CrashLoop" if state is State.FAILED else "Restarting")
    assert observation.message.startswith("preview ended with exit code 1")


def test_what_crashed_again_and_again_must_be_up_for_a_while_to_be_believed() -> None:
    for started, state in ((3, State.STARTING), (11, State.RUNNING), (-60, State.RUNNING)):
        status = container("preview", ready=True, restarts=3, last=END, running={"startedAt": at(started)})
        assert seen(pod(status, ready=True)).state is state
    flapping = container("preview", ready=True, restarts=3, last=END, running={"startedAt": at(3)})
    assert seen(pod(flapping, ready=True, ago=5000)).state is State.STARTING
    once = container("preview", ready=True, restarts=1, last=END, running={"startedAt": at(1)})
    assert seen(pod(once, ready=True)).state is State.RUNNING


def test_an_old_crash_does_not_explain_why_a_container_is_not_ready() -> None:
    old = {**END, "finishedAt": at(5000)}
    status = container("preview", restarts=1, last=old, running={"startedAt": at(4999)})
    unhealthy = event(
        "Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 500", container="preview"
    )
    starting = seen(pod(status, ago=100), events=[unhealthy])
    assert starting.message == (
        "0 of 1 containers are ready: waiting for preview (readiness probe of preview: HTTP probe failed with"
        " statuscode: 500)."
    )
    late = seen(pod(status, ago=901), events=[unhealthy])
    assert (late.state, late.reason) == (State.FAILED, "ProbeFailing")


def test_what_a_probe_said_of_an_earlier_run_does_not_count() -> None:
    unhealthy = event("Unhealthy", "Readiness probe failed: no", container="preview", ago=25)
    assert seen(pod(container("preview", running=UP)), events=[unhealthy]).message.endswith("waiting for preview.")


def test_what_cannot_heal_comes_before_what_can() -> None:
    pods = pod(
        container("preview", restarts=1, last=END, waiting={"reason": "CrashLoopBackOff"}),
        container("chat", waiting={"reason": "InvalidImageName"}),
        container("vscode", waiting={"reason": "ErrImageNeverPull"}),
    )
    assert seen(pods).reason == "InvalidImageName"


@pytest.mark.parametrize(
    ("waiting", "state", "reason"),
    [
        ({"reason": "CreateContainerConfigError", "message": "failed to sync configmap cache: timed out"}, 0, None),
        ({"reason": "CreateContainerError", "message": 'name "x" is reserved for "y"'}, 0, None),
        ({"reason": "CreateContainerError", "message": "no command specified"}, 1, None),
        (
            {"reason": "RunContainerError", "message": 'exec: "npm": executable file not found in $PATH: unknown'},
            1,
            "CommandNotFound",
        ),
        ({"reason": "SignatureValidationFailed"}, 1, None),
        ({"reason": "SomethingNew", "message": "of a later version"}, 0, None),
    ],
)
def test_why_a_container_cannot_be_made(waiting: dict[str, str], state: int, reason: str | None) -> None:
    observation = seen(pod(container("preview", waiting=waiting)))
    assert observation.state is (State.FAILED if state else State.STARTING)
    assert observation.reason == (reason or waiting["reason"])


# -- pods that go


def test_a_pod_that_is_gone_is_being_replaced() -> None:
    deleted = pod(container("preview", ready=True, running=UP), name="session-42-new-00001", ready=True, deleted=2)
    assert seen(deleted) == Observation(
        State.STARTING,
        "Replacing",
        "The session's pod was deleted, and is being replaced: Kubernetes is making the session's pod.",
    )
    new = pod(container("preview", waiting=WAITING), ago=1)
    assert seen(deleted, new).message == (
        "The session's pod was deleted, and is being replaced: The containers are being made on the node node-1."
    )


@pytest.mark.parametrize(
    ("more", "events", "reason", "told"),
    [
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory. "},
            [],
            "Evicted",
            "The session's pod was evicted (node node-1): The node was low on resource: memory, and is being replaced",
        ),
        (
            {"deleted": 2, "conditions": [condition("DisruptionTarget", "True", "EvictionByEvictionAPI")]},
            [],
            "Evicted",
            "was evicted (node node-1), and is",
        ),
        (
            {"deleted": 2, "conditions": [condition("DisruptionTarget", "True", "PreemptionByScheduler")]},
            [],
            "Preempted",
            "had to make room for one of higher priority",
        ),
        ({"deleted": 2}, [event("Preempted", "by ns/other on node-1")], "Preempted", "had to make room"),
        ({"deleted": 2}, [event("TaintManagerEviction", "Marking for deletion")], "NodeLost", "was lost with its node"),
        ({"deleted": 2, "reason": "NodeLost"}, [], "NodeLost", "was lost with its node"),
        ({"phase": "Failed", "reason": "NodeShutdown"}, [], "NodeShutdown", "since its node shuts down"),
        ({"phase": "Failed", "reason": "OutOfcpu", "message": "Node didn't have enough"}, [], "OutOfcpu", "pod failed"),
    ],
)
def test_why_a_pod_went_is_told(more: dict[str, Any], events: list[dict[str, Any]], reason: str, told: str) -> None:
    observation = seen(pod(**more), events=events)
    assert (observation.state, observation.reason) == (State.STARTING, reason)
    assert told in observation.message


def test_pods_that_fail_one_after_the_other_fail_the_session() -> None:
    evicted = [
        pod(name=f"session-42-new-0000{n}", phase="Failed", reason="Evicted", message="low on memory", ago=10 * n + 5)
        for n in range(3)
    ]
    assert seen(*evicted[:2]).state is State.STARTING
    failed = seen(*evicted)
    assert (failed.state, failed.reason) == (State.FAILED, "Evicted")
    assert "low on memory, 3 times in a row; ask for more memory" in failed.message
    for one in evicted:
        one["metadata"]["creationTimestamp"] = at(86400)
    # Kubernetes keeps failed pods for long: what is there now counts.
    assert seen(*evicted, pod(container("preview", waiting=WAITING))).reason == "Creating"


def test_a_lost_node_is_told() -> None:
    ready = container("preview", ready=True, running=UP)
    unknown = pod(ready, phase="Running", conditions=[condition("Ready", "Unknown", "NodeStatusUnknown")])
    assert seen(unknown).reason == "NodeLost"
    away = pod(ready, phase="Running", conditions=[condition("Ready", "False")])
    assert seen(away, events=[event("NodeNotReady", "Node is not ready")]).reason == "NodeLost"


def test_a_node_that_is_silent_for_a_moment_is_not_lost() -> None:
    """As after an outage of the API server, when each node's last word is older than Kubernetes takes it to be well."""
    ready = container("preview", ready=True, running=UP)

    def silent(ago: float, reason: str = "") -> Observation:
        conditions = [condition("ContainersReady", "True", ago=900), condition("Ready", "False", reason, ago=ago)]
        return seen(pod(ready, phase="Running", conditions=conditions))

    assert silent(90).state is State.RUNNING
    assert silent(150).state is State.STARTING
    assert silent(3, "ReadinessGatesNotReady").state is State.STARTING


def test_a_session_without_progress_fails() -> None:
    hangs = pod(container("preview", running=UP), ago=901)
    failed = seen(hangs)
    assert failed == Observation(
        State.FAILED,
        "NoProgress",
        "The session has made no progress for 15 minutes, the last was: 0 of 1 containers are ready: waiting for"
        " preview; start it again, or have an operator look at the cluster.",
    )
    timed_out = condition("Progressing", "False", "ProgressDeadlineExceeded", 'ReplicaSet "session-42-new" timed out')
    assert seen(pod(container("preview", running=UP)), deployments=[deployment(timed_out)]).reason == "NoProgress"
    none = condition("Available", "False", ago=901)
    assert seen(deployments=[deployment(none, updated=0)]).reason == "NoProgress"


# -- the namespace


def test_what_is_not_there_is_absent() -> None:
    assert seen(namespace=None, deployments=[]).state is State.ABSENT
    assert seen(deployments=[]) == Observation(
        State.ABSENT, "Absent", "Its namespace is there, and nothing runs in it."
    )
    going = deployment()
    going["metadata"]["deletionTimestamp"] = at(1)
    assert seen(deployments=[going]).state is State.ABSENT


def test_a_namespace_of_somebody_else_holds_nothing_of_ours() -> None:
    good = pod(container("preview", ready=True, running=UP), ready=True)
    for labels in ({}, {**LABELS, "cluster-code.io/instance": "other"}, {**LABELS, "cluster-code.io/project": "x"}):
        taken = seen(good, namespace={"metadata": {"name": NAMESPACE, "labels": labels}})
        assert (taken.state, taken.reason) == (State.ABSENT, "NamespaceTaken")


def test_scaled_to_zero_is_stopped() -> None:
    zero = deployment(replicas=0, updated=0, unavailableReplicas=0)
    assert seen(deployments=[zero]) == Observation(State.STOPPED, "Stopped", "Its files are there; nothing runs.")
    ending = pod(container("preview", ready=True, running=UP), ready=True, deleted=1)
    assert seen(ending, deployments=[zero]).reason == "Stopping"
    failed = pod(phase="Failed", reason="Evicted")
    assert seen(failed, deployments=[zero]).reason == "Stopped"


def test_a_namespace_that_hangs_says_why() -> None:
    conditions = [
        condition("NamespaceDeletionDiscoveryFailure", "False", "ResourcesDiscovered", "All resources discovered"),
        condition("NamespaceContentRemaining", "True", "x", "Some resources are remaining: pods. has 1 resource"),
        condition("NamespaceFinalizersRemaining", "True", "x", "Some content has finalizers: example.com/never"),
    ]
    namespace = {
        "metadata": {"name": NAMESPACE, "labels": LABELS, "deletionTimestamp": at(9)},
        "status": {"phase": "Terminating", "conditions": conditions},
    }
    hangs = seen(namespace=namespace)
    assert (hangs.state, hangs.reason) == (State.ABSENT, "NamespaceTerminating")
    assert "(Kubernetes says: Some content has finalizers: example.com/never)" in hangs.message


# -- refusals


@pytest.mark.parametrize(
    ("status", "reason", "message", "kind", "word", "told"),
    [
        (
            403,
            "Forbidden",
            (
                'deployments.apps is forbidden: User "system:serviceaccount:cc:orchestrator" cannot create resource'
                ' "deployments" in API group "apps" in the namespace "n"'
            ),
            ProviderFailure,
            "Forbidden",
            (
                "Cluster Code may not create deployments.apps in the namespace n; have an operator grant the verb"
                " create on"
                " deployments.apps to system:serviceaccount:cc:orchestrator"
            ),
        ),
        (
            403,
            "Forbidden",
            'namespaces is forbidden: User "u" cannot list resource "namespaces" in API group "" at the cluster scope',
            ProviderFailure,
            "Forbidden",
            "may not list namespaces in the cluster",
        ),
        (
            403,
            "Forbidden",
            (
                'services "s" is forbidden: exceeded quota: q, requested: services=1, used: services=3, limited:'
                " services=3"
            ),
            ProviderFailure,
            "QuotaExceeded",
            "services 1 requested, 3 of 3 used",
        ),
        (
            403,
            "Forbidden",
            'secrets "s" is forbidden: unable to create new content in namespace n because it is being terminated',
            ProviderFailure,
            "NamespaceTerminating",
            "is being deleted",
        ),
        (403, "Forbidden", "no", ProviderFailure, "Forbidden", "(RBAC)"),
        (404, "NotFound", 'deployments.apps "x" not found', ProviderFailure, "NotFound", "deleted by hand"),
        (409, "Conflict", "the object has been modified", ProviderFailure, "Conflict", "try again"),
        (
            422,
            "Invalid",
            "spec.replicas: Invalid value: -1",
            ProviderFailure,
            "Invalid",
            "spec.replicas: Invalid value",
        ),
        (413, "", "", ProviderFailure, "ApiRefused", "smaller"),
        (418, "Teapot", "short", ProviderFailure, "Teapot", "ask an operator"),
        (401, "Unauthorized", "Unauthorized", ProviderUnavailable, None, "HTTP 401"),
        (500, "InternalError", "etcdserver: timed out", ProviderUnavailable, None, "etcdserver: timed out"),
    ],
)
def test_a_refusal_of_the_api_is_told(
    status: int, reason: str, message: str, kind: type[Exception], word: str | None, told: str
) -> None:
    failure = api_failure(ApiRefused(status, reason, message), "start the session")
    assert type(failure) is kind
    assert told in str(failure)
    assert str(failure).endswith(".")
    assert getattr(failure, "reason", None) == word


# -- what is seen of a pod


def test_the_summary_of_a_pod() -> None:
    ended = {"exitCode": 3, "reason": "Error", "finishedAt": at(9)}
    back_off = {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container=chat pod=x_y(z)"}
    one = pod(
        container("preview", ready=True, running=UP),
        container("chat", restarts=2, last=ended, waiting=back_off),
        container("vscode"),
        inits=[container("clone", ready=True, terminated={"exitCode": 0, "reason": "Completed"})],
        phase="Running",
    )
    assert summary(msgspec.convert(one, Pod)) == {
        "phase": "Running",
        "ready": False,
        "node": "node-1",
        "reason": "",
        "message": "",
        "containers": [
            {"name": "clone", "init": True, "ready": True, "state": "terminated", "reason": "Completed", "message": "",
             "restarts": 0, "exit_code": 0},
            {"name": "preview", "init": False, "ready": True, "state": "running", "reason": "", "message": "",
             "restarts": 0, "exit_code": None},
            {"name": "chat", "init": False, "ready": False, "state": "waiting", "reason": "CrashLoopBackOff",
             "message": "The last time it ended with exit code 3.", "restarts": 2, "exit_code": 3},
            {"name": "vscode", "init": False, "ready": False, "state": "unknown", "reason": "", "message": "",
             "restarts": 0, "exit_code": None},
        ],
    }  # fmt: skip


def test_what_nobody_sees_changes_no_summary() -> None:
    one = pod(container("preview", ready=True, running=UP), container("chat", waiting=WAITING))
    other = json.loads(json.dumps(one))
    other["metadata"]["resourceVersion"] = "99"
    other["status"]["conditions"][0]["lastTransitionTime"] = at(1)
    other["status"]["containerStatuses"].reverse()
    other["status"]["containerStatuses"][1]["state"]["running"]["startedAt"] = at(2)
    assert summary(msgspec.convert(one, Pod)) == summary(msgspec.convert(other, Pod))
    other["status"]["containerStatuses"][0]["restartCount"] = 1
    assert summary(msgspec.convert(one, Pod)) != summary(msgspec.convert(other, Pod))


def test_the_summary_says_why_a_pod_waits_or_goes() -> None:
    waiting = summary(msgspec.convert(unscheduled(FULL), Pod))
    assert (waiting["reason"], waiting["message"]) == ("Unschedulable", FULL.rstrip("."))
    assert summary(msgspec.convert(pod(deleted=1), Pod))["reason"] == "Terminating"


def test_credentials_are_not_passed_on() -> None:
    said = (
        "GET https://me:hunter2@registry.example.com/v2?token=abcdefghijklmnop Authorization: Bearer abcdefghijklmnop"
    )
    assert symptoms.plain(said) == "GET https://***@registry.example.com/v2?token=*** Authorization: Bearer ***"


# -- whatever it is, something is told

_WORDS = st.sampled_from(
    ["", "ErrImagePull", "ImagePullBackOff", "CrashLoopBackOff", "CreateContainerConfigError", "RunContainerError",
     "InvalidImageName", "OOMKilled", "Error", "Evicted", "StartError", "ContainerCreating", "FailedScheduling",
     "Unschedulable", "SchedulingGated", "ProgressDeadlineExceeded", "FailedMount", "Unhealthy", "Killing", "Failed",
     "TriggeredScaleUp", "ProvisioningFailed", "Preempted", "FailedPostStartHook", "PreemptionByScheduler"]
)  # fmt: skip
_MESSAGES = st.one_of(
    st.text(max_size=60),
    st.sampled_from([case["message"] for objects in RECORDED.values() for case in objects["events"]] or [""]),
    st.sampled_from(
        ["exceeded quota: a, requested: , used: =, limited: x", "0/ nodes are available: Insufficient ", 'exec: "": ',
         "Readiness probe failed: ", 'User "" cannot  resource ""', "0/0 nodes are available: Insufficient cpu",
         'ReplicaSet "session-42-new" timed out', "pod has unbound immediate PersistentVolumeClaims"]
    ),
)  # fmt: skip
_TIMES = st.one_of(st.none(), st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1)),
                   st.datetimes(datetime(2026, 11, 21), datetime(2026, 11, 22), timezones=st.just(UTC)))  # fmt: skip
_NAMES = st.sampled_from(["preview", "chat", "session-42", "session-42-new", "session-42-new-abcde", ""])
_CONDITIONS = st.sampled_from(
    ["Ready", "PodScheduled", "Progressing", "ReplicaFailure", "Available", "DisruptionTarget",
     "NamespaceContentRemaining"]
)  # fmt: skip
_PHASES = st.sampled_from(["Pending", "Running", "Failed", "Succeeded", "Unknown", "Terminating", "Bound", ""])


def _any_object(kind: type) -> st.SearchStrategy[Any]:
    """Any struct of the kind, of words that mean something and of those that mean nothing."""
    return st.fixed_dictionaries(
        {}, optional={field.name: _any_value(kind, field) for field in msgspec.structs.fields(kind)}
    ).map(lambda fields: kind(**fields))


def _any_value(owner: type, field: msgspec.structs.FieldInfo) -> st.SearchStrategy[Any]:
    name, typed = field.name, msgspec.inspect.type_info(field.type)
    if name == "owner_references":
        owned = st.sampled_from(["session-42-new", "session-42-old", "x"])
        kind = field.type.__args__[0]
        return owned.map(lambda one: [kind(kind="ReplicaSet", name=one)])
    if name == "labels":
        return st.sampled_from([{}, LABELS])
    named = {
        "phase": _PHASES, "reason": _WORDS, "message": _MESSAGES, "name": _NAMES, "image": _MESSAGES,
        "status": st.sampled_from(["True", "False", "Unknown", ""]), "type": _CONDITIONS,
        "field_path": st.sampled_from(["spec.containers{preview}", "", "x"]),
        "kind": st.sampled_from(["Pod", "PersistentVolumeClaim", "ReplicaSet"]),
        "replicas": st.integers(0, 2), "exit_code": st.integers(-1, 300), "signal": st.integers(-5, 2**31),
    }  # fmt: skip
    if name in named and not isinstance(typed, msgspec.inspect.StructType):
        return named[name]
    return _any(typed)


def _any(typed: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    if isinstance(typed, msgspec.inspect.StructType):
        return st.deferred(lambda: _any_object(typed.cls))
    if isinstance(typed, msgspec.inspect.ListType):
        return st.lists(_any(typed.item_type), max_size=2)
    if isinstance(typed, msgspec.inspect.DictType):
        return st.just({})
    if isinstance(typed, msgspec.inspect.UnionType):
        if any(isinstance(one, msgspec.inspect.DateTimeType) for one in typed.types):
            return _TIMES
        return st.one_of(*(_any(one) for one in typed.types))
    if isinstance(typed, msgspec.inspect.NoneType):
        return st.none()
    if isinstance(typed, msgspec.inspect.BoolType):
        return st.booleans()
    if isinstance(typed, msgspec.inspect.IntType):
        return st.integers(0, 4)
    return _NAMES


_RANDOM = settings(deadline=None, suppress_health_check=list(HealthCheck))


@_RANDOM
@given(
    namespace=st.one_of(
        st.none(), st.just(msgspec.convert({"metadata": {"name": NAMESPACE, "labels": LABELS}}, Namespace))
    ),
    one=st.one_of(st.just(msgspec.convert(deployment(), Deployment)), _any_object(Deployment)),
    pods=st.lists(_any_object(Pod), max_size=3),
    events=st.lists(_any_object(Event), max_size=3),
    claims=st.lists(_any_object(Claim), max_size=2),
    words=_MESSAGES,
    overdue=st.booleans(),
)
def test_whatever_is_seen_something_is_told(
    namespace: Namespace | None,
    one: Deployment,
    pods: list[Pod],
    events: list[Event],
    claims: list[Claim],
    words: str,
    overdue: bool,
) -> None:
    evidence = Evidence(namespace, one, pods, events, claims)
    logs = {one: [words] for one in crashed(evidence)}
    evidence = Evidence(namespace, one, pods, events, claims, logs)
    rules = Rules(
        frozenset({"FailedScheduling", words}), 0.0 if overdue else 60.0, 1.0 if overdue else 1e9, "cluster-code"
    )
    observation = diagnose(evidence, rules, NOW)
    assert observation == diagnose(evidence, rules, NOW)
    assert observation.message.endswith(".")
    assert observation.reason
    assert len(observation.message) < 2500
    assert json.dumps([summary(pod) for pod in pods])


@_RANDOM
@given(
    namespace=_any_object(Namespace), status=st.integers(100, 599), reason=_WORDS, message=_MESSAGES, doing=_MESSAGES
)
def test_whatever_the_api_says_something_is_told(
    namespace: Namespace, status: int, reason: str, message: str, doing: str
) -> None:
    failure = api_failure(ApiRefused(status, reason, message), doing)
    assert str(failure).endswith(".")
    assert diagnose(Evidence(namespace, None), RULES, NOW).message.endswith(".")


def test_the_account_that_kubernetes_makes_itself_is_waited_for() -> None:
    """After an outage of the API its controllers take a while."""
    recorded = json.loads(json.dumps(RECORDED["noserviceaccount"]).replace("nope", "default"))
    evidence = evidence_of(recorded)
    assert evidence.deployment is not None
    since = evidence.deployment.status.conditions[-1].last_transition_time
    assert since is not None
    early, late = (diagnose(evidence, RULES, since + timedelta(seconds=seconds)) for seconds in (60, 180))
    assert (early.state, late.state) == (State.STARTING, State.FAILED)
    assert late.message == (
        "The service account default is not there; Kubernetes makes it by itself, so wait, or have an operator look"
        " at its controllers."
    )
