"""The log of a deployment: what its steps say, in pieces, into `deployment_logs` and the outbox in one transaction.

Saying never waits. What is kept is bounded, and so is what waits in memory for the database: the first part of the log
is kept as it comes; of what comes after it the last part, which is added when the deployment ends.
"""

from __future__ import annotations

import asyncio
import io
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import structlog

from orchestrator import events
from orchestrator.database import UNAVAILABLE, Connection, Pool, backoff
from orchestrator.deployments import leases
from orchestrator.deployments.leases import LeaseLost
from orchestrator.deployments.masking import Masker
from orchestrator.deployments.record import moment
from orchestrator.eventlog import outbox
from orchestrator.events import Event
from orchestrator.text import clean

log = structlog.get_logger("deployments.logs")

# Bytes of one piece, and of those of one transaction.
PIECE = 32 << 10
_BATCH = 8 * PIECE
# Seconds that the first byte of a piece waits for more. It also paces a flood, which others' events share a log with.
PATIENCE = 0.05
# Bytes of the end of a log that is cut, if that is no more than a quarter of it; and of what tells that it is.
_TAIL = 1 << 20
_NOTE = 200
# Bytes within which the end begins with a whole line.
_LINE = 4 << 10


class _Said:
    """Text of one step that waits: what comes in many small parts takes no more room than in one."""

    __slots__ = ("_text", "size", "step")

    def __init__(self, step: str) -> None:
        self.step = step
        self.size = 0
        self._text = io.StringIO()

    def add(self, text: str) -> None:
        self.size += len(text)
        self._text.write(text)

    def take(self) -> str:
        return self._text.getvalue()


@dataclass(frozen=True, slots=True)
class _Piece:
    step: str
    position: int
    text: str
    length: int
    at: datetime

    @property
    def end(self) -> int:
        return self.position + self.length


class DeploymentLog:
    """One deployment's log, as written by the worker that holds the lease `owner`.

    `run` stores what is said until it is cancelled, `close` what is left then. When the lease is lost, which they find
    out, nothing is stored any more. `on_stored` is told of each transaction how many bytes it stored.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        deployment_id: int,
        app_id: int,
        owner: UUID,
        secrets: Iterable[str],
        limit: int,
        on_stored: Callable[[int], None],
    ) -> None:
        self._pool = pool
        self._deployment_id = deployment_id
        self._app_id = app_id
        self._owner = owner
        self._masker = Masker(secrets)
        self._limit = limit
        self._on_stored = on_stored
        tail = min(_TAIL, limit // 4)
        self._note = (
            f"\n[This log is longer than {limit} bytes: what follows is left out, but for the last {tail} bytes, which "
            "are added at the end.]\n"
        )
        # More than is kept: what is masked gets shorter, and the end of a secret at its beginning is left out.
        self._tail = _Tail(tail + 4 * self._masker.longest)
        # Bytes that may be said before the log is cut; and where the next piece begins.
        self._room = limit - tail - _NOTE
        self._position = 0
        self._cut = False
        self._step = ""
        self._waiting: deque[_Said] = deque()
        self._held_step = ""
        # What is being stored, and whether it may have been already.
        self._batch: list[_Piece] = []
        self._tried = False
        self._some = asyncio.Event()
        self._turn = asyncio.Lock()
        self._lost = False

    async def resume(self, connection: Connection) -> bool:
        """Go on after what another worker has stored; whether there is any."""
        self._position = await _stored(connection, self._deployment_id)
        self._cut = await connection.fetchval(
            "SELECT EXISTS (SELECT FROM deployment_logs WHERE deployment_id = $1 AND text = $2)",
            self._deployment_id,
            self._note,
        )
        self._room = 0 if self._cut else max(0, self._room - self._position)
        return self._position > 0

    def begin(self, step: str) -> None:
        """What is said from now on is of this step."""
        self._step = step

    def say(self, text: str) -> None:
        """Take text of any size, from the event loop's thread; returns at once."""
        if self._lost or not text:
            return
        while text and self._room > 0:
            # No character has less than a byte.
            size = min(self._room, _BATCH)
            taken, more = _split(clean(text[:size], sys.maxsize), self._room)
            text = more + text[size:]
            self._room -= len(taken.encode())
            if more:
                self._room = 0
            self._wait(taken)
        if text:
            if not self._cut:
                self._cut = True
                self._wait(self._note)
            self._tail.add(self._step, text)

    async def run(self) -> None:
        """Store what is said, however long the database is away, until cancelled or the lease is lost."""
        while not self._lost:
            await self._some.wait()
            await asyncio.sleep(PATIENCE)
            async with self._turn:
                await self._store_next()

    async def flush(self) -> None:
        """Store what was said so far, which is all of its step. Waits for the database; cancelling loses nothing."""
        async with self._turn:
            while (self._batch or self._waiting) and not self._lost:
                await self._store_next()
            self._make_pieces(self._held_step, self._masker.end())
            while self._batch and not self._lost:
                await self._store_next()

    async def close(self) -> None:
        """Store all that is left, and the end of a log that was cut."""
        await self.flush()
        async with self._turn:
            for step, text in self._last_part():
                self._make_pieces(step, text)
            while self._batch and not self._lost:
                await self._store_next()

    def _wait(self, text: str) -> None:
        last = self._waiting[-1] if self._waiting else None
        if last is None or last.step != self._step or last.size >= _BATCH or text is self._note:
            last = _Said(self._step)
            self._waiting.append(last)
        last.add(text)
        self._some.set()

    def _last_part(self) -> Iterator[tuple[str, str]]:
        """What is kept of the end, by step, masked; as much as there is room for."""
        whole = not self._tail.dropped
        parts = []
        for step, raw in self._tail.take():
            text = clean(raw, sys.maxsize)
            if not whole:
                text = self._masker.without_beginning(text)
            masked = self._masker.feed(text) + self._masker.end()
            if not whole and 0 <= (line := masked.find("\n")) < _LINE:
                masked = masked[line + 1 :]
            whole = True
            parts.append((step, masked))
        room = self._limit - self._position
        kept: deque[tuple[str, str]] = deque()
        for step, text in reversed(parts):
            encoded = text.encode()[-room:] if room > 0 else b""
            room -= len(encoded)
            kept.appendleft((step, encoded.decode("utf-8", "ignore")))
        yield from kept

    def _make_batch(self) -> None:
        """Turn some of what waits into pieces."""
        if self._waiting:
            said = self._waiting.popleft()
            text = said.take()
            if said.step != self._held_step or text == self._note:
                self._make_pieces(self._held_step, self._masker.end())
                self._held_step = said.step
            if text == self._note:
                self._make_pieces(said.step, text, alone=True)
            else:
                self._make_pieces(said.step, self._masker.feed(text))
        if not self._waiting:
            self._some.clear()

    def _make_pieces(self, step: str, text: str, *, alone: bool = False) -> None:
        """Add to the batch: to its last piece, while that is of the same step and has room, or as new ones."""
        if not text:
            return
        last = self._batch[-1] if self._batch else None
        if last is not None and last.step == step and not alone and not self._tried and last.text != self._note:
            self._batch.pop()
            self._position = last.position
            text = last.text + text
        now = datetime.now(UTC)
        while text:
            piece, rest = _split(text[:PIECE], PIECE)
            text = rest + text[PIECE:]
            length = len(piece.encode())
            self._batch.append(_Piece(step, self._position, piece, length, now))
            self._position += length

    async def _store_next(self) -> None:
        """Make and store one batch; the one that is under way when this is cancelled is stored by the next call."""
        if not self._batch:
            self._make_batch()
        failures = 0
        while self._batch:
            try:
                await self._store()
                return
            except LeaseLost:
                self._lost = True
                self._batch.clear()
                self._waiting.clear()
                return
            except UNAVAILABLE as error:
                failures += 1
                log.warning(
                    "the log waits",
                    deployment=self._deployment_id,
                    error=str(error) or type(error).__name__,
                    failures=failures,
                )
                await asyncio.sleep(backoff(failures, cap=2.0))

    async def _store(self) -> None:
        pieces = self._batch
        again, self._tried = self._tried, True
        async with self._pool.acquire() as connection, connection.transaction():
            # Nobody else writes meanwhile, an attempt of ours of which nothing was heard included.
            await leases.hold(connection, self._deployment_id, self._owner)
            if not again or await _stored(connection, self._deployment_id) < pieces[-1].end:
                await self._insert(connection, pieces)
        self._batch, self._tried = [], False
        self._on_stored(sum(piece.length for piece in pieces))

    async def _insert(self, connection: Connection, pieces: list[_Piece]) -> None:
        await connection.execute(
            """INSERT INTO deployment_logs (deployment_id, position, length, at, step, text)
               SELECT $1, * FROM unnest($2::bigint[], $3::int[], $4::timestamptz[], $5::text[], $6::text[])""",
            self._deployment_id,
            [piece.position for piece in pieces],
            [piece.length for piece in pieces],
            [piece.at for piece in pieces],
            [piece.step for piece in pieces],
            [piece.text for piece in pieces],
        )
        await outbox.add(connection, *(self._event(piece) for piece in pieces))

    def _event(self, piece: _Piece) -> Event:
        return Event(
            events.DEPLOYMENT_LOG,
            events.deployment_channel(self._deployment_id),
            {
                "deployment_id": self._deployment_id,
                "app_id": self._app_id,
                "step": piece.step,
                "position": piece.position,
                "length": piece.length,
                "text": piece.text,
                "at": moment(piece.at),
            },
        )


