"""What `/metrics` tells Prometheus. Plain counters live where the work is done; they are only read when it asks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from time import monotonic

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.context import Context
from gateway.operation import lease
from orchestrator.database import UNAVAILABLE
from orchestrator.errors import LogUnavailable
from orchestrator.eventlog import dead_letters, outbox
from orchestrator.sessions import store

log = structlog.get_logger("gateway.metrics")

# Seconds that what the database says about all of us is kept: every replica is asked, and asking is a scan.
_CACHE = 15.0
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Methods by name; whatever else a client invents is one more, so that it cannot make labels without end.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
# A handshake's duration is its connection's, which says nothing about requests.
_SWITCHING_PROTOCOLS = 101


class Metrics:
    """One gateway's metrics."""

    def __init__(self, context: Context) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "cluster_code_http_request_duration_seconds",
            "Seconds from the first line of a request to its answer.",
            ("method", "route", "status"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        # What `labels` gives, found by a lookup that costs a tenth of it.
        self._children: dict[tuple[str, str, int], Histogram] = {}
        self._readings = _Readings(context)
        self._registry.register(self._readings)

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request by its route's template."""
        if status == _SWITCHING_PROTOCOLS:
            return
        key = (method, route, status)
        child = self._children.get(key)
        if child is None:
            known = method if method in _METHODS else "other"
            child = self._requests.labels(known, route, str(status))
            if known == method:
                self._children[key] = child
        child.observe(seconds)

    def include(self, readings: Collector) -> None:
        """Tell also what another part of this process counts."""
        self._registry.register(readings)

    async def render(self) -> bytes:
        """The text format, version 0.0.4."""
        await self._readings.refresh()
        return generate_latest(self._registry)


class _Readings(Collector):
    """What the parts of the gateway and the database say, read at the moment of a scrape."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sessions: Mapping[str, int] = {}
        self._outbox: tuple[int, float] = (0, 0.0)
        self._dead_letters: tuple[int, int] = (0, 0)
        self._log_head = 0
        self._database_up = False
        self._refreshed: float | None = None
        self._refreshing = asyncio.Lock()

    async def refresh(self) -> None:
        """Ask database and log, unless they were asked a moment ago. While they are away, the last answers stand."""
        async with self._refreshing:
            if self._refreshed is not None and monotonic() - self._refreshed < _CACHE:
                return
            try:
                async with lease(self._context) as connection:
                    self._sessions = await store.count_by_status(connection)
                    count, age = await outbox.lag(connection)
                    self._outbox = (count, age)
                    self._dead_letters = await dead_letters.count(connection)
                self._database_up = True
            except UNAVAILABLE as error:
                self._database_up = False
                log.warning("no metrics of the database", error=str(error) or type(error).__name__)
            try:
                self._log_head = await self._context.log.head()
            except LogUnavailable as error:
                log.warning("no metrics of the event log", error=str(error))
            self._refreshed = monotonic()

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield from self._realtime()
        pool = self._context.pool
        yield _gauge("database_up", "Whether the database answered at the last look.", int(self._database_up))
        yield _gauge("database_pool_connections", "Connections that the pool has open.", pool.get_size())
        yield _gauge("database_pool_idle_connections", "Connections that wait for a request.", pool.get_idle_size())
        yield _gauge("database_pool_max_connections", "Connections that the pool may open.", pool.get_max_size())
        count, age = self._outbox
        yield _gauge("outbox_events", "Events that the log has not confirmed yet.", count)
        yield _gauge("outbox_oldest_seconds", "Age of the oldest of them.", age)
        letters, waiting = self._dead_letters
        yield _gauge("dead_letters", "Messages that nobody could use, of all gateways, as kept on file.", letters)
        yield _gauge("dead_letters_waiting", "Those of them that are not in their queue yet.", waiting)
        sessions = GaugeMetricFamily("cluster_code_sessions", "Sessions, by status.", labels=["status"])
        for status, number in self._sessions.items():
            sessions.add_metric([status], number)
        yield sessions

    def _realtime(self) -> Iterator[Metric]:
        hub, feed, history = self._context.hub, self._context.feed, self._context.history
        yield _gauge("log_head", "Offset of the newest entry of the event log, at the last look.", self._log_head)
        yield _gauge("feed_ready", "Whether the feed has caught up with the event log.", int(feed.ready))
        yield _gauge("feed_offset", "Offset of the last entry that the feed has read.", feed.offset)
        if feed.age is not None:
            yield _gauge("feed_age_seconds", "Seconds since it read one.", feed.age)
        yield _counter("feed_invalid", "Entries that were no envelope and were passed over.", feed.invalid)
        yield _counter("dead_letters_dropped", "Those that came too fast to be noted.", feed.dead_letters.dropped)
        yield _counter("feed_failures", "Times that the log could not be read.", feed.failures)
        yield _counter("feed_resets", "Times that the feed began anew, and all clients with it.", feed.resets)
        yield _gauge("history_events", "Events kept for clients that resume.", len(history))
        yield _gauge("history_bytes", "Bytes that they take.", history.bytes)
        yield _counter("history_repeats", "Repeated publications that were dropped.", history.repeats)
        archive = self._context.archive
        yield _counter("replays", "Replays from the log, of what the history had dropped.", archive.replays)
        yield _gauge("replays_running", "Those under way.", archive.reading)
        yield _gauge("connections", "Open connections of both kinds.", len(hub.connections))
        streams = sum(one.kind == "sse" for one in hub.connections.values())
        yield _gauge("event_streams", "Those of them that get server-sent events.", streams)
        yield _gauge("drain_seconds", "How long a drain would take that began now.", hub.drain_seconds)
        yield _gauge("connected_users", "Users that have one.", len(hub.by_user))
        yield _counter("deliveries", "Events handed to connections.", hub.deliveries)
        yield _counter("frames", "WebSocket frames written for them.", hub.frames)
        yield _counter("delivered_bytes", "Bytes written for them.", hub.bytes)
        replicas = self._context.replicas
        yield _gauge("replicas", "Gateways that live, as far as this one knows, with itself.", len(replicas.alive))
        yield _counter("questions", "Questions that this gateway has asked all replicas.", replicas.asked)
        yield _counter("questions_incomplete", "Those that some replica did not answer in time.", replicas.incomplete)
        closes = CounterMetricFamily("cluster_code_closes", "Connections that ended, by close code.", labels=["code"])
        for code, number in hub.closes.items():
            closes.add_metric([str(code)], number)
        yield closes
        recoveries = CounterMetricFamily(
            "cluster_code_recoveries", "Resumptions, by what came of them.", labels=["outcome"]
        )
        for outcome, number in hub.recoveries.items():
            recoveries.add_metric([str(outcome)], number)
        yield recoveries


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"cluster_code_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"cluster_code_{name}", text, value=value)


METRICS = web.AppKey("metrics", Metrics)
