"""The cluster of the watch's benchmark: `tests.kubernetes` in a process of its own, with sessions' pods that change.

    python -m tests.benchmarks.cluster PORT PODS HISTORY

It prints `ready` once the pods are there, and is told on its standard input, a line each:

    change N RATE   change what can be seen of pods, N in all, RATE a second; answers `done` with the seconds it took
    touch N RATE    change pods so that nobody sees it
    expire          forget the history, and tell the open watches; answers `done 0`
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import Callable
from random import Random
from typing import Any

from orchestrator.cluster.objects import INSTANCE, PROJECT, SESSION
from tests.kubernetes import DEPLOYMENTS, NAMESPACES, PODS, KubernetesApi

Json = dict[str, Any]

# Where a pod says when it was changed: CLOCK_MONOTONIC in nanoseconds, which all processes share.
STAMP = "changed-at:"
_AT_ONCE = 4
# One visible change in so many takes a pod's readiness away, or gives it back.
_UNREADY = 10


def project(number: int) -> str:
    """The UUID of the project of a session, and the name of its namespace."""
    return str(uuid.UUID(int=Random(number).getrandbits(128), version=4))


def _labels(number: int) -> dict[str, str]:
    return {INSTANCE: "cluster-code", PROJECT: project(number), SESSION: str(number)}


def surroundings(number: int) -> list[tuple[str, Json]]:
    """The collection of each object that a session has beside its pod, and the object."""
    available = {"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable"}
    counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), 1)
    deployment = {
        "metadata": {"name": f"session-{number}", "namespace": project(number), "labels": _labels(number)},
        "spec": {"replicas": 1},
        "status": counts | {"observedGeneration": 1, "conditions": [available]},
    }
    namespace = {"metadata": {"name": project(number), "labels": _labels(number)}, "status": {"phase": "Active"}}
    return [(NAMESPACES, namespace), (DEPLOYMENTS, deployment)]


def pod(number: int) -> Json:
    """The pod of one session as a cluster shows it, about 9 KB of JSON, a third of them managed fields."""
    random = Random(number)
    project_uuid = str(uuid.UUID(int=random.getrandbits(128), version=4))
    name = f"session-{number}-{random.getrandbits(36):09x}-{random.getrandbits(20):05x}"
    labels = _labels(number) | {
        "app.kubernetes.io/name": "dev-session-template",
        "app.kubernetes.io/instance": f"session-{number}",
        "pod-template-hash": f"{random.getrandbits(36):09x}",
    }
    metadata: Json = {
        "name": name,
        "generateName": name[:-5],
        "namespace": project_uuid,
        "uid": str(uuid.UUID(int=random.getrandbits(128), version=4)),
        "creationTimestamp": "2026-03-01T08:00:00Z",
        "labels": labels,
        "annotations": {"checksum/env": f"{random.getrandbits(256):064x}", "cni.example/podIP": "10.42.7.19/32"},
        "ownerReferences": [
            {
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "name": name[:-6],
                "uid": str(uuid.UUID(int=random.getrandbits(128), version=4)),
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
    ports = {"preview": 3000, "chat": 3001, "vscode": 8080}
    spec: Json = {
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": f"session-{number}"}},
        ],
        "containers": [_container(service, port) for service, port in ports.items()],
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 30,
        "dnsPolicy": "ClusterFirst",
        "serviceAccountName": "default",
        "automountServiceAccountToken": False,
        "nodeName": f"node-{number % 200}.example.internal",
        "securityContext": {"runAsUser": 1000, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "schedulerName": "default-scheduler",
        "priority": 0,
        "enableServiceLinks": False,
        "preemptionPolicy": "PreemptLowerPriority",
    }
    status: Json = {
        "phase": "Running",
        "conditions": [
            {"type": kind, "status": "True", "lastProbeTime": None, "lastTransitionTime": "2026-03-01T08:00:09Z"}
            for kind in ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
        ],
        "hostIP": "10.0.3.17",
        "podIP": "10.42.7.19",
        "startTime": "2026-03-01T08:00:00Z",
        "containerStatuses": [_status(random, service) for service in ports],
        "qosClass": "Burstable",
    }
    metadata["managedFields"] = [
        _managed("kube-controller-manager", "", {"metadata": {"labels": labels}, "spec": spec}),
        _managed("kubelet", "status", {"status": status}),
    ]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}


def _container(name: str, port: int) -> Json:
    return {
        "name": name,
        "image": f"registry.example.com/cluster-code/{name}:1.42.0",
        "command": ["/usr/local/bin/start", name],
        "ports": [{"name": name, "containerPort": port, "protocol": "TCP"}],
        "envFrom": [{"secretRef": {"name": "session-env"}}],
        "env": [{"name": "PORT", "value": str(port)}],
        "resources": {"limits": {"cpu": "1", "memory": "2Gi"}, "requests": {"cpu": "100m", "memory": "256Mi"}},
        "volumeMounts": [{"name": "workspace", "mountPath": "/workspace"}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": port}, "periodSeconds": 10},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "imagePullPolicy": "IfNotPresent",
        "securityContext": {"allowPrivilegeEscalation": False},
    }


def _status(random: Random, name: str) -> Json:
    return {
        "name": name,
        "state": {"running": {"startedAt": "2026-03-01T08:00:08Z"}},
        "lastState": {},
        "ready": True,
        "restartCount": 0,
        "image": f"registry.example.com/cluster-code/{name}:1.42.0",
        "imageID": f"registry.example.com/cluster-code/{name}@sha256:{random.getrandbits(256):064x}",
        "containerID": f"containerd://{random.getrandbits(256):064x}",
        "started": True,
    }


def _managed(manager: str, part: str, fields: Json) -> Json:
    entry = {
        "manager": manager,
        "operation": "Update",
        "apiVersion": "v1",
        "time": "2026-03-01T08:00:09Z",
        "fieldsType": "FieldsV1",
        "fieldsV1": _fields(fields),
    }
    return entry | ({"subresource": part} if part else {})


def _fields(value: Json) -> Json:
    """The paths of all that is in an object, in the form of server-side apply."""
    found: Json = {}
    for key, inside in value.items():
        listed = isinstance(inside, list) and isinstance(inside[0], dict) and key != "containerStatuses"
        if isinstance(inside, dict):
            found[f"f:{key}"] = _fields(inside)
        elif listed and (by := "type" if key == "conditions" else "name") in inside[0]:
            found[f"f:{key}"] = {f'k:{{"{by}":"{one[by]}"}}': {".": {}} | _fields(one) for one in inside}
        else:
            found[f"f:{key}"] = {}
    return found


def changed(one: Json, turn: int) -> Json:
    """The pod after another restart, perhaps with a container that is not ready yet, and when this was."""
    status = one["status"]
    waits = turn % _UNREADY == 0
    first = status["containerStatuses"][0] | {"ready": not waits, "restartCount": turn}
    ready = ("Ready", "ContainersReady")
    conditions = [
        condition | {"status": str(not waits)} if condition["type"] in ready else condition
        for condition in status["conditions"]
    ]
    seen = {"containerStatuses": [first, *status["containerStatuses"][1:]], "conditions": conditions}
    return one | {"status": status | seen | {"message": f"{STAMP}{time.monotonic_ns()}"}}


def touched(one: Json, turn: int) -> Json:
    """The pod with another annotation."""
    metadata = one["metadata"]
    return one | {"metadata": metadata | {"annotations": metadata["annotations"] | {"turn": str(turn)}}}


async def _change(
    api: KubernetesApi, pods: list[Json], change: Callable[[Json, int], Json], count: int, rate: float
) -> float:
    begun = time.monotonic()
    for number in range(count):
        index = number * 7919 % len(pods)
        pods[index] = api.put(PODS, change(pods[index], number))
        if number % _AT_ONCE == _AT_ONCE - 1:
            # Late ones follow at once: the rate is kept over the whole.
            await asyncio.sleep(max(0.0, begun + (number + 1) / rate - time.monotonic()))
    return time.monotonic() - begun


async def main(port: int, count: int, history: int) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with KubernetesApi(port=port, history=history) as api:
        pods = [api.put(PODS, pod(number)) for number in range(1, count + 1)]
        for number in range(1, count + 1):
            for collection, thing in surroundings(number):
                api.put(collection, thing)
        print("ready", flush=True)
        while line := (await reader.readline()).split():
            took = 0.0
            if line[0] in (b"change", b"touch"):
                change = changed if line[0] == b"change" else touched
                took = await _change(api, pods, change, int(line[1]), float(line[2]))
            elif line[0] == b"expire":
                api.expire()
            print("done", took, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:4])))
