"""One look around all connections every so often: pings, missing pongs, expiry, stuck peers. No timer a connection."""

from __future__ import annotations

import asyncio
import random
import time

from gateway.realtime import protocol
from gateway.realtime.connection import Connection
from gateway.realtime.hub import Hub
from gateway.realtime.protocol import CloseCode

# Seconds of the window in which malformed frames are counted.
_MALFORMED_WINDOW = 60.0


async def watch(hub: Hub) -> None:
    """Sweep for ever, about every second, oftener where the settings ask for shorter times."""
    settings = hub.settings
    pause = min(1.0, settings.ping_interval / 4, settings.pong_timeout / 4)
    while True:
        await asyncio.sleep(pause)
        sweep(hub, asyncio.get_running_loop().time(), time.time())


def sweep(hub: Hub, now: float, wall: float) -> None:
    """One look: `now` is the loop's time, `wall` Unix seconds."""
    for connection in tuple(hub.connections.values()):
        if connection.due <= now:
            _examine(hub, connection, now, wall)
    for transport, deadline in tuple(hub.lingering.items()):
        if deadline <= now:
            transport.abort()
            del hub.lingering[transport]


def start(hub: Hub, connection: Connection, now: float) -> None:
    """Begin to watch a connection. The first ping comes at a random moment, which spreads those of many connections."""
    connection.next_ping = now + random.uniform(0, hub.settings.ping_interval)
    connection.due = now


def ponged(connection: Connection) -> None:
    """The client lives."""
    connection.pong_due = None


def malformed(hub: Hub, connection: Connection, now: float) -> bool:
    """Count a malformed frame; whether it was one too many within a minute."""
    recent = (*(at for at in connection.malformed if at > now - _MALFORMED_WINDOW), now)
    connection.malformed = recent
    return len(recent) >= hub.settings.malformed_per_minute


def _examine(hub: Hub, connection: Connection, now: float, wall: float) -> None:
    settings = hub.settings
    if connection.expires_at is not None:
        left = connection.expires_at - wall
        if left <= 0:
            hub.close(connection, CloseCode.EXPIRED)
            return
        # Not in the middle of an action: `connected` comes first, and an answer follows its replay.
        if left <= settings.expiry_notice and not connection.warned and not connection.handling:
            connection.warned = True
            data = {"expires_at": protocol.timestamp(connection.expires_at)}
            hub.send(connection, protocol.control("expiring", connection.own_channel, data))
    if connection.handling:
        # Its pong may lie unread behind the action that is worked on. A replay that nobody reads is another matter.
        stalled = connection.stalled_since
        if stalled is not None and now - stalled > settings.ping_interval + settings.pong_timeout:
            hub.abort(connection)
        return
    if connection.pong_due is not None and connection.pong_due <= now:
        hub.close(connection, CloseCode.NO_PONG)
        return
    if connection.next_ping <= now:
        connection.next_ping = now + settings.ping_interval
        if connection.pong_due is None:
            connection.pong_due = now + settings.pong_timeout
        hub.send(connection, protocol.PING)
    connection.due = _next_look(connection, settings.expiry_notice, now, wall)


def _next_look(connection: Connection, notice: float, now: float, wall: float) -> float:
    looks = [connection.next_ping]
    if connection.pong_due is not None:
        looks.append(connection.pong_due)
    if connection.expires_at is not None:
        left = connection.expires_at - wall
        looks.append(now + (left if connection.warned else left - notice))
    return min(looks)
