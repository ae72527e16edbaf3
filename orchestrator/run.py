"""The orchestrator's composition root: opens what it needs, runs its named tasks, and closes all in reverse order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from time import monotonic
from typing import Any

import structlog

from orchestrator import events, fleet
from orchestrator.bridge.bridge import Bridges
from orchestrator.bridge.statuses import Look
from orchestrator.database import UNAVAILABLE, Pool, Wakeup, backoff, guard, leadership, listen, require_schema
from orchestrator.deployments.deployer import Deployer
from orchestrator.eventlog import dead_letters, outbox
from orchestrator.eventlog.contract import EventLog, Exchange
from orchestrator.eventlog.relay import Relaying
from orchestrator.fleet import Fleet, OpenProvider
from orchestrator.following import Following
from orchestrator.holds import Holds
from orchestrator.logs import LogWriter
from orchestrator.metrics import Readings
from orchestrator.sessions import leases
from orchestrator.sessions.culling import cull
from orchestrator.sessions.observe import Observer
from orchestrator.sessions.reconcile import Reconciler
from orchestrator.settings import DatabaseSettings, DeploySettings, OrchestratorSettings
from orchestrator.tasks import to_the_end
from orchestrator.user_sync import UserSync

log = structlog.get_logger("orchestrator")

# The advisory lock of the one that resyncs and culls.
LEADER_KEY = 0x75706B656570
# Seconds between two looks for what time has ended.
CULL_INTERVAL = 60.0
# Seconds that the last lines of output get to be stored at the end.
FLUSH_DEADLINE = 5.0
# Seconds that one turn of a loop may take, beside its wait: opening and closing providers takes long.
TURN_DEADLINE = 120.0


class Orchestrator:
    """Makes sessions what they shall be, and deploys apps. Any number may work on one database.

    `run` until cancelled: the first cancellation takes no new work, gives steps that are under way `grace` seconds,
    gives the rest back so that another goes on at once, and closes the providers. `alone` says that no other
    orchestrator works on this database (it is embedded): what a killed one held is then taken over at once. `exchange`
    is what there is beside a log in RabbitMQ. Without `deploy`, and with a concurrency of 0 in it, apps are others' to
    deploy. The pool, the event log and the exchange are the caller's, and outlive this.
    """

    def __init__(
        self,
        *,
        settings: OrchestratorSettings,
        database_settings: DatabaseSettings,
        pool: Pool,
        log: EventLog,
        open_provider: OpenProvider,
        exchange: Exchange | None = None,
        deploy: DeploySettings | None = None,
        alone: bool = False,
        grace: float = 5.0,
    ) -> None:
        self._settings = settings
        self._database_settings = database_settings
        self._pool = pool
        self._event_log = log
        self._exchange = exchange
        self._alone = alone
        self._grace = grace
        self._work = Wakeup()
        self._providers = Wakeup()
        self._outbox = Wakeup()
        self._dead_letters = Wakeup()
        self._upkeep = Wakeup()
        self._own_upkeep = Wakeup()
        self._logs = LogWriter(pool, log, keep=settings.log_lines)
        self._fleet = Fleet(
            pool,
            Holds(database_settings),
            open_provider,
            data_dir=settings.data_dir,
            sink=self._logs.sink,
            on_observation=lambda session_id, seen: self._observer.look(session_id, seen),
            on_change=self._look_anew,
            run_bridge=lambda provider_id, name, provider: self.bridges.run(provider_id, name, provider),
            follow=Following(database_settings, self._logs).run,
        )
        self._observer = Observer(settings, pool, self._work, self._fleet.find)
        self.bridges = Bridges(database_settings, pool, self._logs, Look(self._observer.look, settings.start_deadline))
        self._reconciler = Reconciler(settings, pool, self._work, self._fleet.find, lambda: self._fleet.elsewhere)
        self.deployer = (
            Deployer(deploy, database_settings, pool) if deploy is not None and deploy.concurrency > 0 else None
        )
        self._culled_at: float | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        relays = {"outbox": Relaying()} | ({"dead letters": Relaying()} if exchange is not None else {})
        self._relays = relays
        # When each of these loops is to have come round again (monotonic).
        self._due: dict[str, float] = {}
        self.metrics = Readings(
            self._reconciler,
            self._logs,
            self._fleet,
            self.bridges,
            relays,
            self.deployer.worker if self.deployer else None,
        )

    @property
    def running(self) -> bool:
        """Whether it works: it is neither about to begin nor to end."""
        return bool(self._tasks)

    def stalled(self) -> list[str]:
        """The loops that hang, by name: they should have come round long ago, whatever is away."""
        now = monotonic()
        return [name for name, due in self._due.items() if now > due]

    async def run(self) -> None:
        """Work until cancelled.

        Raises what a root task died of, and SchemaOutdated before anything is done: the process shall end then.
        """
        try:
            await self._open()
            for name, work in self._roots().items():
                self._tasks[name] = asyncio.create_task(work, name=name)
            log.info("orchestrator runs", concurrency=self._settings.concurrency)
            await self._until_one_ends()
        finally:
            # A second cancellation does not wait for the grace to end, but closes what is open all the same.
            await to_the_end(self._close(), name="orchestrator close", on_cancel=self._abandon)

    async def _open(self) -> None:
        """Take over and open the providers, however long the database is away. Raises SchemaOutdated."""
        await _until_it_works("schema", self._require_schema)
        if self._alone:
            await _until_it_works("take over", self._take_over)
        await _until_it_works("providers", self._fleet.refresh)

    async def _require_schema(self) -> None:
        await require_schema(self._pool)

    async def _take_over(self) -> None:
        async with self._pool.acquire() as connection:
            if count := await leases.void(connection):
                log.warning("going on with what a killed orchestrator was working on", sessions=count)
        if self.deployer is not None and (count := await self.deployer.take_over()):
            log.warning("going on with what a killed orchestrator was working on", deployments=count)

    def _roots(self) -> dict[str, Coroutine[Any, Any, None]]:
        wakeups = {
            "providers": self._providers,
            "sessions": self._work,
            "outbox": self._outbox,
            "dead_letters": self._dead_letters,
        }
        if self.deployer is not None:
            wakeups["deployments"] = self.deployer.wakeup
        poll = self._settings.poll_interval
        roots: dict[str, Coroutine[Any, Any, None]] = {
            "listen": listen(self._database_settings, wakeups),
            "outbox relay": outbox.relay(
                self._database_settings, self._event_log, self._outbox, poll, self._relays["outbox"]
            ),
            "session output": self._logs.run(),
            "reconcile": guard("reconcile", self._watched("reconcile", self._reconciler.iterate, poll)),
            "upkeep": guard("upkeep", self._lead_upkeep),
            "own upkeep": guard("own upkeep", self._look_after_own),
            "providers": guard(
                "providers", self._watched("providers", self._look_after_providers, fleet.CHECK_INTERVAL)
            ),
            "holds": guard("holds", self._look_for_providers),
        }
        if self.deployer is not None:
            for name, iteration in self.deployer.roots().items():
                # The leader's never comes round: it is the engine that has deadlines.
                watched = iteration if name == "sweep" else self._watched(name, iteration, 60.0)
                roots[name] = guard(name, watched)
        if self._exchange is not None:
            roots["dead letters"] = dead_letters.relay(
                self._database_settings, self._exchange, self._dead_letters, poll, self._relays["dead letters"]
            )
            roots["user sync"] = self._exchange.consume(
                events.USERS_QUEUE, [events.USER_MESSAGES], UserSync(self._pool).handle
            )
        return roots

    def _watched(
        self, name: str, iteration: Callable[[], Awaitable[None]], wait: float
    ) -> Callable[[], Awaitable[None]]:
        """An iteration that `stalled` hears of when it takes longer than `wait` (seconds) and what a turn may take."""

        async def watched() -> None:
            self._due[name] = monotonic() + wait + TURN_DEADLINE
            await iteration()

        return watched

    def _look_anew(self) -> None:
        """Providers were opened or closed: what ran at them may be gone, and what is due may be ours now."""
        for wakeup in (self._upkeep, self._own_upkeep, self._work):
            wakeup.set()

    async def _until_one_ends(self) -> None:
        done, _ = await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            log.error("root task ended", task=task.get_name(), exc_info=_failure(task))
        ended = done.pop()
        raise RuntimeError(f"the orchestrator's task {ended.get_name()!r} ended") from _failure(ended)

    async def _lead_upkeep(self) -> None:
        """As the leader: inspect what should run, at once and then regularly; end what time has ended."""
        async with leadership(self._database_settings, LEADER_KEY) as connection:
            while True:
                # What another holds, and what we do, is not for the leader: `_look_after_own`. A bridge sees all.
                without = [*self._fleet.held, *self._fleet.elsewhere, *self._fleet.watched]
                await self._observer.resync(connection, without=without)
                if self._culled_at is None or monotonic() >= self._culled_at + CULL_INTERVAL:
                    await cull(connection, self._settings)
                    self._culled_at = monotonic()
                await self._upkeep.wait(self._settings.resync_interval)

    async def _look_after_own(self) -> None:
        """Inspect what should run at the providers that only this orchestrator has open."""
        if held := self._fleet.held:
            async with self._pool.acquire() as connection:
                await self._observer.resync(connection, only=held)
        await self._own_upkeep.wait(self._settings.resync_interval)

    async def _look_for_providers(self) -> None:
        await self._fleet.look()
        await asyncio.sleep(fleet.LOOK_INTERVAL)

    async def _look_after_providers(self) -> None:
        await self._fleet.refresh()
        await self._fleet.check()
        await self._providers.wait(fleet.CHECK_INTERVAL)

    async def _close(self) -> None:
        # Leases are renewed and results recorded while what is under way comes to its end.
        drains = [self._reconciler.drain(self._grace)]
        if self.deployer is not None:
            drains.append(self.deployer.worker.drain(self._grace))
        await asyncio.gather(*drains)
        await self._end("reconcile", "upkeep", "own upkeep", "providers", "holds")
        if self.deployer is not None:
            await self._end(*self.deployer.roots())
            await self.deployer.close()
        await self._fleet.close()
        await self._end("session output")
        await self._logs.flush(FLUSH_DEADLINE)
        await self._end(*self._tasks)
        log.info("orchestrator ended")

    def _abandon(self) -> None:
        self._reconciler.abandon()
        if self.deployer is not None:
            self.deployer.worker.abandon()

    async def _end(self, *names: str) -> None:
        tasks = [self._tasks.pop(name) for name in names if name in self._tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            if (failed := _failure(task)) is not None:
                log.error("task failed at the end", task=task.get_name(), exc_info=failed)


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()


async def _until_it_works(name: str, once: Callable[[], Awaitable[None]]) -> None:
    failures = 0
    while True:
        try:
            return await once()
        except UNAVAILABLE as error:
            failures += 1
            log.warning("database away", task=name, error=str(error) or type(error).__name__, failures=failures)
            await asyncio.sleep(backoff(failures))
