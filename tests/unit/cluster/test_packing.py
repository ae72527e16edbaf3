"""What is held of an object is all of it, in fewer bytes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from orchestrator.cluster import objects
from orchestrator.cluster.packing import Packing

_AT = datetime(2026, 3, 1, 8, 0, 0, 123456, tzinfo=UTC)
_META = objects.Meta(
    name="a",
    namespace="one",
    uid="1-2-3",
    resource_version="12",
    creation_timestamp=_AT,
    labels={"some": "label"},
    finalizers=["kubernetes"],
    owner_references=[objects.Owner("ReplicaSet", "a", "4-5-6")],
)
_STATE = objects.ContainerState(terminated=objects.Terminated(exit_code=137, reason="OOMKilled", finished_at=_AT))
_POD = objects.Pod(
    metadata=_META,
    spec=objects.PodSpec("node", [objects.Container("main", "busybox")]),
    status=objects.PodStatus(
        phase="Running",
        conditions=[objects.Condition("Ready", "False", last_transition_time=_AT)],
        container_statuses=[objects.ContainerStatus("main", "busybox", restart_count=3, last_state=_STATE)],
    ),
)


@pytest.mark.parametrize(
    "thing",
    [
        _POD,
        objects.Pod(),
        objects.Deployment(_META, objects.DeploymentSpec(0)),
        objects.Event(_META, series=objects.Series(3, _AT), count=None),
        objects.Namespace(_META),
        objects.Ingress(_META, objects.IngressSpec(rules=[objects.IngressRule("a.test", objects.IngressHttp())])),
        objects.Service(_META, objects.ServiceSpec(ports=[objects.ServicePort("web", 80)])),
        objects.Claim(_META),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_an_object_comes_back_as_it_was(thing: Any) -> None:
    packing = Packing(type(thing))
    assert packing.unpack(packing.pack(thing)) == thing


def test_a_packed_object_has_no_names_of_fields_and_does_not_change_with_the_next() -> None:
    packing = Packing(objects.Pod)
    packed = packing.pack(_POD)
    kept = bytes(bytearray(packed))
    packing.pack(objects.Pod(metadata=objects.Meta(name="another" * 100)))
    assert packed == kept
    assert b"restartCount" not in packed
    assert len(packed) < 0.7 * len(msgspec.msgpack.encode(_POD))
