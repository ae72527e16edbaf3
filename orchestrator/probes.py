"""An orchestrator's own port: for probes, whether it lives and can work; for Prometheus, what it counts.

It answers from the first moment on, also while the process waits for what is away: that is no reason to start it again.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import orjson
import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from orchestrator import machines
from orchestrator.database import UNAVAILABLE, Pool
from orchestrator.deployments import leases
from orchestrator.deployments.worker import Worker
from orchestrator.errors import LogUnavailable, SettingsError
from orchestrator.eventlog import outbox
from orchestrator.eventlog.contract import EventLog
from orchestrator.metrics import gauge
from orchestrator.run import Orchestrator
from orchestrator.settings import ProbeSettings, may_read_metrics

log = structlog.get_logger("probes")

# Seconds that a part may take to answer: probes give up after a few.
_DEADLINE = 2.0


@dataclass(frozen=True, slots=True)
class _Part:
    """One thing that is needed: `ready` or `down`."""

    state: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class _Provider:
    state: str
    message: str
    checked_at: datetime | None


class Probes:
    """Answers for what is there already: each part is put in when it is open."""

    def __init__(self, settings: ProbeSettings) -> None:
        self._settings = settings
        self.pool: Pool | None = None
        self.log: EventLog | None = None
        self.orchestrator: Orchestrator | None = None

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int | None]:
        """Answer while the body runs; yields the port, None when there is to be none.

        Raises SettingsError when the address cannot be listened on.
        """
        if self._settings.port == "off":
            yield None
            return
        app = web.Application()
        app.add_routes(
            [web.get("/health", self._health), web.get("/ready", self._ready), web.get("/metrics", self._metrics)]
        )
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_DEADLINE)
        await runner.setup()
        try:
            await self._listen(runner)
            port = int(runner.addresses[0][1])
            log.info("probes are answered", host=self._settings.host, port=port)
            yield port
        finally:
            await runner.cleanup()

    async def _listen(self, runner: web.AppRunner) -> None:
        host, port = self._settings.host, int(self._settings.port)
        try:
            await web.TCPSite(runner, host, port, reuse_address=True).start()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                hint = "is in use by another process: set another ORCHESTRATOR_PORT, 0 for any that is free, or off"
                raise SettingsError(f"ORCHESTRATOR_PORT: {host}:{port} {hint}") from error
            raise SettingsError(
                f"ORCHESTRATOR_HOST: cannot listen on {host}:{port}: {error.strerror or error}"
            ) from error

    async def _health(self, _: web.Request) -> web.Response:
        """200 while the loops come round, whatever is away; that the event loop does is seen by the answer."""
        stalled = self.orchestrator.stalled() if self.orchestrator is not None else []
        if not stalled:
            return _json({"status": "ok"})
        log.error("loops hang", loops=stalled)
        return _json({"status": "stalled", "loops": stalled}, 503)

    async def _ready(self, request: web.Request) -> web.Response:
        """503 while the database is away, and before and after it works.

        An event log that is away is told ("degraded") with 200: sessions come and go without it, and their events wait
        in the outbox. Providers and the Docker engine of the apps are told, and do not count: others serve meanwhile.
        """
        (database, providers), events = await asyncio.gather(self._database(), self._events())
        works = self.orchestrator is not None and self.orchestrator.running
        orchestrator = _Part("ready") if works else _Part("down", "It begins, or ends.")
        serves = orchestrator.state == database.state == "ready"
        status = ("ready" if events.state == "ready" else "degraded") if serves else "down"
        parts = {"orchestrator": orchestrator, "database": database, "log": events}
        document = {name: asdict(part) for name, part in parts.items()}
        if self.orchestrator is not None and self.orchestrator.deployer is not None:
            document["apps"] = asdict(_engine(self.orchestrator.deployer.worker))
        told = {name: asdict(provider) for name, provider in providers.items()}
        if not self._trusts(request):
            # They may name hosts.
            for part in (document["log"], document.get("apps", {}), *told.values()):
                part["message"] = ""
        return _json({"status": status, **document, "providers": told}, 200 if serves else 503)

    async def _database(self) -> tuple[_Part, dict[str, _Provider]]:
        if self.pool is None:
            return _Part("down", "It has not answered yet."), {}
        try:
            async with asyncio.timeout(_DEADLINE), self.pool.acquire(timeout=_DEADLINE) as connection:
                rows = await machines.providers(connection)
        except UNAVAILABLE:
            # Not its words: the probe is open to everybody, and they may name hosts and users.
            return _Part("down", "It does not answer."), {}
        return _Part("ready"), {
            row.name: _Provider(row.state, row.message, row.checked_at) for row in rows if row.enabled
        }

    async def _events(self) -> _Part:
        if self.log is None:
            return _Part("down", "It has not answered yet.")
        try:
            async with asyncio.timeout(_DEADLINE):
                await self.log.check()
        except LogUnavailable as error:
            return _Part("down", str(error))
        except TimeoutError:
            return _Part("down", "It does not answer.")
        return _Part("ready")

    async def _metrics(self, request: web.Request) -> web.Response:
        """Prometheus' text format. Asks for METRICS_TOKEN when that is set."""
        if not self._trusts(request):
            problem = {
                "type": "about:blank",
                "title": "Unauthorized",
                "status": 401,
                "detail": "/metrics takes the bearer token of METRICS_TOKEN.",
            }
            return _json(problem, 401, {"WWW-Authenticate": "Bearer", "Content-Type": "application/problem+json"})
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(await self._shared())
        if self.orchestrator is not None:
            registry.register(self.orchestrator.metrics)
        return web.Response(
            body=generate_latest(registry),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8", "Cache-Control": "no-store"},
        )

    def _trusts(self, request: web.Request) -> bool:
        return may_read_metrics(request.headers.get("Authorization", ""), self._settings.metrics_token)

    async def _shared(self) -> _Shared:
        """What the database says of all orchestrators: every one of them says it alike."""
        if self.pool is None:
            return _Shared(None)
        try:
            async with asyncio.timeout(_DEADLINE), self.pool.acquire(timeout=_DEADLINE) as connection:
                return _Shared(await outbox.lag(connection), await leases.queued(connection))
        except UNAVAILABLE as error:
            log.warning("no metrics of the database", error=str(error) or type(error).__name__)
            return _Shared(None)


def _engine(worker: Worker) -> _Part:
    if worker.trouble is None:
        return _Part("down", "The Docker engine has not answered yet.")
    return _Part("down", worker.trouble) if worker.trouble else _Part("ready")


class _Shared(Collector):
    def __init__(self, lag: tuple[int, float] | None, queued: tuple[int, float] = (0, 0.0)) -> None:
        self._lag = lag
        self._queued = queued

    def collect(self) -> Iterator[Metric]:
        yield gauge("database_up", "Whether the database answered.", int(self._lag is not None))
        if self._lag is not None:
            count, age = self._lag
            yield gauge("outbox_events", "Events that the log has not confirmed yet.", count)
            yield gauge("outbox_oldest_seconds", "Age of the oldest of them.", age)
            count, age = self._queued
            yield gauge("deployments_queued", "Deployments that wait to be begun.", count)
            yield gauge("deployments_queued_oldest_seconds", "Age of the oldest of them.", age)


def _json(document: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=orjson.dumps(document),
        status=status,
        headers={"Content-Type": "application/json", "Cache-Control": "no-store", **(headers or {})},
    )