class _Tail:
    """The last bytes of a text, by step; it holds up to twice as many, so that adding costs little."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._parts: deque[tuple[str, bytearray]] = deque()
        self._bytes = 0
        self.dropped = False

    def add(self, step: str, text: str) -> None:
        if not self._parts or self._parts[-1][0] != step:
            self._parts.append((step, bytearray()))
        added = text[-self._keep :].encode("utf-8", "replace")
        self.dropped = self.dropped or len(text) > self._keep
        self._parts[-1][1].extend(added)
        self._bytes += len(added)
        if self._bytes > 2 * self._keep:
            self._trim()

    def take(self) -> list[tuple[str, str]]:
        """What there is of it, by step, in order."""
        self._trim()
        taken = [(step, part.decode("utf-8", "ignore")) for step, part in self._parts]
        self._parts.clear()
        self._bytes = 0
        return taken

    def _trim(self) -> None:
        while (excess := self._bytes - self._keep) > 0:
            self.dropped = True
            if excess >= len(self._parts[0][1]):
                self._bytes -= len(self._parts.popleft()[1])
            else:
                del self._parts[0][1][:excess]
                self._bytes -= excess


def _split(text: str, size: int) -> tuple[str, str]:
    """The first part, of at most so many bytes of UTF-8, no character cut in two; and the rest."""
    if text.isascii():
        return text[:size], text[size:]
    encoded = text.encode()
    while 0 < size < len(encoded) and encoded[size] & 0xC0 == 0x80:
        size -= 1
    return encoded[:size].decode(), encoded[size:].decode()


async def _stored(connection: Connection, deployment_id: int) -> int:
    """Bytes of the log that are stored."""
    stored: int | None = await connection.fetchval(
        "SELECT position + length FROM deployment_logs WHERE deployment_id = $1 ORDER BY position DESC LIMIT 1",
        deployment_id,
    )
    return stored or 0
