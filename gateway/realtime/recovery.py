"""From history to live without a gap and without a repeat.

While a connection catches up it is in none of the hub's lists: live events wait for it in the history. Reading the last
piece of history and attaching happen in one turn of the loop, so that nothing falls between. Pieces are sent only as
fast as the client reads, so that however much it has missed, little of it waits in this process, and no limit of unsent
bytes is needed for it.
"""

from __future__ import annotations

import asyncio

from gateway.realtime import protocol
from gateway.realtime.connection import Connection
from gateway.realtime.history import History, HistoryLost
from gateway.realtime.hub import Hub
from gateway.realtime.protocol import CloseCode, Position

# Bytes written before the client must have read.
_CHUNK = 128 << 10
# Seconds to wait for an offset that another gateway has already given out.
_PATIENCE = 1.0


async def begin(hub: Hub, history: History, connection: Connection, since: str | None) -> None:
    """Send `connected`, then all that the connection's channels had after `since`, then let live events flow.

    The connection must have been added to the hub, with its channels.
    """
    position = await _honoured(hub, history, since)
    recovered = since is None or position is not None
    if position is None:
        position = history.position
    interval = float(hub.settings.ping_interval)
    data = {
        "connection_id": connection.id,
        "position": str(position),
        "channels": list(connection.channels),
        "ping_interval": int(interval) if interval.is_integer() else interval,
        "expires_at": protocol.timestamp(connection.expires_at),
        "recovered": recovered,
    }
    hub.send(connection, protocol.control("connected", connection.own_channel, data))
    await _catch_up(hub, history, connection, position.offset)


async def subscribe(hub: Hub, history: History, connection: Connection, action: protocol.Subscribe) -> None:
    """Replay the channel after `since`, answer `subscribed`, and let its live events flow."""
    position = await _honoured(hub, history, action.since)
    if connection.ended:
        return
    hub.flush()
    recovered = action.since is None or position is not None
    if position is None or position.offset >= history.head:
        hub.subscribe(connection, action.channel)
        _answer(hub, connection, action, history.position, recovered, 0)
        return
    # Nothing else may come between: the other channels' events wait in the history meanwhile.
    hub.detach(connection)
    head = history.position
    replayed = await _replay(hub, history, connection, (action.channel,), position.offset, until=head)
    if replayed is not None:
        hub.subscribe(connection, action.channel)
        _answer(hub, connection, action, head, recovered, replayed)
        await _catch_up(hub, history, connection, head.offset)


def _answer(
    hub: Hub, connection: Connection, action: protocol.Subscribe, position: Position, recovered: bool, replayed: int
) -> None:
    data = {"position": str(position), "recovered": recovered, "replayed": replayed}
    hub.send(connection, protocol.control("subscribed", action.channel, data, action.id))


async def _honoured(hub: Hub, history: History, since: str | None) -> Position | None:
    """The position that `since` names, when all after it is here."""
    if since is None:
        return None
    position = protocol.parse_position(since)
    if position is not None and await history.reaches(position, _PATIENCE):
        hub.recoveries["recovered"] += 1
        return position
    hub.recoveries["lost"] += 1
    return None


async def _catch_up(hub: Hub, history: History, connection: Connection, offset: int) -> None:
    if await _replay(hub, history, connection, tuple(connection.channels), offset) is not None:
        hub.attach(connection)


async def _replay(
    hub: Hub,
    history: History,
    connection: Connection,
    channels: tuple[str, ...],
    offset: int,
    until: Position | None = None,
) -> int | None:
    """Write what the channels had after `offset`; how many events that were, or None when the connection has ended.

    After the last piece it returns without giving way to anything else.
    """
    epoch, loop = history.epoch, asyncio.get_running_loop()
    sent, next_offset = 0, offset
    while not connection.ended:
        try:
            if history.epoch != epoch:
                raise HistoryLost("the log has begun anew")
            chunk, more = history.after(channels, next_offset, _CHUNK, until.offset if until else None)
        except HistoryLost:
            hub.close(connection, CloseCode.POSITION_LOST)
            return None
        hub.replay(connection, chunk)
        sent += len(chunk)
        if more is None:
            return sent
        next_offset = more
        connection.stalled_since = loop.time()
        # uvloop writes at the end of the turn; only then it is known whether the client reads.
        await asyncio.sleep(0)
        await connection.drained()
        connection.stalled_since = None
    return None
