"""What a person sees of an event in a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from scripts import display

_HEAD = {
    "session_id": 42, "provider": "k8s", "namespace": "0b9f", "uid": "3a1c", "resource_version": "1",
    "change": "modified",
}  # fmt: skip


def container(name: str, state: str, **more: Any) -> dict[str, Any]:
    usual = {"init": False, "ready": False, "reason": "", "message": "", "restarts": 0, "exit_code": None}
    return {"name": name, "state": state, **usual, **more}


def pod(*containers: dict[str, Any], **more: Any) -> dict[str, Any]:
    usual = {"pod": "s-42-x", "phase": "Pending", "ready": False, "node": "", "reason": "", "message": ""}
    return {**_HEAD, **usual, "containers": list(containers), **more}


CASES: list[tuple[str, Any, str]] = [
    ("session.status", {"status": "running", "reason": "Ready", "message": "It runs."}, "running   Ready It runs."),
    ("session.log", {"line": "hello", "stream": "stderr"}, "hello"),
    ("session.pod", pod(change="added"), "+ s-42-x Pending"),
    (
        "session.pod",
        pod(reason="Unschedulable", message="0/1 nodes are available."),
        "~ s-42-x Pending Unschedulable 0/1 nodes are available.",
    ),
    (
        "session.pod",
        pod(
            container("clone", "terminated", init=True, reason="Completed", exit_code=0),
            container("preview", "waiting", reason="CrashLoopBackOff", restarts=3, exit_code=1),
            container("chat", "running", ready=True, restarts=1, exit_code=137),
            container("vscode", "waiting", reason="ContainerCreating"),
            container("shell", "terminated", reason="OOMKilled", exit_code=137),
            phase="Running",
        ),
        (
            "~ s-42-x Running · preview CrashLoopBackOff exit 1 (3 restarts) · chat ready (1 restart)"
            " · vscode ContainerCreating · shell terminated OOMKilled exit 137"
        ),
    ),
    ("session.pod", pod(change="deleted", phase="Succeeded", node="n1"), "- s-42-x Succeeded on n1"),
    (
        "session.event",
        _HEAD | {"type": "Warning", "reason": "BackOff", "object": "Pod/s-42-x", "container": "preview", "count": 3,
                 "message": "Back-off."},
        "BackOff Pod/s-42-x [preview] (3 times) Back-off.",
    ),
    (
        "session.event",
        _HEAD | {"type": "Normal", "reason": "Pulled", "object": "Pod/s-42-x", "container": "", "count": 1,
                 "message": "There."},
        "Pulled Pod/s-42-x There.",
    ),
    ("cluster.deployment", _HEAD | {"deployment": "s-42", "replicas": 1, "ready_replicas": 0}, "~ s-42 0/1 ready"),
    ("cluster.namespace", _HEAD | {"phase": "Terminating"}, "~ 0b9f Terminating"),
    (
        "cluster.ingress",
        _HEAD | {"ingress": "s-42", "hosts": ["a.example.com"], "addresses": []},
        "~ s-42 a.example.com at no address yet",
    ),
    ("build.done", {"image": "x"}, '{"image":"x"}'),
    # Of another service, which may send anything.
    ("session.pod", {"pod": "x"}, '{"pod":"x"}'),
    ("session.event", ["x"], '["x"]'),
    ("session.log", None, "null"),
]  # fmt: skip


@pytest.mark.parametrize(("event_type", "data", "shown"), CASES)
def test_an_event_is_one_line(event_type: str, data: Any, shown: str) -> None:
    message = {"event_type": event_type, "channel": "session:42", "data": data, "offset": 7}
    assert display.line(message).plain == f"{7:>6} {event_type:<16} {'session:42':<14} {shown}"


def test_what_needs_a_look_stands_out() -> None:
    fine = display.line({"event_type": "session.pod", "channel": "c", "data": pod(container("chat", "running"))})
    assert "red" not in {str(span.style) for span in fine.spans}
    bad = pod(container("chat", "waiting", reason="ErrImagePull"))
    assert "red" in {
        str(span.style) for span in display.line({"event_type": "session.pod", "channel": "c", "data": bad}).spans
    }
