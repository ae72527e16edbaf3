"""What a session's containers write: each line once, with the time that it was written at.

The engine keeps it, so that it is read from where the journal ends, whoever read before: of the last time that is
there all lines are counted, since several may share it. A stream's times only grow; two streams' need not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime

import structlog

from orchestrator.database import UNAVAILABLE, backoff
from orchestrator.docker import events, labels
from orchestrator.docker.engine import Engine
from orchestrator.errors import EngineRefused, ProviderUnavailable
from orchestrator.providers.contract import Journal, LogLine, Position
from orchestrator.providers.docker_containers import SERVICE, Names, ref_of

log = structlog.get_logger("provider.docker")

_AWAY: tuple[type[BaseException], ...] = (ProviderUnavailable, *UNAVAILABLE)
# Seconds between two looks whether there is room again.
_PAUSE = 0.05


@dataclass(slots=True)
class _Stream:
    """How far a stream was read."""

    at: datetime
    same: int
    # Of the lines of that time, those that are still to come when it is read again.
    again: int = 0

    def takes(self, at: datetime) -> bool:
        """Whether a line of this time is new."""
        if at < self.at:
            return False
        if at > self.at:
            self.at, self.same, self.again = at, 1, 0
            return True
        if self.again > 0:
            self.again -= 1
            return False
        self.same += 1
        return True


@dataclass(slots=True)
class _Container:
    id: str
    session_id: int
    service: str
    streams: dict[str, _Stream] = field(default_factory=dict)
    known: bool = False

    def resume(self, positions: Mapping[str, Position]) -> None:
        self.streams = {name: _Stream(one.at, one.same) for name, one in positions.items()}
        self.known = True

    def since(self) -> datetime | None:
        """From when on to read; what is read again is told from what is new."""
        for stream in self.streams.values():
            stream.again = stream.same
        return min((stream.at for stream in self.streams.values()), default=None)

    def takes(self, stream: str, at: datetime) -> bool:
        if stream not in self.streams:
            self.streams[stream] = _Stream(at, 1)
            return True
        return self.streams[stream].takes(at)


class Outputs:
    """All containers of our sessions at one engine. `run` until cancelled."""

    def __init__(self, engine: Engine, names: Names, journal: Journal) -> None:
        self._engine = engine
        self._names = names
        self._journal = journal
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Those that were started anew while they were still being read.
        self._restarted: set[str] = set()
        self._sessions: set[int] = set()

    async def run(self) -> None:
        """Follow what there is, and what is started. Raises ProviderUnavailable when the engine was closed."""
        filters = {"type": ["container"], "event": ["start"], "label": labels.selectors(self._names.of_sessions())}
        try:
            async with aclosing(self._engine.events(filters=filters)) as arriving:
                async for event in arriving:
                    if event["Type"] != events.OURS:
                        actor = event["Actor"]
                        self._follow(actor["ID"], actor["Attributes"])
                    elif event["Action"] == events.CONNECTED:
                        await self._follow_all()
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            # Whoever follows next reads it from where the journal ends.
            self._journal.discard(self._sessions)

    async def _follow_all(self) -> None:
        try:
            for one in await self._engine.containers.list(self._names.of_sessions()):
                if one["State"] != "created":
                    self._follow(one["Id"], one["Labels"])
        except ProviderUnavailable as error:
            # It is connected to again, and looked at then.
            log.info("no output is followed", error=str(error))

    def _follow(self, container: str, marks: Mapping[str, str]) -> None:
        ref, service = ref_of(marks), marks.get(SERVICE)
        if ref is None or not service:
            return
        if container in self._tasks:
            self._restarted.add(container)
            return
        one = _Container(container, ref.session_id, service)
        self._sessions.add(ref.session_id)
        self._tasks[container] = asyncio.create_task(self._read_all(one), name=f"output of {container[:12]}")

    async def _read_all(self, one: _Container) -> None:
        """Read until it has ended, and was not started again; or is gone."""
        failures = 0
        try:
            while True:
                self._restarted.discard(one.id)
                try:
                    if not one.known:
                        one.resume(await self._journal.positions(one.session_id, one.service))
                    await self._read(one)
                    failures = 0
                    if not await self._goes_on(one):
                        return
                except EngineRefused as error:
                    if error.status == 404:
                        return
                    failures += 1
                    log.debug("no output", container=one.id, error=str(error))
                except _AWAY as error:
                    failures += 1
                    log.debug("output lost", container=one.id, error=str(error) or type(error).__name__)
                await asyncio.sleep(backoff(failures))
        except Exception:
            log.exception("following output failed", container=one.id)
        finally:
            del self._tasks[one.id]

    async def _goes_on(self, one: _Container) -> bool:
        if one.id in self._restarted:
            return True
        found = await self._engine.containers.inspect(one.id)
        return found is not None and bool(found["State"]["Running"])

    async def _read(self, one: _Container) -> None:
        async with aclosing(self._engine.logs(one.id, follow=True, since=one.since())) as lines:
            async for stream, at, line in lines:
                while self._journal.full:  # noqa: ASYNC110  A journal tells nobody that it has room again.
                    await asyncio.sleep(_PAUSE)
                if one.takes(stream, at):
                    self._journal.sink(LogLine(one.session_id, one.service, stream, line, at))
