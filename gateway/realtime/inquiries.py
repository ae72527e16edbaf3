"""What one replica answers when it is asked about its connections: who is on a channel, which there are, end some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import nlargest
from operator import itemgetter
from typing import Any

import structlog

from gateway.realtime.connection import Connection
from gateway.realtime.hub import Hub
from gateway.realtime.protocol import CloseCode
from gateway.realtime.replicas import Replicas

log = structlog.get_logger("gateway.inquiries")

# `{channel}` -> `[[user_id, connections, since], …]`, those first who have been there longest.
PRESENCE = "presence"
# `{user_id?, channel?, limit}` -> `{total, items}`, the newest first.
CONNECTIONS = "connections"
# `{user_id}` or `{connection_id}` -> how many were closed.
DISCONNECT = "disconnect"

# Users of a channel that are told, so that an answer stays small enough for everybody's log.
MOST_USERS = 1000
# Channels that are named for each connection, of those that it has.
MOST_CHANNELS = 10


def answer(replicas: Replicas, hub: Hub) -> None:
    """Have this replica answer for the connections of the hub."""
    replicas.on(PRESENCE, lambda data: _presence(hub.of_channel(data["channel"])))
    replicas.on(CONNECTIONS, lambda data: _connections(hub, data))
    replicas.on(DISCONNECT, lambda data: _disconnect(hub, data))


def _presence(connections: Iterable[Connection]) -> list[tuple[int, int, float]]:
    return longest((one.user_id, 1, one.opened_at) for one in connections)


def longest(present: Iterable[Sequence[Any]]) -> list[tuple[int, int, float]]:
    """Each user once, with all its connections and the earliest moment, of `(user_id, connections, since)`."""
    users: dict[int, tuple[int, float]] = {}
    for user_id, count, since in present:
        before, earliest = users.get(user_id, (0, since))
        users[user_id] = before + count, min(earliest, since)
    told = sorted(((user_id, count, since) for user_id, (count, since) in users.items()), key=itemgetter(2, 0))
    return told[:MOST_USERS]


def _connections(hub: Hub, data: Mapping[str, Any]) -> dict[str, Any]:
    found = list(_find(hub, data))
    newest = nlargest(data["limit"], found, key=lambda one: one.opened_at)
    return {"total": len(found), "items": [_described(one) for one in newest]}


def _find(hub: Hub, data: Mapping[str, Any]) -> Iterator[Connection]:
    user_id, channel = data.get("user_id"), data.get("channel")
    for one in hub.connections.values() if channel is None else hub.of_channel(channel):
        if user_id is None or one.user_id == user_id:
            yield one


def _described(one: Connection) -> dict[str, Any]:
    return {
        "id": one.id,
        "user_id": one.user_id,
        "token_id": one.identity.token_id,
        "transport": one.kind,
        "address": one.address,
        "since": one.opened_at,
        "channel_count": len(one.channels),
        "channels": one.channels[:MOST_CHANNELS],
        "unsent_bytes": one.transport.get_write_buffer_size(),
    }


def _disconnect(hub: Hub, data: Mapping[str, Any]) -> int:
    if "user_id" in data:
        found = hub.of_user(data["user_id"])
    else:
        one = hub.connections.get(data["connection_id"])
        found = [one] if one else []
    for one in found:
        log.info("disconnected by an administrator", user_id=one.user_id, connection_id=one.id)
        hub.close(one, CloseCode.DISCONNECTED)
    return len(found)
