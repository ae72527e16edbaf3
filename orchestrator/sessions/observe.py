"""Looking after what runs: a provider's own reports, and a regular inspection of all that should be running.

A report is a hint, the inspection the truth: what was queued before a restart says nothing about what runs now. Both
end in one short transaction that changes the row only if no request came meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import TypeAlias

import structlog

from orchestrator.database import Connection, Pool, Wakeup
from orchestrator.errors import HeldElsewhere, NotFound, ProviderUnavailable
from orchestrator.providers.contract import Observation
from orchestrator.sessions import record, steps, store
from orchestrator.sessions.record import Session
from orchestrator.sessions.state import Desired
from orchestrator.sessions.steps import Changes, FindProvider
from orchestrator.settings import OrchestratorSettings

log = structlog.get_logger("observe")

_BATCH = 100
# From the row as it is now to what an observation changes about it.
_ChangesTo: TypeAlias = Callable[[Session], Changes]


class Observer:
    """Keeps what is known of running sessions true."""

    def __init__(self, settings: OrchestratorSettings, pool: Pool, wakeup: Wakeup, find: FindProvider) -> None:
        self._settings = settings
        self._pool = pool
        self._wakeup = wakeup
        self._find = find

    async def resync(
        self, connection: Connection, *, only: Collection[int] | None = None, without: Collection[int] = ()
    ) -> None:
        """Inspect what should be running, `settings.concurrency` at a time; `connection` reads the list.

        `only`, `without`: the providers whose sessions to inspect, and not to. Raises what is in
        `database.UNAVAILABLE`.
        """
        async for ids in _should_run(connection, only, without):
            for start in range(0, len(ids), self._settings.concurrency):
                await self._look_at(ids[start : start + self._settings.concurrency])

    async def _look_at(self, ids: Sequence[int]) -> None:
        tasks = [asyncio.create_task(self.look(session_id), name=f"inspect session {session_id}") for session_id in ids]
        try:
            # Waits for all, whatever fails: no task is left behind.
            results = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def look(self, session_id: int, hint: Observation | None = None) -> None:
        """Inspect one session and record what that means. `hint` is what its provider has just said of it.

        Raises what is in `database.UNAVAILABLE`; an outage of the provider is recorded.
        """
        async with self._pool.acquire() as connection:
            session = await store.get(connection, session_id)
        if session is None or not _settled(session):
            return
        try:
            provider = await self._find(session.provider_id)
            observation = await steps.look(provider, session.ref)
        except HeldElsewhere:
            return
        except ProviderUnavailable as error:
            away = steps.away(str(error))
            await self._record(session, lambda _: away)
            return
        except Exception:
            # One session that cannot be looked at must not keep the others from it; the next resync tries again.
            log.exception("inspection failed", session=session_id)
            return
        # The report may say more (the last lines of output) of the state that is found.
        seen = hint if hint is not None and hint.state is observation.state else observation
        await self._record(session, lambda now: steps.observed(now, seen, self._settings.start_deadline))

    async def _record(self, session: Session, changes_to: _ChangesTo) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            try:
                now = await record.lock(connection, session.id)
            except NotFound:
                return
            if now.generation != session.generation or not _settled(now):
                return
            after = await record.write(connection, now, **changes_to(now))
        if after.outstanding or after.stale:
            log.info("session needs work", session=session.id, status=after.status, reason=after.reason)
            self._wakeup.set()


def _settled(session: Session) -> bool:
    """Its request is carried out, and nobody is about to look at it anyway."""
    return session.desired == Desired.RUNNING and not session.outstanding and not session.stale


async def _should_run(
    connection: Connection, only: Collection[int] | None, without: Collection[int]
) -> AsyncIterator[list[int]]:
    """The ids of what should be running, in batches. What is in error is left to its provider's reports."""
    after = 0
    while True:
        rows = await connection.fetch(
            """SELECT id FROM sessions
                WHERE status IN ('starting', 'running') AND desired = 'running'
                  AND observed_generation = generation AND NOT stale AND id > $1
                  AND ($3::bigint[] IS NULL OR provider_id = ANY ($3)) AND provider_id <> ALL ($4::bigint[])
                ORDER BY id LIMIT $2""",
            after,
            _BATCH,
            None if only is None else list(only),
            list(without),
        )
        if not rows:
            return
        after = rows[-1]["id"]
        yield [row["id"] for row in rows]
