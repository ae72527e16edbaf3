"""What the cluster's objects mean for the sessions' rows: the same diagnosis that a provider makes, from what is held.

Only rows whose request is carried out are changed here; whoever carries one out looks for himself, and what happened
meanwhile is looked at again afterwards. What is held may be older than a row that was just written, and says nothing of
endpoints: a verdict that hangs on either is left to `inspect`, which asks the cluster itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, Protocol

import structlog

from orchestrator.cluster.client import Cluster
from orchestrator.cluster.objects import SESSION, Deployment, Event, Ingress, Namespace, Pod
from orchestrator.cluster.watch import Informer
from orchestrator.database import UNAVAILABLE, Connection
from orchestrator.errors import ApiRefused, ProviderUnavailable
from orchestrator.providers.contract import Observation, State
from orchestrator.providers.diagnosis import crashed, diagnose
from orchestrator.providers.evidence import Evidence, Rules, is_ready
from orchestrator.providers.options import KubernetesOptions
from orchestrator.sessions import leases, record, steps
from orchestrator.sessions.record import COLUMNS, After, Session, endpoint_columns
from orchestrator.sessions.state import Desired, Status
from orchestrator.sessions.steps import Changes

log = structlog.get_logger("bridge")

# Rows that were changed more recently than this may know more than what is held.
_RECENT = timedelta(seconds=5)
# Seconds until a session that comes up by itself is looked at again: what is given time may have had it. They double.
_RISING = 1.0
_LONGEST_RISING = 16.0
# Sessions looked at between two turns of the loop.
_SLICE = 50
# Inspections, and reads of what crashed containers wrote last, at the same time.
_AT_ONCE = 8
# Lines of the output of a container that crashed.
_LAST_LINES = 20
# Seconds until a session that an outage has marked is inspected, when nobody has done so before.
_PATIENCE = 30.0


class Watched(Protocol):
    """A provider whose sessions a bridge can look after."""

    @property
    def cluster(self) -> Cluster: ...
    @property
    def options(self) -> KubernetesOptions: ...
    @property
    def rules(self) -> Rules: ...


@dataclass(frozen=True, slots=True)
class Held:
    """What the informers hold of one cluster."""

    namespaces: Informer[Namespace]
    deployments: Informer[Deployment]
    pods: Informer[Pod]
    events: Informer[Event]
    ingresses: Informer[Ingress]


@dataclass(frozen=True, slots=True)
class Look:
    """Inspecting one session at its provider (`sessions.observe.Observer.look`), and how long a start may take."""

    inspect: Callable[[int], Awaitable[None]]
    # Seconds.
    start_deadline: float


class Statuses:
    """The sessions of one provider. `decide` before a transaction, `record` within it; `close` at the end."""

    def __init__(self, provider_id: int, provider: Watched, held: Held, look: Look, news: Callable[[], None]) -> None:
        self._provider_id = provider_id
        self._provider = provider
        self._held = held
        self._look = look
        self._news = news
        # Sessions that ran when they were last looked at: as long as their pods are ready nothing can be wrong.
        self.well: set[int] = set()
        # Those to be looked at although nothing happens: with a request under way, or coming up by themselves, when
        # (monotonic) and how many seconds after the last time.
        self._unsettled: set[int] = set()
        self._rising: dict[int, tuple[float, float]] = {}
        # Those to be looked at with the next changes.
        self._due: set[int] = set()
        # By session, what its crashed containers wrote last; and which runs were asked for it.
        self._last_words: dict[int, dict[tuple[str, str], Sequence[str]]] = {}
        self._asked: dict[int, set[tuple[str, str, int]]] = {}
        self._inspecting: set[int] = set()
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def touch(self, session_id: int) -> None:
        """There is something new of the session's."""
        self._due.add(session_id)

    @property
    def waiting(self) -> bool:
        """Whether there are sessions that were touched."""
        return bool(self._due)

    def due(self) -> set[int]:
        """The sessions that were touched since the last call."""
        due, self._due = self._due, set()
        return due

    async def close(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # Before a transaction. -------------------------------------------------------------------------------------------

    async def decide(
        self, connection: Connection, ids: Collection[int], *, trusted: bool = True
    ) -> list[tuple[int, Observation]]:
        """Look at sessions; those whose rows are to be changed, in the order of their ids.

        Not `trusted`: nothing has just happened that would say that what is held is of now.
        """
        if not ids:
            return []
        rows = await connection.fetch(
            f"""SELECT {COLUMNS}, clock_timestamp() - updated_at FROM sessions
                 WHERE id = ANY ($1) AND provider_id = $2 ORDER BY id""",  # noqa: S608  Our own column names.
            list(ids),
            self._provider_id,
        )
        self._unsettled.difference_update(ids)
        for session_id in set(ids).difference(row["id"] for row in rows):
            self._forget(session_id)
        found = []
        for number, row in enumerate(rows, start=1):
            if number % _SLICE == 0:
                await asyncio.sleep(0)
            *columns, unchanged = row
            session = Session(*columns)
            if session.desired != Desired.RUNNING:
                self._forget(session.id)
            elif session.outstanding:
                self._unsettled.add(session.id)
            elif (seen := self._seen(session)) and (changes := self._changes(session, seen)):
                if self._certain(session, changes, unchanged, trusted=trusted):
                    found.append((session.id, seen))
                elif session.stale:
                    await leases.hurry(connection, session.id)
                    self._unsettled.add(session.id)
                else:
                    self._inspect(session.id)
        return found

    async def unsettled(self, connection: Connection) -> list[int]:
        """The sessions to be looked at because time passes."""
        rows = await connection.fetch(
            "SELECT id, observed_generation = generation AND NOT stale FROM sessions WHERE id = ANY ($1)",
            list(self._unsettled),
        )
        self._unsettled.intersection_update(row[0] for row in rows)
        now = monotonic()
        rising = [session_id for session_id, (due, _) in self._rising.items() if due <= now]
        return [row[0] for row in rows if row[1]] + rising

    def _seen(self, session: Session) -> Observation | None:
        evidence = self._evidence(session)
        if any(map(is_ready, evidence.pods)):
            seen = diagnose(evidence, self._provider.rules, datetime.now(UTC))
            if seen.state is State.RUNNING:
                self._forget(session.id)
                self.well.add(session.id)
                return seen
        self.well.discard(session.id)
        evidence = replace(
            evidence,
            events=list(self._held.events.held(session.namespace)),
            previous_logs=self._last_words.get(session.id, {}),
        )
        seen = diagnose(evidence, self._provider.rules, datetime.now(UTC))
        if seen.state in (State.STARTING, State.FAILED):
            self._ask_what_crashed(session, evidence)
        # One that serves, though Kubernetes does not call it ready, does not for long.
        if seen.state in (State.STARTING, State.RUNNING):
            _, wait = self._rising.get(session.id, (0.0, _RISING / 2))
            wait = min(wait * 2, _LONGEST_RISING)
            self._rising[session.id] = monotonic() + wait, wait
        else:
            self._rising.pop(session.id, None)
        return seen

    def _evidence(self, session: Session) -> Evidence:
        mine = str(session.id)
        return Evidence(
            namespace=self._held.namespaces.get("", session.namespace),
            deployment=self._held.deployments.get(session.namespace, session.container_name),
            pods=[pod for pod in self._held.pods.held(session.namespace) if pod.metadata.labels.get(SESSION) == mine],
        )

    def _changes(self, session: Session, seen: Observation) -> Changes:
        """What an observation changes about a row."""
        changes = steps.observed(session, seen, self._look.start_deadline)
        if seen.state is State.RUNNING:
            # Of endpoints what is held says nothing: they stay, until somebody looks.
            changes = {name: value for name, value in changes.items() if name not in endpoint_columns(None)}
        if session.stale:
            # Whoever wanted to inspect it need not any more.
            changes = steps.done(session, **changes, lease_owner=None, lease_expires_at=None)
        elif session.status == Status.ERROR and seen.state is State.FAILED and seen.reason == session.reason:
            # Told already, but now with the last words of what crashed.
            changes = {"message": seen.message} if session.id in self._last_words else {}
        return {
            name: value
            for name, value in changes.items()
            if not hasattr(session, name) or getattr(session, name) != value
        }

    def _certain(self, session: Session, changes: Changes, unchanged: timedelta, *, trusted: bool) -> bool:
        """Whether what is held is enough to change the row by, which is `unchanged` for so long by its own clock."""
        status = changes.get("status", session.status)
        if status == session.status:
            return True
        if status == Status.RUNNING:
            # An error has taken the endpoints away.
            return session.status != Status.ERROR
        if status == Status.PENDING:
            return False
        # That an outage has marked it says nothing of what is held.
        return trusted and (session.stale or unchanged > _RECENT)

    def _forget(self, session_id: int) -> None:
        self.well.discard(session_id)
        self._rising.pop(session_id, None)
        self._last_words.pop(session_id, None)
        self._asked.pop(session_id, None)

    # Within a transaction. -------------------------------------------------------------------------------------------

    async def record(self, connection: Connection, decided: Sequence[tuple[int, Observation]]) -> None:
        """Change the rows that were decided on, each as it is now, within the caller's transaction."""
        if not decided:
            return
        seen = dict(decided)
        changed = []
        for now in await record.lock_all(connection, seen):
            if now.outstanding or now.desired != Desired.RUNNING:
                self._unsettled.add(now.id)
            elif changes := self._changes(now, seen[now.id]):
                after, visible = await record.write_silently(connection, now, **changes)
                if visible:
                    changed.append(after)
                    log.info("session seen", session=after.id, status=after.status, reason=after.reason)
        await record.tell(connection, *changed)

    async def mark_stale(self, connection: Connection, why: str, *, limit: int = 100) -> int:
        """Say of up to so many sessions that their status is the last one known; how many there were."""
        async with connection.transaction():
            rows = await connection.fetch(
                """SELECT id FROM sessions
                    WHERE provider_id = $1 AND status IN ('starting', 'running') AND desired = 'running'
                      AND observed_generation = generation AND NOT stale
                    ORDER BY id LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED""",
                self._provider_id,
                limit,
            )
            marked = []
            for now in await record.lock_all(connection, [row["id"] for row in rows]):
                away = steps.away(why) | {"next_attempt_at": After(_PATIENCE)}
                after, _ = await record.write_silently(connection, now, **away)
                marked.append(after)
            await record.tell(connection, *marked)
        return len(rows)

    # Beside. ---------------------------------------------------------------------------------------------------------

    def _inspect(self, session_id: int) -> None:
        """Have the cluster itself asked."""
        if session_id not in self._inspecting:
            self._inspecting.add(session_id)
            self._spawn(self._inspected(session_id), f"inspect session {session_id}")

    def inspect_later(self, session_id: int) -> None:
        """Have the cluster asked where a session that runs is reached now."""
        if session_id in self.well:
            self._inspect(session_id)

    async def _inspected(self, session_id: int) -> None:
        try:
            async with self._room:
                self._inspecting.discard(session_id)
                await self._look.inspect(session_id)
        except UNAVAILABLE as error:
            log.warning("not inspected", session=session_id, error=str(error) or type(error).__name__)
            self._unsettled.add(session_id)

    def _ask_what_crashed(self, session: Session, evidence: Evidence) -> None:
        whose = crashed(evidence)
        asked = self._asked.setdefault(session.id, set())
        for pod in evidence.pods:
            for status in (*pod.status.init_container_statuses, *pod.status.container_statuses):
                # What ended is read once as the run that is, and once as the one before.
                run = pod.metadata.uid, status.name, status.restart_count * 2 + (status.state.terminated is None)
                if (pod.metadata.name, status.name) in whose and run not in asked:
                    asked.add(run)
                    self._spawn(self._read(session, pod.metadata.name, status.name), f"last words {session.id}")

    async def _read(self, session: Session, pod: str, container: str) -> None:
        try:
            async with self._room:
                found = self._provider.cluster.logs(session.namespace, pod, container, tail=_LAST_LINES, previous=True)
                async with found as arriving:
                    lines = [line.decode(errors="replace") async for some in arriving for line in some]
        except (ApiRefused, ProviderUnavailable) as error:
            log.info("last output not read", session=session.id, container=container, error=str(error))
            return
        if lines:
            self._last_words.setdefault(session.id, {})[pod, container] = lines
            self.touch(session.id)
            self._news()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("looking after a session failed", task=task.get_name(), exc_info=error)
