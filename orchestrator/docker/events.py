"""The stream of what happens at an engine, over lost connections and restarts of the engine."""

from __future__ import annotations

import asyncio
import json
import random
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import structlog

from orchestrator.docker.connection import Connection
from orchestrator.errors import ProviderUnavailable

# Of the events that we tell ourselves.
OURS = "engine"
CONNECTED, LOST = "connected", "lost"

# Seconds: the first and the longest wait before a lost engine is tried again.
_BACKOFF, _LONGEST = 0.2, 10.0
# In nanoseconds.
_SECOND = 1_000_000_000
# An engine remembers 256; what it tells again is among so many.
_REMEMBERED = 1024

_log = structlog.get_logger(__name__)


async def events(
    connection: Connection, *, since: datetime | int | None, filters: Mapping[str, Sequence[str]] | None
) -> AsyncGenerator[dict[str, Any], None]:
    """See `Engine.events`."""
    told = _Told(_nanoseconds(since) if isinstance(since, datetime) else since)
    wait = _BACKOFF
    while True:
        connected = False
        try:
            async with aclosing(_connected(connection, told, filters)) as arriving:
                async for event in arriving:
                    connected = True
                    yield event
            why = f"{connection.name} at {connection.host} ended its events."
        except ProviderUnavailable as error:
            if connection.closed:
                raise
            why = str(error)
        if connected:
            wait = _BACKOFF
            _log.info("docker events lost", host=connection.host, error=why)
            yield {"Type": OURS, "Action": LOST, "message": why}
        await asyncio.sleep(random.uniform(wait / 2, wait))
        wait = min(wait * 2, _LONGEST)


async def between(
    connection: Connection, since: datetime, until: datetime, filters: Mapping[str, Sequence[str]]
) -> AsyncGenerator[dict[str, Any], None]:
    """See `Engine.happened`."""
    params = {
        "filters": {name: list(values) for name, values in filters.items()},
        "since": _written(_nanoseconds(since)),
        "until": _written(_nanoseconds(until)),
    }
    async with connection.stream("GET", "/events", params=params, idle=connection.timeout) as stream:
        async for event in stream.objects():
            yield event


class _Told:
    """What was told, so that it is not told again."""

    def __init__(self, since: int | None) -> None:
        # What to ask for, by the engine's clock, in nanoseconds; None: what happens from now on.
        self.since = since
        self._lines: deque[bytes] = deque(maxlen=_REMEMBERED)

    def begin(self, date: str | None) -> None:
        """Go on from the engine's own time, where there was none yet."""
        if self.since is None and date:
            self.since = int(parsedate_to_datetime(date).timestamp()) * _SECOND

    def event(self, line: bytes) -> dict[str, Any] | None:
        """The event, if it was not told before."""
        if line in self._lines:
            return None
        self._lines.append(line)
        event: dict[str, Any] = json.loads(line)
        if at := event.get("timeNano"):
            # Their times are not quite in the order they are told in.
            self.since = int(at) - _SECOND
        return event


async def _connected(
    connection: Connection, told: _Told, filters: Mapping[str, Sequence[str]] | None
) -> AsyncGenerator[dict[str, Any], None]:
    params: dict[str, Any] = {"filters": {name: list(values) for name, values in (filters or {}).items()}}
    if told.since is not None:
        params["since"] = _written(told.since)
    async with connection.stream("GET", "/events", params=params) as stream:
        told.begin(stream.headers.get("Date"))
        yield {"Type": OURS, "Action": CONNECTED}
        async for line in stream.lines():
            if line.strip() and (event := told.event(line)) is not None:
                yield event


def _nanoseconds(at: datetime) -> int:
    return int(at.replace(microsecond=0).timestamp()) * _SECOND + at.microsecond * 1000


def _written(nanoseconds: int) -> str:
    return "{}.{:09}".format(*divmod(max(0, nanoseconds), _SECOND))
