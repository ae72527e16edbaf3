"""From what was missed to live without a gap and without a repeat.

What the history no longer holds comes from the log itself, by the archive, and joins the history where that begins.

While a connection catches up it is in none of the hub's lists: live events wait for it in the history. Reading the last
piece of history and attaching happen in one turn of the loop, so that nothing falls between. Pieces are sent only as
fast as the client reads, so that however much it has missed, little of it waits in this process, and no limit of unsent
bytes is needed for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from gateway.realtime import protocol
from gateway.realtime.archive import Archive, ArchiveLost, Replay
from gateway.realtime.connection import Connection
from gateway.realtime.history import History, HistoryLost
from gateway.realtime.hub import Hub
from gateway.realtime.protocol import CloseCode, Position

log = structlog.get_logger("gateway.recovery")

# Bytes written before the client must have read.
_CHUNK = 128 << 10
# Seconds to wait for an offset that another gateway has already given out.
_PATIENCE = 1.0


@dataclass(frozen=True, slots=True)
class _Start:
    """Where a connection or a channel begins. `recovered`: nothing is missed that was asked for."""

    position: Position
    recovered: bool
    replay: Replay | None = None


def connect(hub: Hub, history: History, connection: Connection) -> None:
    """Send `connected` and let live events flow: nothing was missed. The connection must have been added to the hub."""
    _greet(hub, connection, _Start(history.position, recovered=True))
    hub.attach(connection)


async def resume(hub: Hub, history: History, archive: Archive, connection: Connection, since: str) -> None:
    """Send `connected`, then all that the connection's channels had after `since`, then let live events flow.

    The connection must have been added to the hub, with its channels.
    """
    async with _started(hub, history, archive, since) as start:
        _greet(hub, connection, start)
        await _catch_up(hub, history, connection, start.position.offset, start.replay)


def _greet(hub: Hub, connection: Connection, start: _Start) -> None:
    interval = float(hub.settings.ping_interval)
    data = {
        "connection_id": connection.id,
        "position": str(start.position),
        "channels": connection.channels,
        "ping_interval": int(interval) if interval.is_integer() else interval,
        "expires_at": protocol.timestamp(connection.expires_at),
        "recovered": start.recovered,
    }
    hub.send(connection, protocol.control("connected", connection.own_channel, data))


async def subscribe(
    hub: Hub, history: History, archive: Archive, connection: Connection, action: protocol.Subscribe
) -> None:
    """Replay the channel after `since`, answer `subscribed`, and let its live events flow."""
    async with _started(hub, history, archive, action.since) as start:
        if connection.ended:
            return
        hub.flush()
        if start.position.offset >= history.head:
            hub.subscribe(connection, action.channel)
            _answer(hub, connection, action, history.position, start.recovered, 0)
            return
        # Nothing else may come between: the other channels' events wait in the history meanwhile.
        hub.detach(connection)
        head = history.position
        replayed = await _replay(
            hub, history, connection, (action.channel,), start.position.offset, start.replay, until=head
        )
        if replayed is not None:
            hub.subscribe(connection, action.channel)
            _answer(hub, connection, action, head, start.recovered, replayed)
            await _catch_up(hub, history, connection, head.offset)


def _answer(
    hub: Hub, connection: Connection, action: protocol.Subscribe, position: Position, recovered: bool, replayed: int
) -> None:
    data = {"position": str(position), "recovered": recovered, "replayed": replayed}
    hub.send(connection, protocol.control("subscribed", action.channel, data, action.id))


@asynccontextmanager
async def _started(hub: Hub, history: History, archive: Archive, since: str | None) -> AsyncIterator[_Start]:
    """Where to begin: at `since` when all after it can be had, else at the head."""
    replay = None
    try:
        if since is None:
            yield _Start(history.position, recovered=True)
            return
        position = protocol.parse_position(since)
        kept = position is not None and await history.reaches(position, _PATIENCE)
        if position is not None and not kept:
            replay = await archive.open(position)
        if position is not None and (kept or replay is not None):
            hub.recoveries["recovered"] += 1
            yield _Start(position, recovered=True, replay=replay)
        else:
            hub.recoveries["lost"] += 1
            yield _Start(history.position, recovered=False)
    finally:
        if replay is not None:
            await replay.close()


async def _catch_up(
    hub: Hub, history: History, connection: Connection, offset: int, replay: Replay | None = None
) -> None:
    if await _replay(hub, history, connection, connection.channels, offset, replay) is not None:
        hub.attach(connection)


async def _replay(
    hub: Hub,
    history: History,
    connection: Connection,
    channels: tuple[str, ...],
    offset: int,
    replay: Replay | None = None,
    *,
    until: Position | None = None,
) -> int | None:
    """Write what the channels had after `offset`; how many events that were, or None when the connection has ended.

    It returns when the transport has room. After the last piece it returns without giving way to anything else.
    """
    epoch, sent, next_offset = history.epoch, 0, offset
    try:
        if replay is not None:
            async for piece, reached in replay.pieces(history, channels, until.offset if until else None):
                if connection.ended:
                    return None
                hub.replay(connection, piece)
                sent += len(piece)
                next_offset = reached
                await _until_read(connection)
            await replay.close()
        while not connection.ended:
            if history.epoch != epoch:
                raise HistoryLost("the log has begun anew")
            chunk, more = history.after(channels, next_offset, _CHUNK, until.offset if until else None)
            hub.replay(connection, chunk)
            sent += len(chunk)
            if more is None and not connection.paused:
                return sent
            # Nobody is attached whose transport is full: what comes live meanwhile is read from here, too.
            next_offset = chunk[-1].offset if chunk else next_offset
            await _until_read(connection)
    except HistoryLost:
        # Overtaken by what is dropped: the log may have it still.
        hub.close(connection, CloseCode.RECONNECT if history.epoch == epoch else CloseCode.POSITION_LOST)
    except ArchiveLost as error:
        log.info("a replay ends early", connection_id=connection.id, reason=str(error))
        hub.close(connection, CloseCode.RECONNECT)
    return None


async def _until_read(connection: Connection) -> None:
    """Wait until the client has read what was written, or is lost."""
    connection.stalled_since = asyncio.get_running_loop().time()
    # uvloop writes at the end of the turn; only then it is known whether the client reads.
    await asyncio.sleep(0)
    await connection.drained()
    connection.stalled_since = None
