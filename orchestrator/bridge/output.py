"""The output of sessions' containers, followed by the leader: each line once, with the time that it was written at.

Where to go on is in `session_logs` itself: the last line that is stored of a container says from when to read again,
and those of the same moment are counted, since a moment may have several. So neither a lost connection nor another
leader repeats a line or leaves one out.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import structlog

from orchestrator.bridge.statuses import Held, Watched
from orchestrator.cluster.objects import ContainerStatus, Pod
from orchestrator.database import UNAVAILABLE, Pool, backoff
from orchestrator.errors import ApiRefused, ProviderUnavailable
from orchestrator.providers.contract import LogLine

log = structlog.get_logger("bridge")

_AWAY: tuple[type[BaseException], ...] = (ProviderUnavailable, *UNAVAILABLE)
_MOMENT = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)")
# Lines that are taken between two looks whether there is room: as many may have come at once as fit into a read.
_SLICE = 100
# Seconds without a line after which a connection may be dead, and is made anew.
_QUIET = 600.0
# Seconds between two looks whether there is room again.
_PAUSE = 0.05


class Output(Protocol):
    """Where lines go: `logs.LogWriter`."""

    def sink(self, line: LogLine) -> None:
        """Take a line; returns at once."""
        ...

    @property
    def full(self) -> bool:
        """Whether to wait before it is given more lines."""
        ...

    @property
    def keep(self) -> int:
        """Lines that are kept of each session."""
        ...

    def discard(self, session_ids: Collection[int]) -> None:
        """Forget what was taken of these sessions and is not stored."""
        ...


@dataclass(slots=True)
class _Container:
    """One whose output is followed, or waits for room."""

    session_id: int
    namespace: str
    pod: str
    uid: str
    name: str
    # How often it was started again, as the cluster says; and the first run that was not read to its end.
    restarts: int = 0
    unread: int = 0
    # Of the last line that was taken: its time, and how many of that time there were. None: not looked up yet.
    at: datetime | None = None
    same: int = 0
    known: bool = False
    gone: bool = False


class Streams:
    """Follows as many containers as the option `log_streams` says. `see` pods as they change, `close` at the end."""

    def __init__(self, pool: Pool, provider: Watched, held: Held, output: Output) -> None:
        self._pool = pool
        self._provider = provider
        self._held = held
        self._output = output
        # What is followed, or was read to its end, by the pod's uid and the container's name.
        self._containers: dict[tuple[str, str], _Container] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        # Pods with containers that found no room, in the order of their coming: session, namespace and name by uid.
        self._waiting: dict[str, tuple[int, str, str]] = {}
        # Sessions that are to be told so, and those that were.
        self._kept_out: set[int] = set()
        self._told: set[int] = set()
        self._teller: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def open(self) -> int:
        """Containers that are followed now."""
        return len(self._tasks)

    @property
    def waiting(self) -> int:
        """Pods of which containers are kept out by the bound."""
        return len(self._waiting)

    def see(self, session_id: int, pod: Pod, *, gone: bool = False) -> None:
        """A pod has changed: follow what has started in it."""
        bound = self._provider.options.log_streams
        if bound == 0:
            return
        meta = pod.metadata
        if gone:
            self._waiting.pop(meta.uid, None)
        for status in (*pod.status.init_container_statuses, *pod.status.container_statuses):
            key = meta.uid, status.name
            container = self._containers.get(key)
            if gone:
                if container is not None:
                    container.gone = True
                    if key not in self._tasks:
                        del self._containers[key]
            elif not _started(status):
                continue
            elif key in self._tasks:
                self._containers[key].restarts = status.restart_count
            elif container is not None and container.unread > status.restart_count:
                continue
            elif len(self._tasks) < bound:
                container = container or _Container(session_id, meta.namespace, meta.name, meta.uid, status.name)
                container.restarts = status.restart_count
                self._containers[key] = container
                self._tasks[key] = asyncio.create_task(
                    self._follow(key, container), name=f"output of {meta.name} {status.name}"
                )
            else:
                self._waiting[meta.uid] = session_id, meta.namespace, meta.name
                self._tell_kept_out(session_id)

    async def close(self) -> None:
        """Follow no more, and forget what is not stored: whoever leads next reads that again."""
        self._closed = True
        tasks = [*self._tasks.values(), *([self._teller] if self._teller is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._containers:
            self._output.discard({one.session_id for one in self._containers.values()})

    def _fill(self) -> None:
        """There is room: who has waited longest gets it."""
        while self._waiting and len(self._tasks) < self._provider.options.log_streams:
            uid = next(iter(self._waiting))
            session_id, namespace, name = self._waiting.pop(uid)
            pod = self._held.pods.get(namespace, name)
            if pod is not None and pod.metadata.uid == uid:
                self.see(session_id, pod)

    def _tell_kept_out(self, session_id: int) -> None:
        if session_id not in self._told:
            self._told.add(session_id)
            self._kept_out.add(session_id)
            if self._teller is None or self._teller.done():
                self._teller = asyncio.create_task(self._tell(), name="tell of output that waits")

    async def _tell(self) -> None:
        """Say once to each session, whoever leads, that not all that it writes is in its log."""
        bound = self._provider.options.log_streams
        text = (
            f"The output of {bound} containers is followed already (option log_streams): some of this session's waits."
        )
        while some := list(self._kept_out)[:500]:
            try:
                async with self._pool.acquire() as connection:
                    rows = await connection.fetch(
                        """SELECT DISTINCT session_id FROM session_logs
                            WHERE session_id = ANY ($1) AND stream = 'system' AND line = $2""",
                        some,
                        text,
                    )
            except UNAVAILABLE as error:
                log.info("not told", sessions=len(some), error=str(error) or type(error).__name__)
                await asyncio.sleep(backoff(5))
                continue
            for session_id in set(some) - {row["session_id"] for row in rows}:
                self._output.sink(LogLine(session_id, "", "system", text))
            self._kept_out.difference_update(some)

    async def _follow(self, key: tuple[str, str], container: _Container) -> None:
        """Read a container's output until there will be no more of it, or none of this run."""
        failures = 0
        try:
            while not container.gone:
                try:
                    if not container.known:
                        await self._find_position(container)
                    before = container.at, container.same
                    if await self._read_runs(container):
                        return
                    # Of a container that has just ended, the kubelet may have nothing, again and again.
                    failures = 0 if (container.at, container.same) != before else failures + 1
                except ApiRefused as error:
                    log.debug("no output", pod=container.pod, container=container.name, error=str(error))
                    if not self._runs(container, container.restarts):
                        # Gone, or not there yet: then the pod changes again.
                        return
                    failures += 1
                except _AWAY as error:
                    failures += 1
                    log.debug("output lost", pod=container.pod, container=container.name, error=str(error))
                await asyncio.sleep(backoff(failures + 1))
        except Exception:
            log.exception("following output failed", pod=container.pod, container=container.name)
        finally:
            del self._tasks[key]
            if container.gone:
                self._containers.pop(key, None)
            if not self._closed:
                self._fill()

    async def _read_runs(self, container: _Container) -> bool:
        """Read what there is of the run before, if that was missed, and of the one that is; whether that has ended."""
        run = container.restarts
        if run > 0 and container.unread < run:
            # Only one is kept of those that have ended.
            await self._read(container, previous=True)
            container.unread = run
        await self._read(container, previous=False)
        if self._runs(container, run):
            return False
        container.unread = run + 1
        return container.restarts == run

    def _runs(self, container: _Container, run: int) -> bool:
        """Whether, as far as is known, this run still goes on."""
        pod = self._held.pods.get(container.namespace, container.pod)
        if pod is None or pod.metadata.uid != container.uid:
            container.gone = True
            return False
        for status in (*pod.status.init_container_statuses, *pod.status.container_statuses):
            if status.name == container.name:
                container.restarts = status.restart_count
                return status.restart_count == run and status.state.running is not None
        return False

    async def _find_position(self, container: _Container) -> None:
        """Where another leader, or an earlier lead, has stopped reading."""
        async with self._pool.acquire() as connection:
            row = await connection.fetchrow(
                """SELECT at, count(*) FROM session_logs
                    WHERE session_id = $1 AND service = $2 AND stream = 'stdout'
                    GROUP BY at ORDER BY at DESC LIMIT 1""",
                container.session_id,
                container.name,
            )
            if row is None:
                # Perhaps its lines were there, and the others' have taken their place.
                row = await connection.fetchrow(
                    "SELECT min(at), 0 FROM session_logs WHERE session_id = $1 HAVING count(*) >= $2",
                    container.session_id,
                    self._output.keep,
                )
        if row is not None:
            container.at, container.same = row[0], row[1]
        container.known = True

    async def _read(self, container: _Container, *, previous: bool) -> None:
        """Take the lines of a run from where we are, until there are no more."""
        try:
            async with self._provider.cluster.logs(
                container.namespace, container.pod, container.name,
                follow=not previous, previous=previous, since=container.at, timestamps=True, idle=_QUIET,
            ) as arriving:  # fmt: skip
                resuming = _Resuming(container.at, container.same)
                async for lines in arriving:
                    for begin in range(0, len(lines), _SLICE):
                        while self._output.full:  # noqa: ASYNC110  A sink tells nobody that it has room again.
                            await asyncio.sleep(_PAUSE)
                        self._take(container, resuming, lines[begin : begin + _SLICE])
        except ApiRefused:
            # Of a run before the cluster may keep nothing.
            if not previous:
                raise

    def _take(self, container: _Container, resuming: _Resuming, lines: Sequence[bytes]) -> None:
        for one in lines:
            moment, _, text = one.partition(b" ")
            at = _time(moment)
            if at is None:
                # Not the container's: what the kubelet says when it cannot read on, for instance.
                log.debug("no line of output", pod=container.pod, container=container.name, line=one[:200])
            elif not resuming.taken(at):
                container.same = container.same + 1 if at == container.at else 1
                container.at = at
                self._output.sink(
                    LogLine(container.session_id, container.name, "stdout", text.decode(errors="replace"), at)
                )


class _Resuming:
    """Tells the lines that were taken before, at the beginning of what is read again."""

    def __init__(self, at: datetime | None, same: int) -> None:
        self._at = at
        self._same = same

    def taken(self, at: datetime) -> bool:
        """Whether the next line, which is of this moment, was."""
        if self._at is None or at > self._at:
            # From here on all is new, also where two streams have come a little out of order.
            self._at = None
            return False
        if at == self._at:
            self._same -= 1
            return self._same >= 0
        return True


def _started(status: ContainerStatus) -> bool:
    state = status.state
    return state.running is not None or state.terminated is not None or status.last_state.terminated is not None


def _time(moment: bytes) -> datetime | None:
    """Of Kubernetes' nanoseconds as much as we keep; None: no time. They may come with an offset."""
    found = _MOMENT.fullmatch(moment)
    if found is None:
        return None
    whole, fraction, offset = (part.decode() for part in found.groups(b""))
    return datetime.fromisoformat(f"{whole}.{fraction[:6]:0<6}{offset}").astimezone(UTC)
