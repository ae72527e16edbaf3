"""The worker: claims deployments that are due and apps that are to go, works on them, and renews their leases.

One loop does all the looking: it wakes at a hint (NOTIFY), in time for the leases, and every two seconds. That somebody
asked for the end of a deployment which is under way is seen by the same look. Another loop knows whether the engine
answers: while it does not nothing is begun, and those who wait are told.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

import structlog
from prometheus_client import Histogram

from orchestrator.database import UNAVAILABLE, Connection, Pool, Wakeup, backoff
from orchestrator.deployments import leases, removal
from orchestrator.deployments.leases import LeaseLost
from orchestrator.deployments.pipeline import ENGINE_AWAY, CancelRequested, Pipeline, Steps
from orchestrator.deployments.record import Deployment
from orchestrator.deployments.removal import Removal
from orchestrator.deployments.secrets import Keyring
from orchestrator.errors import EngineRefused, ProviderUnavailable
from orchestrator.settings import DeploySettings

log = structlog.get_logger("deployments")

# Seconds between two looks that no hint announced.
POLL = 2.0
# Of a lease: the rest is what cancelling a step may take before somebody else begins.
_SAFE = 0.7
# Seconds between two looks at an engine that answers, and at one that does not, at most.
ENGINE_INTERVAL = 10.0
_PATIENCE = 5.0
# Seconds, from a note at the engine to the longest build.
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Work(Steps, Protocol):
    """What is done at the engine, beside the steps of a deployment."""

    async def check(self) -> None:
        """Return when the engine answers. Raises ProviderUnavailable, EngineRefused."""

    async def remove_app(self, app_id: int) -> None:
        """Remove all that an app has. Raises ProviderUnavailable, EngineRefused."""


class _Why(StrEnum):
    """Why work that is under way has to end."""

    LOST = "lease lost"
    CANCELLED = "cancelled"
    STOPPING = "shutting down"


@dataclass(slots=True, eq=False)
class _Claim:
    """What this worker works on. `until` is when its lease is safe no more (loop time)."""

    owner: UUID
    until: float
    # None: it is an app's removal.
    pipeline: Pipeline | None = None
    clock: asyncio.Timeout | None = None
    task: asyncio.Task[None] | None = None
    why: _Why | None = None
    # Its end was asked for, and is being brought about.
    cancelling: bool = False

    @property
    def finishing(self) -> bool:
        """It lets go of its lease by itself."""
        return self.pipeline is not None and self.pipeline.finishing

    def extend(self, until: float) -> None:
        self.until = until
        # Work that is to end is on its way out already.
        if self.clock is not None and self.why is None and not self.clock.expired():
            self.clock.reschedule(until)

    def end(self, why: _Why) -> None:
        """Cancel what is under way, or about to begin."""
        if self.why is None:
            self.why = why
            if self.clock is not None and not self.clock.expired():
                self.clock.reschedule(0)


class Worker:
    """Works on up to `settings.concurrency` deployments at once. `iterate` until cancelled, then `drain`."""

    def __init__(self, settings: DeploySettings, pool: Pool, wakeup: Wakeup, work: Work) -> None:
        """Raises SettingsError for wrong keys."""
        self._settings = settings
        self._pool = pool
        self._wakeup = wakeup
        self._work = work
        self._keys = Keyring(settings.secrets_key)
        self._claims: dict[UUID, _Claim] = {}
        self._renewed_at = 0.0
        self._accepting = True
        self._engine_failures = 0
        # What keeps the engine from answering; "" while it does, None until it was asked.
        self.trouble: str | None = None
        # Those who wait were told that it is away.
        self._told = False
        # What this worker has done so far.
        self.claimed = 0
        self.lost = 0
        self.log_bytes = 0
        self.ended: Counter[str] = Counter()
        self.durations = Histogram(
            "cluster_code_deployment_step_duration_seconds",
            "Seconds that steps of deployments took, by step and what came of it.",
            ("step", "outcome"),
            buckets=_BUCKETS,
            registry=None,
        )

    @property
    def concurrency(self) -> int:
        """How many deployments are worked on at once, at most."""
        return self._settings.concurrency

    @property
    def working(self) -> int:
        """How many are worked on now, removals of apps included."""
        return len(self._claims)

    async def iterate(self) -> None:
        """Look once: at what is under way, and for what is due; then wait until there may be something to see."""
        await self._look_after_claims()
        if self._accepting:
            await self._claim()
        wait = POLL
        if self._claims:
            due = self._renewed_at + self._settings.lease / 3 - asyncio.get_running_loop().time()
            wait = max(0.0, min(wait, due))
        await self._wakeup.wait(wait)

    async def look_at_engine(self) -> None:
        """Ask the engine whether it answers, then wait until it is to be asked again."""
        try:
            await self._work.check()
            trouble = ""
            self._engine_failures = 0
        except (ProviderUnavailable, EngineRefused) as error:
            trouble = str(error)
            self._engine_failures += 1
        if trouble != self.trouble:
            if trouble:
                log.warning("the Docker engine does not serve", error=trouble)
            elif self.trouble:
                log.info("the Docker engine serves again")
            self.trouble = trouble
            self._wakeup.set()
        await asyncio.sleep(backoff(self._engine_failures, cap=_PATIENCE) if trouble else ENGINE_INTERVAL)

    async def drain(self, grace: float) -> None:
        """Take nothing new; let what is under way end within `grace` seconds, then give it back.

        `iterate` must go on being called meanwhile, for the leases.
        """
        self._accepting = False
        tasks = [claim.task for claim in self._claims.values() if claim.task is not None]
        if not tasks:
            return
        log.info("waiting for deployments that are worked on", deployments=len(tasks), grace=grace)
        await asyncio.wait(tasks, timeout=grace)
        self.abandon()
        await asyncio.wait(tasks, timeout=self._settings.lease)

    def abandon(self) -> None:
        """Cancel what is under way; it is given back, for another to go on with."""
        self._accepting = False
        for claim in self._claims.values():
            claim.end(_Why.STOPPING)

    async def _look_after_claims(self) -> None:
        if not self._claims:
            return
        now = asyncio.get_running_loop().time()
        lease = self._settings.lease
        claims = list(self._claims.values())
        held = [(claim.pipeline.deployment.id, claim.owner) for claim in claims if claim.pipeline is not None]
        removed = [claim.owner for claim in claims if claim.pipeline is None]
        renew = now >= self._renewed_at + lease / 3
        async with self._pool.acquire() as connection:
            if renew:
                wanted = await leases.renew(connection, held, lease)
                wanted |= dict.fromkeys(await removal.renew(connection, removed, lease) if removed else (), False)
                self._renewed_at = now
            else:
                wanted = await leases.check(connection, held) | dict.fromkeys(removed, False)
        for claim in claims:
            if claim.owner not in wanted:
                if not claim.finishing:
                    claim.end(_Why.LOST)
                continue
            if renew:
                claim.extend(now + lease * _SAFE)
            if wanted[claim.owner] and not claim.cancelling:
                claim.end(_Why.CANCELLED)

    async def _claim(self) -> None:
        free = self._settings.concurrency - len(self._claims)
        if free <= 0:
            return
        now = asyncio.get_running_loop().time()
        lease = self._settings.lease
        async with self._pool.acquire() as connection:
            async with connection.transaction():
                deployments = await leases.claim(connection, lease, free, queued=self.trouble == "")
                removals = await removal.claim(connection, lease, free - len(deployments))
            await self._tell_those_who_wait(connection)
        if not self._claims:
            self._renewed_at = now
        until = now + lease * _SAFE
        for deployment in deployments:
            self.claimed += 1
            pipeline = self._pipeline(deployment)
            claim = _Claim(pipeline.owner, until, pipeline)
            self._start(claim, self._deploy(claim, pipeline), f"deployment {deployment.id}")
        for removed in removals:
            claim = _Claim(removed.owner, until)
            self._start(claim, self._remove(claim, removed), f"removal of app {removed.app_id}")

    async def _tell_those_who_wait(self, connection: Connection) -> None:
        """That the engine is away, once for each; and when it is back, those for whom no room was."""
        if self.trouble:
            self._told = True
            await leases.explain_waiting(connection, ENGINE_AWAY, f"Waiting for the Docker engine. {self.trouble}")
        elif self._told and self.trouble == "":
            self._told = False
            await leases.explain_waiting(connection, "", "")

    def _pipeline(self, deployment: Deployment) -> Pipeline:
        return Pipeline(
            deployment,
            settings=self._settings,
            pool=self._pool,
            steps=self._work,
            keys=self._keys,
            durations=self.durations,
            on_stored=self._count_log,
        )

    def _count_log(self, count: int) -> None:
        self.log_bytes += count

    def _start(self, claim: _Claim, work: Coroutine[Any, Any, None], name: str) -> None:
        self._claims[claim.owner] = claim
        claim.task = asyncio.create_task(self._until_done(claim, work), name=name)

    async def _until_done(self, claim: _Claim, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            # Nothing may raise anything else. The lease runs out, as if we had died: that is not repeated without end.
            log.exception("work broke off", task=claim.task.get_name() if claim.task else "")
        finally:
            del self._claims[claim.owner]
            self._wakeup.set()

    async def _deploy(self, claim: _Claim, pipeline: Pipeline) -> None:
        deployment = pipeline.deployment
        try:
            why = await self._within(claim, pipeline.deploy())
            if why is _Why.CANCELLED:
                claim.cancelling, claim.why = True, None
                why = await self._within(claim, pipeline.cancel())
            if why is None:
                self.ended[pipeline.deployment.status] += 1
                log.info("deployment ended", deployment=deployment.id, status=pipeline.deployment.status)
                return
            log.info("deployment left", deployment=deployment.id, why=why.value)
            if why is _Why.LOST:
                self.lost += 1
            else:
                await pipeline.give_back()
        finally:
            await pipeline.close()

    async def _remove(self, claim: _Claim, removed: Removal) -> None:
        try:
            why = await self._within(claim, removal.carry_out(self._pool, removed, self._work.remove_app))
            if why is _Why.STOPPING:
                async with self._pool.acquire() as connection, connection.transaction():
                    await removal.release(connection, removed)
        except UNAVAILABLE as error:
            # Then the lease runs out by itself.
            log.warning("app not removed", app=removed.app_id, error=str(error) or type(error).__name__)

    async def _within(self, claim: _Claim, work: Coroutine[Any, Any, Any]) -> _Why | None:
        """Do the work while the lease lasts; None when it has come to its end, else why not."""
        clock = asyncio.timeout_at(claim.until if claim.why is None else 0)
        try:
            async with clock:
                claim.clock = clock
                await work
        except CancelRequested:
            return _Why.CANCELLED
        except LeaseLost:
            return _Why.LOST
        except TimeoutError:
            if not clock.expired():
                raise
            return claim.why or _Why.LOST
        finally:
            claim.clock = None
        return None
