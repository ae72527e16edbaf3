"""What an orchestrator tells Prometheus of itself. Plain counters live where the work is done; they are only read here.

What the database says of all orchestrators is `probes`', and the gateway's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from orchestrator.eventlog.relay import Relaying
    from orchestrator.fleet import Fleet
    from orchestrator.logs import LogWriter
    from orchestrator.sessions.reconcile import Reconciler


class Readings(Collector):
    """The parts of one orchestrator, read at the moment of a scrape. `relays` are by what they carry."""

    def __init__(self, reconciler: Reconciler, logs: LogWriter, fleet: Fleet, relays: Mapping[str, Relaying]) -> None:
        self._reconciler = reconciler
        self._logs = logs
        self._fleet = fleet
        self._relays = relays

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


def gauge(name: str, text: str, value: float) -> Metric:
    """A value of now; our prefix is put before its name."""
    return GaugeMetricFamily(f"cluster_code_{name}", text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    """A value that grows while the process lives; our prefix and `_total` are put around its name."""
    return CounterMetricFamily(f"cluster_code_{name}", text, value=value)
