"""What an orchestrator tells Prometheus of itself. Plain counters live where the work is done; they are only read here.

What the database says of all orchestrators is `probes`', and the gateway's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from orchestrator.bridge.bridge import Bridges, Reading
    from orchestrator.deployments.worker import Worker
    from orchestrator.eventlog.relay import Relaying
    from orchestrator.fleet import Fleet
    from orchestrator.logs import LogWriter
    from orchestrator.sessions.reconcile import Reconciler


# What is told of each watched cluster, by the name of a `Reading`'s field.
_CLUSTER = {
    "leads": ("watch_leads", GaugeMetricFamily, "Whether this process watches the cluster."),
    "told": ("watch_told", CounterMetricFamily, "Events of the cluster that this process has told."),
    "waiting": ("watch_waiting", GaugeMetricFamily, "Changes that are not told yet."),
    "streams": ("log_streams", GaugeMetricFamily, "Containers whose output is followed."),
    "streams_queued": ("log_streams_queued", GaugeMetricFamily, "Those that the option `log_streams` keeps out."),
}
# And of each resource there, by a `Resource`'s.
_RESOURCE = {
    "held": ("watch_objects", GaugeMetricFamily, "Objects that are held."),
    "last_event_age": ("watch_last_event_age_seconds", GaugeMetricFamily, "Since the watch last said anything."),
    "last_list_age": ("watch_last_list_age_seconds", GaugeMetricFamily, "Since a list was last complete."),
    "watch_restarts": ("watch_restarts", CounterMetricFamily, "Watches that had to be begun again."),
    "lists": ("watch_lists", CounterMetricFamily, "Lists that were complete."),
    "stale": ("watch_stale", CounterMetricFamily, "Objects that were passed over: late, or repeated."),
    "unreadable": ("watch_unreadable", CounterMetricFamily, "What was said, and could not be read."),
}


class Readings(Collector):
    """The parts of one orchestrator, read at the moment of a scrape. `relays` are by what they carry."""

    def __init__(
        self,
        reconciler: Reconciler,
        logs: LogWriter,
        fleet: Fleet,
        bridges: Bridges,
        relays: Mapping[str, Relaying],
        deployments: Worker | None,
    ) -> None:
        self._reconciler = reconciler
        self._logs = logs
        self._fleet = fleet
        self._bridges = bridges
        self._relays = relays
        self._deployments = deployments

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield from self._sessions()
        yield from self._carried()
        up = GaugeMetricFamily(
            "cluster_code_provider_up", "Whether this orchestrator reaches the provider.", labels=["provider", "kind"]
        )
        for provider, kind, state in self._fleet.states():
            up.add_metric([provider, kind], int(state == "up"))
        yield up
        yield from _watches(self._bridges.read())
        yield from self._bridges.lag.collect()
        if self._deployments is not None:
            yield from _deployments(self._deployments)

    def _sessions(self) -> Iterator[Metric]:
        reconciler = self._reconciler
        yield gauge("sessions_working", "Sessions that this orchestrator works on now.", reconciler.working)
        yield gauge("sessions_working_max", "Those that it works on at most.", reconciler.concurrency)
        yield counter("session_claims", "Sessions that it has taken on.", reconciler.claimed)
        yield from reconciler.durations.collect()
        logs = self._logs
        yield counter("session_log_lines", "Lines of sessions' output that were stored and published.", logs.written)
        yield counter("session_log_lines_dropped", "Those that came faster than they could be.", logs.dropped)
        yield gauge("session_log_lines_waiting", "Those that wait.", logs.waiting)

    def _carried(self) -> Iterator[Metric]:
        leads = GaugeMetricFamily("cluster_code_relay_leads", "Whether this process is the one.", labels=["relay"])
        rows = CounterMetricFamily("cluster_code_relayed", "Rows that it has carried into the log.", labels=["relay"])
        for what, relaying in self._relays.items():
            leads.add_metric([what], int(relaying.leads))
            rows.add_metric([what], relaying.rows)
        yield leads
        yield rows


def _deployments(worker: Worker) -> Iterator[Metric]:
    yield gauge("docker_up", "Whether the Docker engine that apps are deployed to answers.", int(worker.trouble == ""))
    yield gauge("deployments_working", "Deployments and removals that this orchestrator works on now.", worker.working)
    yield gauge("deployments_working_max", "Those that it works on at most.", worker.concurrency)
    yield counter("deployment_claims", "Deployments that it has taken on.", worker.claimed)
    yield counter(
        "deployment_leases_lost", "Those that another took over, or that the database was lost to.", worker.lost
    )
    yield counter("deployment_log_bytes", "Bytes of their logs that it has stored.", worker.log_bytes)
    ended = CounterMetricFamily("cluster_code_deployments_ended", "Those that it has ended.", labels=["status"])
    for status in ("live", "failed", "cancelled"):
        ended.add_metric([status], worker.ended[status])
    yield ended
    yield from worker.durations.collect()


def _watches(readings: Collection[Reading]) -> Iterator[Metric]:
    """Of each cluster. Where another process leads, `watch_leads` is 0, and nothing is told of its resources."""
    for field, (name, family, text) in _CLUSTER.items():
        metric = family(f"cluster_code_{name}", text, labels=["provider"])
        for reading in readings:
            metric.add_metric([reading.provider], getattr(reading, field))
        yield metric
    for field, (name, family, text) in _RESOURCE.items():
        metric = family(f"cluster_code_{name}", text, labels=["provider", "resource"])
        for reading in readings:
            for resource, one in reading.resources.items():
                if (value := getattr(one, field)) is not None:
                    metric.add_metric([reading.provider, resource], value)
        yield metric
    up = GaugeMetricFamily("cluster_code_watch_up", "Whether it is heard of now.", labels=["provider", "resource"])
    for reading in readings:
        for resource, one in reading.resources.items():
            up.add_metric([reading.provider, resource], int(not one.trouble))
    yield up


def gauge(name: str, text: str, value: float) -> Metric:
    """A value of now; our prefix is put before its name."""
    return GaugeMetricFamily(f"cluster_code_{name}", text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    """A value that grows while the process lives; our prefix and `_total` are put around its name."""
    return CounterMetricFamily(f"cluster_code_{name}", text, value=value)
