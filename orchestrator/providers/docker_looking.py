"""What happens to sessions by themselves: an engine's events, each a reason to look at the session that it is about."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from orchestrator.docker import events, labels
from orchestrator.docker.engine import Engine
from orchestrator.errors import ProviderUnavailable
from orchestrator.providers.contract import Observation, SessionRef, State
from orchestrator.providers.docker_containers import Names, ref_of

log = structlog.get_logger("provider.docker")

Inspect = Callable[[SessionRef], Awaitable[Observation]]

# What a container does that may change what is seen of its session; `health_status` comes with a colon and the status.
ACTIONS = ("start", "die", "oom", "pause", "unpause", "destroy", "health_status")
# Seconds. Several events come at once; what is not well is looked at again, less and less often.
_SOON = 0.05
_AGAIN, _LONGEST = 0.5, 10.0
_AWAY = "ProviderUnavailable"


@dataclass(slots=True)
class _Due:
    ref: SessionRef
    # Loop time.
    at: float
    # Seconds until the look after that, if it is needed.
    wait: float = _AGAIN


class Looking:
    """`read` for ever. `again_after`: seconds after which a session that has crashed may be well again."""

    def __init__(self, engine: Engine, names: Names, inspect: Inspect, *, again_after: float) -> None:
        self._engine = engine
        self._names = names
        self._inspect = inspect
        self._again_after = again_after
        self._known: dict[int, SessionRef] = {}
        self._due: dict[int, _Due] = {}
        self._told: dict[int, Observation] = {}
        self._news = asyncio.Event()

    async def read(self) -> AsyncGenerator[tuple[SessionRef, Observation], None]:
        """What has changed, for one reader, without end. Raises ProviderUnavailable when the engine was closed.

        Of an engine that is away each session is told once, as `starting`.
        """
        listening = asyncio.create_task(self._listen(), name="listen to docker")
        try:
            while True:
                away: Observation | None = None
                for due in self._take():
                    seen = away or await self._look(due.ref)
                    if seen.reason == _AWAY:
                        # The others need not wait for an answer each.
                        away = seen
                    self._look_again(due, seen)
                    if self._told.get(due.ref.session_id) != seen:
                        self._told[due.ref.session_id] = seen
                        yield due.ref, seen
                    if seen.state is State.ABSENT:
                        self._forget(due.ref)
                await self._wait(listening)
        finally:
            listening.cancel()
            await asyncio.wait({listening})

    async def _look(self, ref: SessionRef) -> Observation:
        try:
            return await self._inspect(ref)
        except ProviderUnavailable as error:
            return Observation(State.STARTING, _AWAY, str(error))

    async def _listen(self) -> None:
        filters = {
            "type": ["container"],
            "event": ACTIONS,
            "label": labels.selectors(self._names.of_sessions()),
        }
        async with aclosing(self._engine.events(filters=filters)) as arriving:
            async for event in arriving:
                if event["Type"] == events.OURS:
                    # Lost, so that nothing more is known of any; or found, with whatever happened meanwhile.
                    await self._put_all()
                elif (ref := ref_of(event["Actor"]["Attributes"])) is not None:
                    self._put(ref)

    async def _put_all(self) -> None:
        try:
            for one in await self._engine.containers.list(self._names.of_sessions()):
                if (ref := ref_of(one["Labels"])) is not None:
                    self._put(ref)
        except ProviderUnavailable as error:
            log.info("the engine is away", error=str(error))
        for ref in [*self._known.values()]:
            self._put(ref)

    def _forget(self, ref: SessionRef) -> None:
        self._told.pop(ref.session_id, None)
        self._known.pop(ref.session_id, None)

    def _put(self, ref: SessionRef) -> None:
        self._known[ref.session_id] = ref
        at = asyncio.get_running_loop().time() + _SOON
        due = self._due.get(ref.session_id)
        if due is None or due.at > at:
            self._due[ref.session_id] = _Due(ref, at)
        self._news.set()

    def _take(self) -> list[_Due]:
        """Those whose time has come."""
        now = asyncio.get_running_loop().time()
        taken = [due for due in self._due.values() if due.at <= now]
        for due in taken:
            del self._due[due.ref.session_id]
        return taken

    def _look_again(self, due: _Due, seen: Observation) -> None:
        """What is not well changes without any event: a service gets ready, a crash loop is over."""
        if seen.state not in (State.STARTING, State.FAILED) or due.ref.session_id in self._due:
            return
        wait = due.wait if seen.state is State.STARTING else min(self._again_after, _LONGEST)
        at = asyncio.get_running_loop().time() + wait
        self._due[due.ref.session_id] = _Due(due.ref, at, min(wait * 2, _LONGEST))

    async def _wait(self, listening: asyncio.Task[None]) -> None:
        """Return when there may be something to look at; raise what ended the listening."""
        now = asyncio.get_running_loop().time()
        timeout = min((due.at - now for due in self._due.values()), default=None)
        news = asyncio.create_task(self._news.wait(), name="docker news")
        try:
            await asyncio.wait({news, listening}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
            await asyncio.wait({news})
        self._news.clear()
        if listening.done():
            listening.result()
