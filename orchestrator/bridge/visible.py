"""What can be seen of an object: the small JSON that is told of it, and a digest that says whether it is news.

    {"session_id": 42, "provider": "kubernetes", "namespace": "…", "change": "modified", "uid": "…",
     "resource_version": "123", "pod": "session-42-…", "phase": "Running", …}

The head says whose it is and of which version; the digest is of the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Any

import orjson

from orchestrator import events
from orchestrator.cluster.objects import PROJECT, SESSION, Condition, Deployment, Event, Ingress, Meta, Namespace
from orchestrator.providers import diagnosis, symptoms

# Bytes of what Kubernetes says of an object.
_MESSAGE = 1024
# `spec.containers{preview}`
_CONTAINER = re.compile(r"\{([^}]*)\}")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of object: what the table calls it, what is told of it, and how it looks."""

    name: str
    event_type: str
    look: Callable[[Any], dict[str, Any]]
    # Told on the channel of its session, too.
    to_session: bool = False
    # Told by its own name, under the name of its kind.
    named: bool = True


def session_id(meta: Meta) -> int | None:
    """Whose it is, by its labels. They are ours only where the namespace is the project's."""
    labels = meta.labels
    number = labels.get(SESSION, "")
    if labels.get(PROJECT) != (meta.namespace or meta.name) or not number.isdecimal() or len(number) > 18:
        return None
    return int(number)


def look(kind: Kind, thing: Any) -> tuple[bytes, int]:
    """What is told of an object beside its head, as JSON without the opening brace; and its digest, of 64 bits."""
    body = orjson.dumps(kind.look(thing), option=orjson.OPT_UTC_Z)[1:]
    return body, int.from_bytes(blake2b(body, digest_size=8).digest(), signed=True)


def told(kind: Kind, provider: bytes, session: int | None, change: str, meta: Meta, body: bytes) -> str:
    """The whole JSON. `provider` is its name as JSON; Kubernetes' own names need no escaping."""
    name = f'"{kind.name}":"{meta.name}",' if kind.named else ""
    head = (
        f'{{"session_id":{"null" if session is None else session},"provider":{provider.decode()},'
        f'"namespace":"{meta.namespace or meta.name}","change":"{change}","uid":"{meta.uid}",'
        f'"resource_version":"{meta.resource_version}",{name}'
    )
    return head + body.decode()


def gone(told: str) -> str:
    """The same JSON of an object that was found to be gone."""
    return orjson.dumps({**orjson.loads(told), "change": "deleted"}).decode()


def last_seen(event: Event) -> datetime | None:
    """When a Kubernetes Event was last reported."""
    series = event.series.last_observed_time if event.series else None
    return series or event.last_timestamp or event.event_time or event.metadata.creation_timestamp


def _event(event: Event) -> dict[str, Any]:
    about = event.involved_object
    container = _CONTAINER.search(about.field_path)
    return {
        "type": event.type,
        "reason": event.reason,
        "message": symptoms.masked(event.message, _MESSAGE),
        "count": event.series.count if event.series else event.count or 1,
        "object": f"{about.kind}/{about.name}",
        "container": container[1] if container else "",
        "first_seen": event.first_timestamp or event.event_time,
        "last_seen": last_seen(event),
    }


def _deployment(deployment: Deployment) -> dict[str, Any]:
    status = deployment.status
    return {
        "replicas": deployment.spec.replicas,
        "ready_replicas": status.ready_replicas,
        "available_replicas": status.available_replicas,
        "conditions": [_condition(condition) for condition in status.conditions],
    }


def _condition(condition: Condition) -> dict[str, str]:
    return {
        "type": condition.type,
        "status": condition.status,
        "reason": condition.reason,
        "message": symptoms.masked(condition.message, _MESSAGE),
    }


def _namespace(namespace: Namespace) -> dict[str, Any]:
    return {"phase": namespace.status.phase}


def _ingress(ingress: Ingress) -> dict[str, Any]:
    return {
        "hosts": [rule.host for rule in ingress.spec.rules],
        "addresses": [address.ip or address.hostname for address in ingress.status.load_balancer.ingress],
    }


POD = Kind("pod", events.SESSION_POD, diagnosis.summary, to_session=True)
EVENT = Kind("event", events.SESSION_EVENT, _event, to_session=True, named=False)
DEPLOYMENT = Kind("deployment", events.CLUSTER_DEPLOYMENT, _deployment)
NAMESPACE = Kind("namespace", events.CLUSTER_NAMESPACE, _namespace, named=False)
INGRESS = Kind("ingress", events.CLUSTER_INGRESS, _ingress)
KINDS = (POD, EVENT, DEPLOYMENT, NAMESPACE, INGRESS)
