"""A provider whose failures are staged: slow, never ready, failing, failing to delete, unavailable, crashing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import ProviderUnavailable
from orchestrator.providers.contract import (
    Endpoint,
    Endpoints,
    LogLine,
    LogSink,
    Observation,
    Report,
    SessionRef,
    SessionSpec,
    State,
)

Hook = Callable[[SessionRef], Awaitable[None]]


class World:
    """What is outside of every orchestrator: it stays when one of them dies. Tests stage what happens in it."""

    def __init__(self) -> None:
        self.states: dict[int, Observation] = {}
        self.specs: list[SessionSpec] = []
        self.calls: list[tuple[str, int]] = []
        self.hooks: dict[str, Hook] = {}
        self.reports: list[tuple[str, str]] = [("Cloning", "Cloning the repository."), ("Launching", "Launching it.")]
        # Steps about one session that two callers worked on at once.
        self.overlaps: list[tuple[str, int]] = []
        self.opened: list[tuple[str, Mapping[str, Any]]] = []
        # What each was last opened with.
        self.credentials: dict[str, Mapping[str, str]] = {}
        self.closed: list[str] = []
        self.down: str | None = None
        self._busy: Counter[int] = Counter()
        self._watchers: set[asyncio.Queue[tuple[SessionRef, Observation]]] = set()
        self.sinks: list[LogSink] = []

    def open(
        self,
        kind: str,
        name: str,
        options: Mapping[str, Any],
        *,
        endpoint: str | None,
        credentials: Mapping[str, str],
        data_dir: Path,
        sink: LogSink,
    ) -> Staged:
        """An `OpenProvider`."""
        if "broken" in options:
            raise ProviderUnavailable("The options are broken.")
        if "bug" in options:
            raise KeyError("secret")
        self.opened.append((name, options))
        self.credentials[name] = credentials
        self.sinks.append(sink)
        return Staged(self, name, sink)

    def called(self, name: str, session_id: int | None = None) -> int:
        """How often a call was made."""
        return sum(1 for call, of in self.calls if call == name and session_id in (None, of))

    def happens(self, ref: SessionRef, observation: Observation) -> None:
        """Something happens to a session by itself, and every watcher hears of it."""
        self.states[ref.session_id] = observation
        for watcher in self._watchers:
            watcher.put_nowait((ref, observation))

    async def enter(self, name: str, ref: SessionRef) -> None:
        """Note a call and let its hook have its way."""
        self.calls.append((name, ref.session_id))
        if self.down is not None:
            raise ProviderUnavailable(self.down)
        if (hook := self.hooks.get(name)) is not None:
            await hook(ref)


class Staged:
    """A provider in the world."""

    def __init__(self, world: World, name: str, sink: LogSink) -> None:
        self._world = world
        self._name = name
        self._sink = sink

    async def check(self) -> None:
        if (hook := self._world.hooks.get("check")) is not None:
            await hook(SessionRef(0, "", ""))
        if self._world.down is not None:
            raise ProviderUnavailable(self._world.down)

    async def start(self, spec: SessionSpec, report: Report) -> Endpoints:
        async with self._alone("start", spec.ref):
            self._world.specs.append(spec)
            for reason, message in self._world.reports:
                await report(reason, message)
            await self._world.enter("start", spec.ref)
            self._sink(LogLine(spec.ref.session_id, "preview", "stdout", "listening"))
            endpoints = endpoints_of(spec.ref.session_id)
            self._world.states[spec.ref.session_id] = Observation(State.RUNNING, endpoints=endpoints)
            return endpoints

    async def stop(self, ref: SessionRef) -> None:
        async with self._alone("stop", ref):
            await self._world.enter("stop", ref)
            if ref.session_id in self._world.states:
                self._world.states[ref.session_id] = Observation(State.STOPPED)

    async def delete(self, ref: SessionRef) -> None:
        async with self._alone("delete", ref):
            await self._world.enter("delete", ref)
            self._world.states.pop(ref.session_id, None)

    async def inspect(self, ref: SessionRef) -> Observation:
        await self._world.enter("inspect", ref)
        return self._world.states.get(ref.session_id, Observation(State.ABSENT))

    async def exec(self, ref: SessionRef, argv: Sequence[str]) -> tuple[int, bytes]:
        return 0, b""

    async def watch(self) -> AsyncIterator[tuple[SessionRef, Observation]]:
        if (hook := self._world.hooks.get("watch")) is not None:
            await hook(SessionRef(0, "", ""))
        queue: asyncio.Queue[tuple[SessionRef, Observation]] = asyncio.Queue()
        self._world._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._world._watchers.discard(queue)

    async def close(self) -> None:
        self._world.closed.append(self._name)
        if (hook := self._world.hooks.get("close")) is not None:
            await hook(SessionRef(0, "", ""))

    def _alone(self, name: str, ref: SessionRef) -> _Alone:
        return _Alone(self._world, name, ref)


class _Alone:
    """Notes when two steps about one session are under way at once."""

    def __init__(self, world: World, name: str, ref: SessionRef) -> None:
        self._world, self._name, self._ref = world, name, ref

    async def __aenter__(self) -> None:
        if self._world._busy[self._ref.session_id]:
            self._world.overlaps.append((self._name, self._ref.session_id))
        self._world._busy[self._ref.session_id] += 1

    async def __aexit__(self, *exc: object) -> None:
        self._world._busy[self._ref.session_id] -= 1


def endpoints_of(session_id: int) -> Endpoints:
    """Where the world's sessions are reached."""
    return Endpoints(
        ip_address="127.0.0.1", preview=Endpoint(f"http://127.0.0.1:{10_000 + session_id}/preview", "/preview")
    )


class Gate:
    """A hook at which calls wait until it is opened; `reached` is set by the first that comes."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.cancelled = asyncio.Event()
        self._open = asyncio.Event()

    def open(self) -> None:
        self._open.set()

    async def __call__(self, ref: SessionRef) -> None:
        self.reached.set()
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def failing(error: Exception, times: int | None = None) -> Hook:
    """A hook that raises, always or the first so many times."""
    left = times

    async def hook(ref: SessionRef) -> None:
        nonlocal left
        if left == 0:
            return
        if left is not None:
            left -= 1
        raise error

    return hook
