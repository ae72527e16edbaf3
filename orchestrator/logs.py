"""The output of sessions: from a provider's sink, in batches, into `session_logs` and into the event log.

The sink never waits. What comes faster than it can be stored is dropped, counted, and told as one line in its place.
Lines skip the outbox (`design.md`): what is stored but was not published when the process died is read by REST.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from orchestrator import events
from orchestrator.database import UNAVAILABLE, Connection, Pool, backoff
from orchestrator.errors import LogUnavailable
from orchestrator.eventlog.contract import EventLog
from orchestrator.events import Event
from orchestrator.providers.contract import LogLine, Position
from orchestrator.sessions.record import moment
from orchestrator.text import clean

log = structlog.get_logger("logs")

# Bytes of one line.
MAX_LINE = 8 << 10
# What waits to be stored: lines, and bytes of them.
MAX_WAITING = 20_000
MAX_WAITING_BYTES = 16 << 20
# A batch is written when it has so many lines, or when its first one is so many seconds old.
BATCH = 256
PATIENCE = 0.1
# Lines that a session may have above what is kept, as a share of it, before the oldest are deleted.
_SLACK = 0.1
_AWAY: tuple[type[BaseException], ...] = (*UNAVAILABLE, LogUnavailable)
# Of `pg_advisory_xact_lock`: "logs", and one for each session or a few of them.
_TURN = 0x6C6F_6773
_LARGEST_KEY = 2**31
_COLUMNS = ("session_id", "at", "service", "stream", "line")


@dataclass(frozen=True, slots=True)
class _Line:
    session_id: int
    at: datetime
    service: str
    stream: str
    line: str


@dataclass(slots=True)
class _Batch:
    """Lines on their way. `events` is what is to be published of them once they are stored."""

    lines: list[_Line]
    events: list[Event] | None = None


class LogWriter:
    """`sink` takes lines, `run` stores and publishes them until cancelled, `flush` does so with what is left."""

    def __init__(self, pool: Pool, event_log: EventLog, *, keep: int) -> None:
        self._pool = pool
        self._event_log = event_log
        self.keep = keep
        self._waiting: deque[_Line] = deque()
        self._bytes = 0
        self._some = asyncio.Event()
        self._full = asyncio.Event()
        self._lost: Counter[int] = Counter()
        self._unfinished: _Batch | None = None
        # Lines stored for a session since it was last pruned.
        self._since_pruned: dict[int, int] = {}
        # Lines so far.
        self.written = 0
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """Lines that wait to be stored."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether who can wait should, before it brings more: far below where lines are dropped."""
        return len(self._waiting) > MAX_WAITING // 4 or self._bytes > MAX_WAITING_BYTES // 4

    def sink(self, line: LogLine) -> None:
        """Take a line, from the event loop's thread; returns at once."""
        text = clean(line.line, MAX_LINE)
        if len(self._waiting) >= MAX_WAITING or self._bytes + len(text) > MAX_WAITING_BYTES:
            self._lost[line.session_id] += 1
            self.dropped += 1
            return
        self._bytes += len(text)
        self._waiting.append(
            _Line(
                line.session_id, line.at or datetime.now(UTC), clean(line.service, 200), clean(line.stream, 200), text
            )
        )
        self._some.set()
        if len(self._waiting) >= BATCH:
            self._full.set()

    def discard(self, session_ids: Collection[int]) -> None:
        """Forget the output of these sessions that is not stored: somebody else reads it again. What a
        provider says itself of a service nobody has but us."""

        def stays(line: _Line) -> bool:
            return line.session_id not in session_ids or (line.stream == "system" and line.service != "")

        kept = [line for line in self._waiting if stays(line)]
        self._waiting = deque(kept)
        self._bytes = sum(len(line.line) for line in kept)
        if (batch := self._unfinished) is not None and batch.events is None:
            batch.lines = [line for line in batch.lines if stays(line)]

    async def positions(self, session_id: int, service: str) -> dict[str, Position]:
        """How far the output of a service is stored, by its stream. Raises what is in `database.UNAVAILABLE`."""
        async with self._pool.acquire() as connection, connection.transaction():
            # What is being stored counts.
            await _take_turns(connection, [session_id])
            rows = await connection.fetch(
                """SELECT DISTINCT ON (stream) stream, at, count(*) FROM session_logs
                    WHERE session_id = $1 AND service = $2 AND stream <> 'system'
                    GROUP BY stream, at ORDER BY stream, at DESC""",
                session_id,
                service,
            )
            if rows:
                return {row["stream"]: Position(row["at"], row["count"]) for row in rows}
            # Perhaps its lines were there, and the others' have taken their place.
            oldest = await connection.fetchval(
                "SELECT min(at) FROM session_logs WHERE session_id = $1 HAVING count(*) >= $2", session_id, self.keep
            )
        return {} if oldest is None else {stream: Position(oldest, 0) for stream in ("stdout", "stderr")}

    async def run(self) -> None:
        """Write batches for ever. A batch that is under way when this is cancelled is left to `flush`."""
        while True:
            await self.iterate()

    async def iterate(self) -> None:
        """Wait for lines, then write one batch of them, however long the database and the log are away."""
        await self._some.wait()
        try:
            async with asyncio.timeout(PATIENCE):
                await self._full.wait()
        except TimeoutError:
            log.debug("the first line has waited long enough")
        await self._write_next()

    async def flush(self, timeout: float) -> None:
        """Write what is waiting, for at most `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self._unfinished or self._waiting or self._lost:
                    await self._write_next()
        except TimeoutError:
            log.warning("output of sessions lost at the end", lines=len(self._waiting))

    async def _write_next(self) -> None:
        if self._unfinished is None:
            self._unfinished = _Batch(self._take())
        await self._write(self._unfinished)
        self._unfinished = None

    def _take(self) -> list[_Line]:
        batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
        self._bytes -= sum(len(line.line) for line in batch)
        if not self._waiting:
            self._some.clear()
            batch += self._tell_lost()
        if len(self._waiting) < BATCH:
            self._full.clear()
        return batch

    def _tell_lost(self) -> list[_Line]:
        """A line in the place of those that were dropped: they came after all that was waiting."""
        now = datetime.now(UTC)
        told = [
            _Line(
                session_id, now, "", "system", f"{count} lines were dropped: they came faster than they can be stored."
            )
            for session_id, count in self._lost.items()
        ]
        self._lost.clear()
        return told

    async def _write(self, batch: _Batch) -> None:
        failures = 0
        while True:
            try:
                if batch.events is None:
                    batch.events = [_event(line) for line in await self._store(batch)]
                if batch.events:
                    await self._event_log.publish(batch.events)
                self.written += len(batch.events)
                return
            except _AWAY as error:
                failures += 1
                log.warning("output waits", lines=len(batch.lines), error=str(error) or type(error).__name__)
                await asyncio.sleep(backoff(failures, cap=5.0))

    async def _store(self, batch: _Batch) -> list[_Line]:
        """Those of the lines whose sessions still exist, which are stored now."""
        ids = {line.session_id for line in batch.lines}
        async with self._pool.acquire() as connection, connection.transaction():
            # Held until the commit, so that no reference breaks; one that is gone would fail the whole COPY.
            rows = await connection.fetch("SELECT id FROM sessions WHERE id = ANY ($1) FOR KEY SHARE", list(ids))
            there = {row["id"] for row in rows}
            await _take_turns(connection, there)
            # From here on it is too late to discard any: who asks for positions waits.
            lines = [line for line in batch.lines if line.session_id in there]
            await connection.copy_records_to_table(
                "session_logs",
                columns=_COLUMNS,
                records=[(line.session_id, line.at, line.service, line.stream, line.line) for line in lines],
            )
            await self._prune(connection, Counter(line.session_id for line in lines))
        for session_id in ids - there:
            self._since_pruned.pop(session_id, None)
        return lines

    async def _prune(self, connection: Connection, stored: Counter[int]) -> None:
        slack = int(self.keep * _SLACK) + 1
        for session_id, count in stored.items():
            # The first lines that this process stores may come on top of another's.
            since = self._since_pruned.get(session_id, slack) + count
            if since > slack:
                await connection.execute(
                    """DELETE FROM session_logs WHERE session_id = $1 AND id <= (
                           SELECT id FROM session_logs WHERE session_id = $1 ORDER BY id DESC OFFSET $2 LIMIT 1)""",
                    session_id,
                    self.keep,
                )
                since = 0
            self._since_pruned[session_id] = since


async def _take_turns(connection: Connection, session_ids: Collection[int]) -> None:
    """Have a session's lines written by one transaction after the other, so that their ids grow in the order in which
    they can be seen: who has read up to an id has missed none before it."""
    keys = sorted({session_id % _LARGEST_KEY for session_id in session_ids})
    # In the order of the keys, as everybody does.
    await connection.execute("SELECT pg_advisory_xact_lock($1, key) FROM unnest($2::int[]) AS key", _TURN, keys)


def _event(line: _Line) -> Event:
    return Event(
        events.SESSION_LOG,
        events.session_channel(line.session_id),
        {
            "session_id": line.session_id,
            "service": line.service,
            "stream": line.stream,
            "line": line.line,
            "at": moment(line.at),
        },
    )
