"""The watch bridge between clusters and sessions: of all orchestrators one leads for each provider, and watches it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic

import structlog
from prometheus_client import Histogram

from orchestrator.bridge.leading import Counts, Lead
from orchestrator.bridge.output import Output
from orchestrator.bridge.statuses import Look, Watched
from orchestrator.database import UNAVAILABLE, Pool, backoff, leadership
from orchestrator.settings import DatabaseSettings

log = structlog.get_logger("bridge")

# The advisory locks of the leaders: the number of the provider is added.
LEADER_KEY = 0x62726964_00000000
_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Resource:
    """How one kind of object is followed. Ages are in seconds; None: not yet."""

    held: int
    last_event_age: float | None
    last_list_age: float | None
    watch_restarts: int
    lists: int
    stale: int
    unreadable: int
    # Why nothing is heard of it now; "": it is.
    trouble: str


@dataclass(frozen=True, slots=True)
class Reading:
    """How one provider's bridge is now. Without the lead, its `resources` are empty."""

    provider: str
    leads: bool
    # Events told so far, by this process.
    told: int
    # Changes that are not told yet.
    waiting: int
    # Containers whose output is followed, and pods of which some are kept out by the bound.
    streams: int
    streams_queued: int
    resources: Mapping[str, Resource]


class Bridge:
    """One provider's. `run` until cancelled."""

    def __init__(self, bridges: Bridges, provider_id: int, name: str, provider: Watched) -> None:
        self._bridges = bridges
        self._provider_id = provider_id
        self._name = name
        self._provider = provider
        self._counts = Counts(bridges.lag.labels(name).observe)
        self._lead: Lead | None = None

    async def run(self) -> None:
        """Wait for the lead and follow the cluster, for ever; no outage ends it. Cancelling gives up the lead."""
        failures = 0
        while True:
            began = monotonic()
            try:
                async with leadership(self._bridges.settings, LEADER_KEY + self._provider_id) as connection:
                    began = monotonic()
                    self._lead = Lead(
                        connection, self._bridges.pool, self._provider_id, self._name, self._provider,
                        self._bridges.look, self._bridges.output, self._counts,
                    )  # fmt: skip
                    await self._lead.run()
            except UNAVAILABLE as error:
                failures = failures + 1 if monotonic() - began < _BUCKETS[-1] else 1
                log.warning("the lead is lost", provider=self._name, error=str(error) or type(error).__name__)
            finally:
                self._lead = None
            await asyncio.sleep(backoff(failures))

    def read(self) -> Reading:
        """How it is now."""
        lead, now = self._lead, monotonic()
        if lead is None:
            return Reading(self._name, False, self._counts.told, 0, 0, 0, {})
        resources = {}
        for name, informer in lead.informers():
            stats = informer.stats
            resources[name] = Resource(
                held=len(informer),
                last_event_age=None if stats.last_event is None else now - stats.last_event,
                last_list_age=None if stats.last_list is None else now - stats.last_list,
                watch_restarts=stats.restarts,
                lists=stats.lists,
                stale=stats.stale,
                unreadable=stats.unreadable,
                trouble="" if informer.trouble is None else str(informer.trouble),
            )
        streams = lead.streams
        return Reading(self._name, True, self._counts.told, lead.waiting, streams.open, streams.waiting, resources)


class Bridges:
    """Those of all open providers. `run` one for each, `read` for what Prometheus is told.

    `lag`: the seconds that the oldest change of a transaction has waited, from the bytes' arrival until it was told.
    """

    def __init__(self, settings: DatabaseSettings, pool: Pool, output: Output, look: Look) -> None:
        self.settings = settings
        self.pool = pool
        self.output = output
        self.look = look
        self.lag = Histogram(
            "cluster_code_watch_lag_seconds",
            "Seconds from the arrival of a cluster's change until it was told: the oldest of each transaction.",
            ("provider",),
            buckets=_BUCKETS,
            registry=None,
        )
        self._open: dict[str, Bridge] = {}

    async def run(self, provider_id: int, name: str, provider: Watched) -> None:
        """Look after a provider's sessions until cancelled."""
        bridge = self._open[name] = Bridge(self, provider_id, name, provider)
        try:
            await bridge.run()
        finally:
            if self._open.get(name) is bridge:
                del self._open[name]

    def read(self) -> list[Reading]:
        """How each is now."""
        return [bridge.read() for bridge in self._open.values()]
