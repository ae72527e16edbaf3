"""The event: what happened, on which channel, as every client will see it.

    {"event_type": "session.status", "channel": "session:42", "data": {...}}

Channels are named `kind:id`; the kinds that are ours are `user`, `workspace`, `session` and `deployment`, beside the
plain `broadcast` and `cluster`. `gateway` is for what gateways tell one another: no client can subscribe to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import orjson

# The durable topic exchange to which other services publish.
EXCHANGE = "apps.clusterix-code-v1"
# What another service tells of its users, and the queue in which it waits to be obeyed.
USER_MESSAGES = "auth.user.*"
USERS_QUEUE = "cluster-code.users"

BROADCAST = "broadcast"
CLUSTER = "cluster"
# Control messages from gateway to gateway, through the log: they reach every replica, in order.
GATEWAY = "gateway"
# `data` of this control event: {"user_id": int}. Something that this user may subscribe to has changed.
PERMISSIONS_CHANGED = "gateway.permissions-changed"

SESSION_STATUS = "session.status"
SESSION_LOG = "session.log"
# What happens in a cluster. Those of a session go to its channel and to `cluster`, the others to `cluster` only.
SESSION_POD = "session.pod"
SESSION_EVENT = "session.event"
CLUSTER_DEPLOYMENT = "cluster.deployment"
CLUSTER_NAMESPACE = "cluster.namespace"
CLUSTER_INGRESS = "cluster.ingress"
DEPLOYMENT_STATUS = "deployment.status"
DEPLOYMENT_LOG = "deployment.log"
APP_CREATED = "app.created"
APP_UPDATED = "app.updated"
APP_DELETED = "app.deleted"

MAX_NAME_LENGTH = 200


class InvalidEnvelope(ValueError):
    """A body that is not `{event_type, channel, data}`; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `data` is anything that orjson can write; `id` makes a repeated publication harmless."""

    event_type: str
    channel: str
    data: Mapping[str, Any]
    id: str = field(default_factory=lambda: str(uuid4()))

    def body(self) -> bytes:
        """The envelope as JSON bytes: what goes into the log."""
        return orjson.dumps({"event_type": self.event_type, "channel": self.channel, "data": self.data})


def parse(body: bytes) -> tuple[str, str]:
    """The `(event_type, channel)` of an envelope from outside. Raises InvalidEnvelope."""
    try:
        envelope = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidEnvelope(f"not JSON: {error}") from error
    if not isinstance(envelope, dict):
        raise InvalidEnvelope("not a JSON object")
    for key in ("event_type", "channel"):
        value = envelope.get(key)
        if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_LENGTH:
            raise InvalidEnvelope(f"{key!r} must be a string of 1 to {MAX_NAME_LENGTH} characters")
    if "data" not in envelope:
        raise InvalidEnvelope("'data' is missing")
    if "offset" in envelope:
        raise InvalidEnvelope("'offset' is given by the log and must not be sent")
    return envelope["event_type"], envelope["channel"]


def user_channel(user_id: int) -> str:
    """Where the lifecycle of all that a user owns is published."""
    return f"user:{user_id}"


def workspace_channel(workspace_id: int) -> str:
    """Where the lifecycle of all in a workspace is published."""
    return f"workspace:{workspace_id}"


def session_channel(session_id: int) -> str:
    """Where one session's status and output are published."""
    return f"session:{session_id}"


def deployment_channel(deployment_id: int) -> str:
    """Where one deployment's status and log are published."""
    return f"deployment:{deployment_id}"
