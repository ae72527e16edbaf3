"""The reconcile loop: claim what is due, do one step about each, record it; renew the leases of what is under way.

One loop does all the looking: it wakes at a hint (NOTIFY), when a retry is due, in time for the leases, and at the
latest after the poll interval. A request that comes while a step is under way ends the step, so that a delete does not
wait for a start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from uuid import UUID

import structlog
from prometheus_client import Histogram

from orchestrator.database import UNAVAILABLE, Pool, Wakeup, backoff
from orchestrator.sessions import leases, steps
from orchestrator.sessions.record import After, Session, statuses
from orchestrator.sessions.state import Status, decide
from orchestrator.sessions.steps import Changes, FindProvider, Interrupted
from orchestrator.settings import OrchestratorSettings
from orchestrator.tasks import to_the_end

log = structlog.get_logger("reconcile")

# Of the lease: the rest is what cancelling the step may take before somebody else begins.
_SAFE = 0.9
# Seconds: from a note in the database to an image that is pulled first.
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(slots=True, eq=False)
class _Claim:
    """A session that this process works on. `until` is when its lease is safe no more (loop time)."""

    session: Session
    until: float
    clock: asyncio.Timeout | None = None
    task: asyncio.Task[None] | None = None
    why: str = "lease lost"
    recorded: bool = False

    @property
    def owner(self) -> UUID:
        if self.session.lease_owner is None:
            raise AssertionError("a claim has an owner")
        return self.session.lease_owner

    def extend(self, until: float) -> None:
        self.until = until
        # One that has expired is on its way out already.
        if self.clock is not None and not self.clock.expired():
            self.clock.reschedule(until)

    def end(self, why: str) -> None:
        """Cancel the step; its task gives the claim back."""
        self.why = why
        self.extend(0)


class Reconciler:
    """Works on up to `settings.concurrency` sessions at once. `iterate` until cancelled, then `drain`.

    `elsewhere` names the providers whose sessions are another orchestrator's.
    """

    def __init__(
        self,
        settings: OrchestratorSettings,
        pool: Pool,
        wakeup: Wakeup,
        find: FindProvider,
        elsewhere: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._wakeup = wakeup
        self._find = find
        self._elsewhere = elsewhere
        self._claims: dict[UUID, _Claim] = {}
        self._renewed_at = 0.0
        self._accepting = True
        self._more = False
        # Sessions taken on so far, and what came of it.
        self.claimed = 0
        self.durations = Histogram(
            "cluster_code_step_duration_seconds",
            "Seconds that steps about sessions took, by what they were and what came of them.",
            ("step", "outcome"),
            buckets=_BUCKETS,
            registry=None,
        )

    @property
    def concurrency(self) -> int:
        """How many sessions are worked on at once, at most."""
        return self._settings.concurrency

    @property
    def working(self) -> int:
        """How many sessions are worked on now."""
        return len(self._claims)

    async def iterate(self) -> None:
        """Look once: at what is under way, and for what is due; then wait until there may be something to see."""
        await self._look_after_claims()
        wait = self._settings.poll_interval
        if self._accepting:
            await self._claim()
        if self._claims:
            due = self._renewed_at + self._settings.lease / 3 - asyncio.get_running_loop().time()
            wait = max(0.0, min(wait, due))
        await self._wakeup.wait(wait)

    async def drain(self, grace: float) -> None:
        """Take nothing new; let what is under way end within `grace` seconds, then cancel it and give it back.

        `iterate` must go on being called meanwhile, for the leases.
        """
        self._accepting = False
        tasks = [claim.task for claim in self._claims.values() if claim.task is not None]
        if not tasks:
            return
        log.info("waiting for sessions that are worked on", sessions=len(tasks), grace=grace)
        await asyncio.wait(tasks, timeout=grace)
        self.abandon()
        await asyncio.wait(tasks, timeout=self._settings.lease)

    def abandon(self) -> None:
        """Cancel what is under way; it is given back, for another to go on with."""
        self._accepting = False
        for claim in self._claims.values():
            claim.end("shutting down")

    async def _look_after_claims(self) -> None:
        if not self._claims:
            return
        now = asyncio.get_running_loop().time()
        held = [(claim.session.id, owner) for owner, claim in self._claims.items()]
        renew = now >= self._renewed_at + self._settings.lease / 3
        async with self._pool.acquire() as connection:
            wanted = (
                await leases.renew(connection, held, self._settings.lease)
                if renew
                else await leases.check(connection, held)
            )
        if renew:
            self._renewed_at = now
        for _, owner in held:
            claim = self._claims.get(owner)
            # Done while we asked, or its result is being recorded: that finds out for itself.
            if claim is None or claim.recorded:
                continue
            if owner not in wanted:
                claim.end("lease lost")
            elif wanted[owner] != claim.session.generation:
                claim.end("overtaken by a request")
            elif renew:
                claim.extend(now + self._settings.lease * _SAFE)

    async def _claim(self) -> None:
        free = self._settings.concurrency - len(self._claims)
        self._more = free <= 0
        if free <= 0:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        async with self._pool.acquire() as connection:
            sessions = await leases.claim(connection, self._settings.lease, free, without=self._elsewhere())
        self._more = len(sessions) == free
        self.claimed += len(sessions)
        if not self._claims:
            self._renewed_at = now
        for session in sessions:
            claim = _Claim(session, now + self._settings.lease * _SAFE)
            self._claims[claim.owner] = claim
            claim.task = loop.create_task(self._work(claim), name=f"session {session.id}")

    async def _work(self, claim: _Claim) -> None:
        session = claim.session
        step = decide(*statuses(session), outstanding=session.outstanding, stale=session.stale)
        began, outcome = asyncio.get_running_loop().time(), "interrupted"
        try:
            async with asyncio.timeout_at(claim.until) as claim.clock:
                changes = await steps.carry_out(
                    session, pool=self._pool, find=self._find, start_deadline=self._settings.start_deadline
                )
                await to_the_end(self._record(claim, changes), name=f"session {session.id} record")
            outcome = _outcome(changes)
        except TimeoutError:
            log.info("step ended", session=session.id, why=claim.why)
        except Interrupted as why:
            log.info("step ended", session=session.id, why=str(why))
        except Exception:
            claim.clock = None
            # Nothing above may raise anything else. Whoever claims the row next may fare better.
            outcome = "broken off"
            log.exception("step broke off", session=session.id)
            await asyncio.sleep(backoff(3))
        finally:
            claim.clock = None
            self.durations.labels(step.value, outcome).observe(asyncio.get_running_loop().time() - began)
            try:
                if not claim.recorded:
                    await to_the_end(self._release(claim), name=f"session {session.id} release")
            finally:
                del self._claims[claim.owner]
                if self._more or not claim.recorded:
                    self._wakeup.set()

    async def _record(self, claim: _Claim, changes: Changes) -> None:
        """Write a step's result as soon as the database takes it; while the lease lasts nobody else can."""
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with self._pool.acquire() as connection, connection.transaction():
                    recorded = await leases.settle(connection, claim.session, changes, release=True)
                break
            except UNAVAILABLE as error:
                failures += 1
                if loop.time() >= claim.until:
                    raise Interrupted(f"result not recorded: {error or type(error).__name__}") from error
                await asyncio.sleep(backoff(failures, cap=1.0))
        if recorded is None:
            raise Interrupted("overtaken")
        claim.recorded = True
        if recorded.outstanding or recorded.stale:
            retry = changes.get("next_attempt_at")
            # The poll would find it too, but later.
            loop.call_later(retry.seconds if isinstance(retry, After) else 0, self._wakeup.set)

    async def _release(self, claim: _Claim) -> None:
        try:
            async with self._pool.acquire() as connection:
                await leases.release(connection, claim.session)
        except UNAVAILABLE as error:
            # Then the lease runs out by itself.
            log.warning("lease not given back", session=claim.session.id, error=str(error) or type(error).__name__)


def _outcome(changes: Changes) -> str:
    """What a step that was recorded has come to: `done`, `failed` for good, or to be tried again (`retried`)."""
    if changes.get("status") == Status.ERROR:
        return "failed"
    return "done" if "observed_generation" in changes else "retried"
