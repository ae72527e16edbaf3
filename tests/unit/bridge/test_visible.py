"""What can be seen of objects, without any cluster."""

from __future__ import annotations

import orjson

from orchestrator.bridge.visible import DEPLOYMENT, EVENT, look
from orchestrator.cluster.objects import Condition, Deployment, DeploymentStatus, Event

PULL = 'Failed to pull image "app": Get "https://ann:hunter2@registry.example.org/v2/": no route to host.'


def test_what_kubernetes_says_is_told_without_the_credentials_in_it() -> None:
    body, _ = look(EVENT, Event(message=PULL))
    assert orjson.loads(b"{" + body)["message"] == PULL.replace("ann:hunter2", "***")
    status = DeploymentStatus(conditions=[Condition(message=PULL)])
    body, _ = look(DEPLOYMENT, Deployment(status=status))
    assert b"hunter2" not in body


def test_what_kubernetes_says_at_length_is_cut() -> None:
    body, _ = look(EVENT, Event(message="x" * 100_000))
    assert len(body) < 2000
