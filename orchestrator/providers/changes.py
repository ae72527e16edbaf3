"""What happens to sessions by itself, for the one who watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from orchestrator.providers.contract import Observation, SessionRef


class Changes:
    """The newest observation of each session that was not taken yet; whoever makes one never waits for the watcher."""

    def __init__(self) -> None:
        self._pending: dict[int, tuple[SessionRef, Observation]] = {}
        self._wakeup = asyncio.Event()
        self._closed = False

    def put(self, ref: SessionRef, observation: Observation) -> None:
        """Tell the watcher, in place of what was told of that session and not taken."""
        self._pending.pop(ref.session_id, None)
        self._pending[ref.session_id] = (ref, observation)
        self._wakeup.set()

    def forget(self, session_id: int) -> None:
        """What was to be told of that session is no longer so."""
        self._pending.pop(session_id, None)

    def close(self) -> None:
        """End the watching."""
        self._closed = True
        self._wakeup.set()

    async def read(self) -> AsyncIterator[tuple[SessionRef, Observation]]:
        """Each change once, for one watcher at a time, until closed."""
        while not self._closed:
            while self._pending:
                yield self._pending.pop(next(iter(self._pending)))
            self._wakeup.clear()
            if not self._pending and not self._closed:
                await self._wakeup.wait()
